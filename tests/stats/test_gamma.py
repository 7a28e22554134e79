"""Statistical tests compare at five standard deviations (false-alarm rate 6e-7 each) unless they say otherwise."""

import warnings

import numpy as np
import pytest

from latticeflow.stats import fluctuations, gamma_method


@pytest.fixture(scope="module")
def pyerrors():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it imports scipy.odr
        import pyerrors
    return pyerrors


def exact_tau(a):
    return 0.5 * (1 + a) / (1 - a)


def exact_error(a, n):
    lags = np.arange(1, n)
    return np.sqrt((1 + 2 * np.sum((1 - lags / n) * a**lags)) / n)


@pytest.mark.parametrize("a", [-0.8, -0.3, 0.0, 0.5, 0.9, 199 / 201])
def test_ar1_has_the_known_tau_and_error(ar1, a):
    result = gamma_method(ar1(a, 400_000, seed=7))
    assert abs(result.tau_int - exact_tau(a)) < 5 * result.tau_int_error
    assert abs(result.error - exact_error(a, 400_000)) < 5 * result.error_error
    assert abs(result.mean) < 5 * result.error
    assert result.tau_int_error < 0.2 * exact_tau(a)
    assert result.converged
    assert result.warnings == ()


def test_sum_of_a_slow_and_a_fast_process(ar1):
    series = np.sqrt(0.3) * ar1(0.98, 1_000_000, seed=1) + np.sqrt(0.7) * ar1(0.5, 1_000_000, seed=2)
    exact = 0.3 * exact_tau(0.98) + 0.7 * exact_tau(0.5)
    result = gamma_method(series)
    assert abs(result.tau_int - exact) < 5 * result.tau_int_error
    assert result.tau_int_error < 0.05 * exact


@pytest.mark.parametrize("flip", [0.05, 0.5, 0.8])
def test_two_state_chain(flip):
    """``rho(t) = (1 - 2p)^t``; for p above one half the chain is antithetic."""
    flips = np.random.default_rng(3).random(400_000) < flip
    result = gamma_method(1 - 2 * (np.cumsum(flips) % 2))
    assert abs(result.tau_int - (1 - flip) / (2 * flip)) < 5 * result.tau_int_error
    assert result.rho[1] == pytest.approx(1 - 2 * flip, abs=0.01)


def test_antithetic_chain_is_neither_floored_nor_negative(ar1):
    result = gamma_method(ar1(-0.8, 50_000, seed=5))
    assert result.rho[1] < -0.7
    assert 0 < result.tau_int < 0.1
    assert result.n_eff > 5 * result.n


def test_finite_metropolis_chain_has_its_exact_tau(metropolis_states):
    """Exact: ``tau = f D Z f / f D f - 1/2`` with ``Z = (I - P + 1 p)^-1``; the chains enter as replica."""
    weights = np.array([0.1, 1.0, 2.0, 8.0, 0.5, 3.0])
    p = weights / weights.sum()
    transition = np.minimum(1, weights / weights[:, None]) / p.size
    np.fill_diagonal(transition, 0)
    np.fill_diagonal(transition, 1 - transition.sum(axis=1))
    f = np.array([1.0, -2.0, 0.5, 3.0, 1.0, 0.0])
    centred = f - p @ f
    fundamental = np.linalg.inv(np.eye(p.size) - transition + p)
    exact = (centred * p) @ fundamental @ centred / (p @ centred**2) - 0.5
    states, _ = metropolis_states(weights, 100, 4000, seed=11)
    result = gamma_method(f[states])
    assert exact > 1.5
    assert abs(result.tau_int - exact) < 5 * result.tau_int_error
    assert abs(result.mean - p @ f) < 5 * result.error
    assert result.tau_int_error < 0.1 * exact


