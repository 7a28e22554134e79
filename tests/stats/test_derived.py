import numpy as np
import pytest

from latticeflow.stats import gamma_derived, gamma_method


@pytest.fixture(scope="module")
def pair(ar1):
    first, second = ar1(0.6, (2, 20_000), seed=1)
    return 3 + first, 2 + 0.5 * second + 0.3 * first


def ratio(means):
    return means[0] / means[1]


def test_ratio_of_independent_samples_has_the_delta_method_error():
    """Error of ``x/y``: ``sqrt(var(x - r y) / n) / y``; five standard deviations, false-alarm rate 6e-7."""
    x, y = np.random.default_rng(2).normal(size=(2, 100_000)) * [[1.0], [0.5]] + [[3.0], [2.0]]
    result = gamma_derived(ratio, [x, y])
    exact = np.sqrt((1.0 + 1.5**2 * 0.25) / 100_000) / 2.0
    assert abs(result.error - exact) < 5 * result.error_error
    assert result.mean == pytest.approx(x.mean() / y.mean(), rel=1e-14)


def test_ratio_is_the_gamma_method_on_projected_fluctuations(pair):
    x, y = pair
    projected = (x - x.mean()) / y.mean() - x.mean() / y.mean() ** 2 * (y - y.mean())
    result, expected = gamma_derived(ratio, pair), gamma_method(projected)
    assert result.error == pytest.approx(expected.error, rel=1e-8)
    assert result.tau_int == pytest.approx(expected.tau_int, rel=1e-8)


@pytest.mark.parametrize("as_function", [True, False])
def test_given_gradient_agrees_with_the_numerical_one(pair, as_function):
    def gradient(means):
        return np.array([1 / means[1], -means[0] / means[1] ** 2])

    means = np.array([pair[0].mean(), pair[1].mean()])
    given = gamma_derived(ratio, pair, gradient=gradient if as_function else gradient(means))
    assert gamma_derived(ratio, pair).error == pytest.approx(given.error, rel=1e-8)


def test_linear_function_is_the_gamma_method_of_the_combination(pair):
    result = gamma_derived(lambda means: 2 * means[0] - 5 * means[1], pair)
    expected = gamma_method(2 * pair[0] - 5 * pair[1])
    assert result.mean == pytest.approx(expected.mean, rel=1e-12)
    assert result.error == pytest.approx(expected.error, rel=1e-8)


def test_correlations_between_observables_count(pair):
    """The ratio of a series to a multiple of itself has no error, whatever the errors of the two."""
    x = pair[0]
    result = gamma_derived(ratio, [x, 2 * x])
    assert result.mean == pytest.approx(0.5)
    assert result.error < 1e-8 * gamma_method(x).error


def test_replica_lists_and_lengths(pair):
    cut = [[x[:12_000], x[12_000:]] for x in pair]
    listed, lengths = gamma_derived(ratio, cut), gamma_derived(ratio, pair, replica=[12_000, 8000])
    assert listed.error == lengths.error
    assert 0 < listed.p_value < 1


def test_constant_observable_is_a_constant(pair):
    x = pair[0]
    result = gamma_derived(ratio, [x, np.full(x.size, 0.1)])
    assert result.error == pytest.approx(10 * gamma_method(x).error, rel=1e-8)


def test_pulls_of_a_nonlinear_function_have_unit_width(ar1):
    """800 chains: the width is known to 0.025, the band is 1.02 plus or minus four times that (rate 6e-5)."""
    chains = ar1(0.5, (800, 2, 1500), seed=3) * 0.5 + np.array([[2.0], [1.5]])
    results = [gamma_derived(lambda means: np.exp(means[0]) / means[1], chain) for chain in chains]
    exact = np.exp(2.0) / 1.5
    pulls = np.array([(result.mean - exact) / result.error for result in results])
    assert np.sqrt(np.mean(pulls**2)) == pytest.approx(1.02, abs=0.1)


def test_bad_input_is_refused(pair):
    x, y = pair
    with pytest.raises(ValueError, match="same replica lengths"):
        gamma_derived(ratio, [x, y[1:]])
    with pytest.raises(ValueError, match="at least one series"):
        gamma_derived(ratio, [])
    with pytest.raises(ValueError, match="one finite number"):
        gamma_derived(lambda means: means, [x, y])
    with pytest.raises(ValueError, match=r"gradient must be finite, of shape \(2,\)"):
        gamma_derived(ratio, [x, y], gradient=[1.0])


def test_function_that_ignores_the_means_is_a_constant(pair):
    result = gamma_derived(lambda means: 7.0, pair)
    assert (result.mean, result.error) == (7.0, 0.0)
    assert "constant" in result.warnings[0]
