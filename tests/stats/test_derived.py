import numpy as np
import pytest

from latticeflow.stats import gamma_derived, gamma_derived_many, gamma_method


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


@pytest.fixture(scope="module")
def correlator(ar1):
    """Twelve observables, ``exp(-t/2)`` with noise of one per cent of the first, on two replica: (K, replica, n)."""
    noise = ar1(0.7, (12, 2, 4000), seed=4)
    return np.exp(-0.5 * np.arange(12))[:, None, None] + 0.3 * noise


def effective_mass(means):
    return np.log(means[:-1] / means[1:])


def test_many_values_agree_with_single_calls(correlator):
    clean = correlator[:5]
    results = gamma_derived_many(effective_mass, clean)
    assert len(results) == 4
    for t, result in enumerate(results):
        single = gamma_derived(lambda means, t=t: effective_mass(means)[t], clean)
        assert result.mean == single.mean
        assert result.window == single.window
        for name in ("error", "error_error", "tau_int", "tau_int_error", "p_value"):
            assert getattr(result, name) == pytest.approx(getattr(single, name), rel=1e-10)


def test_the_identity_is_the_gamma_method_of_each_observable(correlator):
    for series, result in zip(correlator, gamma_derived_many(lambda means: means, correlator), strict=True):
        expected = gamma_method(series)
        assert result.mean == pytest.approx(expected.mean, rel=1e-13)
        assert result.error == pytest.approx(expected.error, rel=1e-10)


def test_values_of_any_shape_are_flattened_and_a_gradient_may_be_given(correlator):
    def products(means):
        return np.outer(means, means)[:2]

    def gradient(means):
        eye = np.eye(means.size)
        return (eye[:, None] * means[:, None] + means[:, None, None] * eye)[:2]

    given, numerical = (gamma_derived_many(products, correlator[:3], gradient=g) for g in (gradient, None))
    assert len(given) == 6
    means = correlator[:3].mean(axis=(1, 2))
    np.testing.assert_allclose([result.mean for result in given], products(means).ravel(), rtol=1e-12)
    np.testing.assert_allclose([r.error for r in given], [r.error for r in numerical], rtol=1e-8)
    transposed = gamma_derived_many(products, correlator[:3], gradient=lambda m: 2 * gradient(m))
    np.testing.assert_allclose([r.error for r in transposed], [2 * r.error for r in given], rtol=1e-12)


def test_undefined_values_are_marked_without_a_warning_or_a_raise(pair):
    """Warnings are errors in this test run: the logarithm of a negative number must stay silent."""

    def function(means):
        below = means[0] - pair[0].mean()
        return np.array([means[0], np.log(-means[0]), 1 / 0.0 if means[0] < 0 else means[1] / 0.0, np.sqrt(below), 7.0])

    finite, negative, infinite, edge, constant = gamma_derived_many(function, pair)
    assert finite.error == pytest.approx(gamma_method(pair[0]).error, rel=1e-8)
    for result, reason in ((negative, "is nan"), (infinite, "is inf"), (edge, "slope")):
        assert np.isnan([result.mean, result.error, result.error_error, result.tau_int, result.n_eff]).all()
        assert not result.converged
        assert result.n == 20_000
        assert len(result.warnings) == 1
        assert result.warnings[0].startswith("undefined: ")
        assert reason in result.warnings[0]
    assert (constant.mean, constant.error) == (7.0, 0.0)


def test_everything_may_be_undefined(pair):
    results = gamma_derived_many(lambda means: np.log(-means), pair)
    assert [result.warnings[0].split(":")[0] for result in results] == ["undefined", "undefined"]


def test_scale_of_the_observables_does_not_matter(pair):
    plain = gamma_derived_many(ratio, pair)[0]
    for scale in (1e200, 1e-200):
        assert gamma_derived_many(ratio, [scale * x for x in pair])[0].error == pytest.approx(plain.error, rel=1e-8)


def test_function_is_called_in_pairs(pair):
    calls = []
    gamma_derived_many(lambda means: calls.append(means) or means, [*pair, np.ones(20_000)])
    assert len(calls) == 1 + 2 * 2


def test_bad_input_of_many_is_refused(pair):
    x, y = pair
    with pytest.raises(ValueError, match=r"observables\[1\] must not hold nan, found at index 3"):
        gamma_derived_many(ratio, [x, np.where(np.arange(x.size) == 3, np.nan, y)])
    with pytest.raises(ValueError, match=r"2 values by 2 observables, found shape \(2,\)"):
        gamma_derived_many(lambda means: means, pair, gradient=np.ones(2))
    with pytest.raises(ValueError, match="must return real numbers"):
        gamma_derived_many(lambda means: 1j * means, pair)
    sizes = iter([2, 2, 3])
    with pytest.raises(ValueError, match=r"always return 2 values, found \[2, 3\]"):
        gamma_derived_many(lambda means: np.ones(next(sizes)), pair)
    with pytest.raises(ValueError, match="tau_exp must be positive"):
        gamma_derived_many(ratio, pair, tau_exp=0.0)