@pytest.mark.parametrize(("a", "ratio"), [(9 / 11, 200), (1 / 3, 2000), (-0.5, 9000)])
def test_pulls_have_unit_width_and_gaussian_coverage(ar1, a, ratio):
    """2000 chains: expected width 1.00 to 1.04 and coverage 0.67 to 0.695, each widened by 3.5 standard deviations.

    False-alarm rate below 1e-3 per quantity for a correct estimator.
    """
    n = round(ratio * exact_tau(a))
    results = [gamma_method(chain) for chain in ar1(a, (2000, n), seed=20)]
    pulls = np.array([result.mean / result.error for result in results])
    assert 1.00 - 0.055 < pulls.std() < 1.04 + 0.055
    assert 0.67 - 0.037 < np.mean(np.abs(pulls) < 1) < 0.695 + 0.037
    errors = np.array([result.error for result in results])
    assert errors.mean() == pytest.approx(exact_error(a, n), rel=0.015)
    assert errors.std() == pytest.approx(np.mean([result.error_error for result in results]), rel=0.1)
    taus = np.array([result.tau_int for result in results])
    assert taus.std() == pytest.approx(np.mean([result.tau_int_error for result in results]), rel=0.15)


def test_one_sigma_covers_the_truth_in_two_of_three_chains(ar1):
    """1000 chains at N/tau = 200: the share, expected 0.68 to 0.695, is known to 0.015; the seed is fixed."""
    results = [gamma_method(chain) for chain in ar1(9 / 11, (1000, 1000), seed=23)]
    assert 0.66 <= np.mean([abs(result.mean) < result.error for result in results]) <= 0.71


def test_short_chains_are_flagged_and_their_errors_too_small(ar1):
    """N/tau = 20, 1000 chains: the mean error is some ten per cent short (known to one per cent); all are warned."""
    results = [gamma_method(chain) for chain in ar1(9 / 11, (1000, 100), seed=21)]
    shortfall = np.mean([result.error for result in results]) / exact_error(9 / 11, 100)
    assert 0.85 < shortfall < 0.97
    assert np.mean([len(result.warnings) > 0 for result in results]) > 0.99
    assert np.mean([not result.converged for result in results]) > 0.2


def test_short_antithetic_chains_are_flagged(ar1):
    """Their ``tau_int`` is far below 1/2, but 200 samples are few against a memory of ten."""
    results = [gamma_method(chain) for chain in ar1(-0.9, (200, 200), seed=22)]
    assert all(result.warnings for result in results)


@pytest.mark.parametrize(("a", "n", "s"), [(0.3, 1000, 2.0), (0.9, 5001, 2.0), (0.9, 5000, 1.2), (0.97, 150_000, 3.0)])
def test_error_of_the_mean_agrees_with_pyerrors(ar1, pyerrors, a, n, s):
    series = 5 + ar1(a, n, seed=30)
    reference = pyerrors.Obs([series], ["ensemble"])
    reference.gamma_method(S=s)
    result = gamma_method(series, s=s)
    assert result.error == pytest.approx(reference.dvalue, rel=1e-10)
    assert result.error_error == pytest.approx(reference.ddvalue, rel=1e-10)
    assert result.window == reference.e_windowsize["ensemble"]
    assert result.mean == pytest.approx(reference.value, rel=1e-13)


def test_bias_correction_is_that_of_the_formula(ar1):
    """``C -> C (1 + (2W+1)/N)`` and ``Gamma(0) -> Gamma(0) + C/N``, from sums written out."""
    series = ar1(0.7, 500, seed=31)
    result = gamma_method(series)
    d = series - series.mean()
    gamma = np.array([d[: 500 - t] @ d[t:] / (500 - t) for t in range(result.window + 1)])
    summed = gamma[0] + 2 * gamma[1:].sum()
    corrected = summed * (1 + (2 * result.window + 1) / 500)
    assert result.error == pytest.approx(np.sqrt(corrected / 500), rel=1e-12)
    tau, lag = corrected / (2 * (gamma[0] + summed / 500)), result.window
    assert result.tau_int == pytest.approx(tau, rel=1e-12)
    assert result.tau_int_error == pytest.approx(2 * tau * np.sqrt((lag + 0.5 - tau) / 500), rel=1e-12)


