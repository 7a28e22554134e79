import numpy as np
import pytest
from scipy import stats

from latticeflow.stats import pareto_k
from latticeflow.stats.pareto import generalised_pareto_shape


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9, 1.5])
def test_pareto_weights_have_their_shape(shape):
    """The tail of 3 sqrt(n) points gives ``k`` to ``(1 + k)/sqrt(tail)``; four standard deviations, rate 6e-5."""
    n = 100_000
    logs = shape * np.random.default_rng(1).exponential(size=n)
    assert abs(pareto_k(logs) - shape) < 4 * (1 + shape) / np.sqrt(3 * np.sqrt(n))


@pytest.mark.parametrize("shape", [-0.3, 0.1, 0.8])
def test_fit_is_close_to_the_maximum_of_the_likelihood(shape):
    excesses = np.sort(stats.genpareto.rvs(shape, scale=2.0, size=2000, random_state=2))
    fitted, _, _ = stats.genpareto.fit(excesses, floc=0)
    assert generalised_pareto_shape(excesses) == pytest.approx(fitted, abs=0.01)


def test_shape_does_not_depend_on_the_scale():
    excesses = np.sort(stats.genpareto.rvs(0.4, size=300, random_state=3))
    assert generalised_pareto_shape(1e-80 * excesses) == pytest.approx(generalised_pareto_shape(excesses), rel=1e-9)


@pytest.mark.parametrize(("n", "tail"), [(100, 20), (400, 60)])
def test_tail_size_and_prior_of_ten_points_at_one_half(n, tail):
    logs = 1.5 * np.random.default_rng(4).exponential(size=n)
    weights = np.sort(np.exp(logs))
    raw = generalised_pareto_shape(weights[-tail:] - weights[-tail - 1])
    assert pareto_k(logs) == pytest.approx((tail * raw + 5) / (tail + 10), rel=1e-9)


def test_fit_is_the_profile_average_written_out():
    x = np.array([0.1, 0.3, 0.4, 0.9, 1.7, 2.0, 4.0, 11.0])
    points = 30 + 2
    thetas = [1 / 11 + (1 - np.sqrt(points / (j - 0.5))) / (3 * 0.3) for j in range(1, points + 1)]
    likelihoods = []
    for theta in thetas:
        shape = sum(np.log(1 - theta * value) for value in x) / 8
        scale = -shape / theta
        likelihoods.append(np.prod([(1 + shape * value / scale) ** (-1 - 1 / shape) / scale for value in x]))
    best = np.average(thetas, weights=likelihoods)
    assert generalised_pareto_shape(x) == pytest.approx(np.mean(np.log(1 - best * x)), rel=1e-10)


def test_a_grid_point_at_zero_does_not_divide_by_zero():
    """With 16 points and the largest three times the quartile, the ninth of the 34 values of theta is zero."""
    excesses = np.concatenate([[0.25, 0.5, 0.75], np.linspace(1, 3, 13)])
    assert np.isfinite(generalised_pareto_shape(excesses))


def test_light_and_heavy_tails_lie_on_either_side_of_the_limit():
    normal = np.random.default_rng(5).normal(size=10_000)
    assert pareto_k(0.2 * normal) < 0.5
    assert pareto_k(6.0 * normal) > 0.7
    assert pareto_k(1e4 * normal) > 0.7


def test_tails_that_cannot_be_fitted():
    assert pareto_k(np.zeros(100)) == -np.inf
    assert pareto_k(np.zeros(10)) == np.inf
    assert pareto_k(np.append(np.zeros(99), 50.0)) == np.inf
    assert pareto_k(np.append(np.full(99, -np.inf), 0.0)) == np.inf


def test_equidistant_weights_do_not_divide_by_zero():
    for n in range(25, 200):
        assert np.isfinite(pareto_k(np.log(np.arange(1, n + 1))))


def test_plus_infinity_is_named_with_its_index():
    with pytest.raises(ValueError, match="inf, found at index 3"):
        pareto_k(np.array([0.0, 0.0, 0.0, np.inf]))