def test_shift_and_scale_change_nothing_but_the_units(ar1):
    series = ar1(0.8, 3000, seed=32)
    plain = gamma_method(series)
    for scale, shift in [(-3.0, 7.0), (1e200, 0.0), (1e-200, 0.0)]:
        moved = gamma_method(scale * series + shift)
        assert moved.error == pytest.approx(abs(scale) * plain.error, rel=1e-9)
        assert moved.tau_int == pytest.approx(plain.tau_int, rel=1e-9)
        assert moved.window == plain.window


def test_long_series_with_a_long_memory_looks_beyond_the_short_range_of_lags(ar1):
    result = gamma_method(ar1(0.999, 150_000, seed=34))
    assert result.window > 150_000 // 50
    assert abs(result.tau_int - exact_tau(0.999)) < 5 * result.tau_int_error
    assert result.tau_int == pytest.approx(gamma_method(ar1(0.999, 150_000, seed=34), window_max=75_000).tau_int)


@pytest.mark.parametrize("tau_exp", [None, 60.0])
def test_the_short_range_of_lags_changes_nothing(ar1, monkeypatch, tau_exp):
    """Series of 20000 try 400 lags first; a slow mode of tau 50 has its window there, but not the errors of rho."""
    for chain in ar1(0.98, (10, 20_000), seed=35):
        short = gamma_method(chain, tau_exp=tau_exp)
        with monkeypatch.context() as patch:
            patch.setattr(fluctuations, "LONG_SERIES", 10**9)
            long = gamma_method(chain, tau_exp=tau_exp)
        assert short.window == long.window
        assert short.error == pytest.approx(long.error, rel=1e-12)


def test_fields_are_consistent(ar1):
    result = gamma_method(ar1(0.8, 5000, seed=33))
    assert result.rho.shape == result.tau_int_of_window.shape
    assert result.rho.size > result.window + 1
    assert result.tau_int_of_window[result.window] == pytest.approx(result.tau_int, rel=1e-13)
    assert result.tau_int == pytest.approx(0.5 + result.rho[1 : result.window + 1].sum(), rel=1e-13)
    assert result.n_eff == pytest.approx(5000 / (2 * result.tau_int))
    assert np.isnan(result.chi2)
    assert np.isnan(result.p_value)


def test_replica_of_unequal_length_in_either_form(ar1):
    lengths = [3000, 500, 1700]
    chains = [ar1(0.6, length, seed=40 + k) for k, length in enumerate(lengths)]
    listed = gamma_method(chains)
    cut = gamma_method(np.concatenate(chains), replica=lengths)
    assert listed.mean == pytest.approx(np.concatenate(chains).mean(), rel=1e-12)
    assert (listed.error, listed.window, listed.chi2) == (cut.error, cut.window, cut.chi2)
    assert abs(listed.tau_int - exact_tau(0.6)) < 5 * listed.tau_int_error
    assert listed.error != gamma_method(np.concatenate(chains)).error


def test_equal_replica_agree_as_array_and_as_list(ar1):
    chains = ar1(0.6, (4, 800), seed=44)
    assert gamma_method(chains).error == gamma_method(list(chains)).error


def test_replica_p_value_is_uniform(ar1):
    """600 ensembles of four chains: the share of p-values below 0.2 is known to 0.016; the band is four times that."""
    ensembles = ar1(0.5, (600, 4, 600), seed=45)
    p_values = np.array([gamma_method(ensemble).p_value for ensemble in ensembles])
    assert np.mean(p_values < 0.2) == pytest.approx(0.2, abs=0.066)


def test_disagreeing_replica_are_reported(ar1):
    chains = ar1(0.5, (3, 4000), seed=46)
    assert gamma_method(chains).converged
    chains[1] += 0.3
    result = gamma_method(chains)
    assert result.p_value < 1e-3
    assert not result.converged
    assert any("replica disagree" in warning for warning in result.warnings)


def test_chains_frozen_in_different_sectors_are_reported():
    result = gamma_method([np.zeros(500), np.ones(500)])
    assert result.error > 0.1
    assert not result.converged
    assert any("below 20" in warning for warning in result.warnings)


def test_window_that_never_closes_is_reported():
    result = gamma_method(np.arange(10.0)[:, None] * np.ones(100))
    assert not result.converged
    assert any("did not close" in warning for warning in result.warnings)


def test_window_max_bounds_the_window(ar1):
    result = gamma_method(ar1(0.95, 20_000, seed=47), window_max=10)
    assert result.window == 10
    assert any("did not close up to lag 10" in warning for warning in result.warnings)


@pytest.mark.parametrize("series", [np.full(50, 0.1), [np.full(9, 2), np.full(6, 2)]])
def test_constant_series_has_error_zero_and_a_flag(series):
    result = gamma_method(series)
    assert (result.error, result.error_error, result.tau_int) == (0, 0, 0.5)
    assert result.n_eff == result.n
    assert not result.converged
    assert "constant" in result.warnings[0]


def test_perfect_alternation_quotes_the_naive_error():
    result = gamma_method(np.tile([1.0, -1.0], 100))
    assert result.tau_int == 0.5
    assert result.error == pytest.approx(1 / np.sqrt(200))
    assert any("not positive" in warning for warning in result.warnings)


def test_slow_tail_restores_what_the_automatic_window_misses(ar1):
    """A slow mode of 3 per cent of the variance: the window closes on the fast one, the tail does not.

    The mean over 20 chains is known to 2 per cent and 2 per cent low; the band is five times that.
    """
    slow, tau_exp = 0.99, -1 / np.log(0.99)
    series = np.sqrt(0.03) * ar1(slow, (20, 40_000), seed=50) + np.sqrt(0.97) * ar1(0.5, (20, 40_000), seed=51)
    exact = 0.03 * exact_tau(slow) + 0.97 * exact_tau(0.5)
    plain = [gamma_method(chain) for chain in series]
    attached = [gamma_method(chain, tau_exp=tau_exp) for chain in series]
    assert np.mean([result.tau_int for result in plain]) < 0.7 * exact
    assert np.mean([result.tau_int for result in attached]) == pytest.approx(0.98 * exact, rel=0.11)
    spread = np.std([result.tau_int for result in attached])
    assert spread < np.mean([result.tau_int_error for result in attached]) < 3 * spread


def test_slow_tail_is_that_of_the_formula(ar1):
    result = gamma_method(ar1(0.9, 20_000, seed=52), tau_exp=12.0)
    summed = result.tau_int_of_window[result.window]
    assert result.tau_int == pytest.approx(summed + 12.0 * result.rho[result.window + 1], rel=1e-12)
    variance = np.var(ar1(0.9, 20_000, seed=52))
    assert result.error == pytest.approx(np.sqrt(2 * result.tau_int * variance / 20_000), rel=1e-3)


@pytest.mark.parametrize("setting", [{"s": 0.0}, {"s": -1.0}, {"tau_exp": 0.0}, {"window_max": 0}])
def test_settings_must_be_positive(setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))} must be positive"):
        gamma_method(np.arange(10.0), **setting)


def test_nan_is_named_with_its_index():
    series = np.zeros(100)
    series[41] = np.nan
    with pytest.raises(ValueError, match="nan, found at index 41"):
        gamma_method(series)


@pytest.mark.parametrize("n", range(4, 20))
def test_very_short_chains_give_a_finite_flagged_error(n):
    result = gamma_method(np.random.default_rng(n).normal(size=n))
    assert np.isfinite(result.error)
    assert result.error > 0
    assert result.warnings
