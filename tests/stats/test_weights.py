import numpy as np
import pytest

from latticeflow.stats import (
    ess,
    ess_error,
    forward_ess,
    gamma_derived,
    jackknife,
    largest_weight,
    log_z,
    predicted_acceptance,
    reweighted_mean,
)

FUNCTIONS = [ess, ess_error, log_z, predicted_acceptance, largest_weight, forward_ess]


def test_equal_weights():
    logs = np.full(40, -3.7)
    assert ess(logs) == pytest.approx(1)
    assert ess_error(logs) == pytest.approx(0, abs=1e-12)
    assert log_z(logs) == pytest.approx((-3.7, 0), abs=1e-7)
    assert predicted_acceptance(logs) == pytest.approx(1)
    assert largest_weight(logs) == pytest.approx(1 / 40)
    assert forward_ess(logs) == pytest.approx(1)


def test_two_values_in_closed_form():
    logs = np.log([1.0, 1.0, 4.0, 2.0])
    assert ess(logs) == pytest.approx(64 / (4 * 22))
    assert log_z(logs) == pytest.approx((np.log(2), np.sqrt((88 / 64 - 1) / 4)))
    assert largest_weight(logs) == pytest.approx(0.5)
    assert forward_ess(logs) == pytest.approx(1 / (2 * 2.75 / 4))


@pytest.mark.parametrize("width", [0.3, 0.8])
def test_lognormal_weights_have_their_known_ess_and_log_z(width):
    """Normal ``l`` of variance v: ``ESS = exp(-v)``, ``log Z = v/2``; five standard deviations, rate 6e-7 each."""
    logs = np.random.default_rng(1).normal(scale=width, size=50_000)
    assert abs(ess(logs) - np.exp(-(width**2))) < 5 * ess_error(logs)
    assert ess_error(logs) < 0.02
    value, error = log_z(logs)
    assert abs(value - width**2 / 2) < 5 * error
    assert error == pytest.approx(np.sqrt((np.exp(width**2) - 1) / 50_000), rel=0.1)


def test_forward_ess_from_target_samples_agrees_with_the_reverse_one():
    """Under the target the same log weights are shifted by their variance; 2 per cent is some five deviations."""
    logs = 0.8**2 + np.random.default_rng(2).normal(scale=0.8, size=100_000)
    assert forward_ess(logs) == pytest.approx(np.exp(-0.64), rel=0.02)


def test_forward_ess_sees_a_mode_that_the_reverse_one_misses():
    """The proposal gives half of the target a share of 1e-6: its own samples never go there."""
    target_logs = np.concatenate([np.full(500, np.log(0.5)), np.full(500, np.log(0.5e6))])
    assert ess(np.full(1000, np.log(0.5))) == pytest.approx(1)
    assert forward_ess(target_logs) == pytest.approx(4e-6, rel=1e-3)


def test_ess_error_is_the_jackknife_written_out():
    logs = np.random.default_rng(3).normal(scale=2, size=(4, 30))
    _, error = jackknife(ess, logs.ravel())
    assert ess_error(logs) == pytest.approx(error, rel=1e-10)


def test_ess_error_with_one_dominating_weight():
    logs = np.array([0.0, -800.0, -800.0, -801.0])
    without = np.array([1 / 3, 1 / 3, 1 / 3, ess(logs[1:])])
    assert ess_error(logs) == pytest.approx(np.sqrt(3 / 4 * np.sum((without - without.mean()) ** 2)))
    assert np.isnan(ess_error([0.0, -np.inf]))


@pytest.mark.parametrize("shift", [1e4, -1e4, 1e6])
def test_large_log_weights_do_not_overflow(shift):
    logs = np.random.default_rng(4).normal(size=200)
    for function in (ess, ess_error, predicted_acceptance, largest_weight, forward_ess):
        assert function(logs + shift) == pytest.approx(function(logs), rel=1e-7)
    assert log_z(logs + shift)[0] == pytest.approx(log_z(logs)[0] + shift, rel=1e-13)
    observable = np.arange(200.0)
    assert reweighted_mean(observable, logs + shift) == pytest.approx(reweighted_mean(observable, logs), rel=1e-7)


def test_spread_of_ten_thousand_leaves_one_sample():
    logs = np.array([1e4, -1e4, 0.0, 5e3])
    assert ess(logs) == pytest.approx(0.25)
    assert log_z(logs)[0] == pytest.approx(1e4 - np.log(4))
    assert forward_ess(logs) == 0
    assert np.isfinite(ess_error(logs))


def test_minus_infinity_is_a_weight_of_zero():
    logs = np.array([0.0, -np.inf, 0.0, -np.inf])
    assert ess(logs) == pytest.approx(0.5)
    assert log_z(logs)[0] == pytest.approx(-np.log(2))
    assert predicted_acceptance(logs) == pytest.approx(0.5)
    assert reweighted_mean([1.0, 7.0, 3.0, 9.0], logs)[0] == pytest.approx(2.0)
    with pytest.raises(ValueError, match="-inf, found at index 1"):
        forward_ess(logs)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_plus_infinity_are_named_with_their_index(function, bad):
    logs = np.zeros(30)
    logs[17] = bad
    with pytest.raises(ValueError, match=f"{bad}, found at index 17"):
        function(logs)
    with pytest.raises(ValueError, match=r"found at index \(1, 7\)"):
        function(logs.reshape(3, 10))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_samples_are_refused(function):
    with pytest.raises(ValueError, match="at least one sample"):
        function(np.zeros(0))


def test_weights_that_are_all_zero_are_refused():
    with pytest.raises(ValueError, match="every weight is zero"):
        ess(np.full(3, -np.inf))


def test_reweighted_mean_in_closed_form():
    mean, error = reweighted_mean([1.0, 2.0, 5.0], np.log([1.0, 2.0, 1.0]))
    assert mean == pytest.approx(2.5)
    assert error == pytest.approx(np.sqrt(0.25**2 * 1.5**2 + 0.5**2 * 0.5**2 + 0.25**2 * 2.5**2))


def test_reweighting_a_shifted_normal_is_calibrated():
    """From N(0,1) to N(0.5,1), 2000 times: the width of the pulls is known to 0.016, the band is four times that."""
    x = np.random.default_rng(5).normal(size=(2000, 1000))
    results = np.array([reweighted_mean(row, 0.5 * row) for row in x])
    pulls = (results[:, 0] - 0.5) / results[:, 1]
    assert np.sqrt(np.mean(pulls**2)) == pytest.approx(1, abs=0.065)


def test_correlated_error_is_that_of_the_ratio(ar1):
    x = ar1(0.9, (2, 10_000), seed=6)
    weights = np.exp(0.3 * x)
    expected = gamma_derived(lambda means: means[0] / means[1], [weights * x, weights])
    mean, error = reweighted_mean(x, 0.3 * x, correlated=True)
    assert mean == pytest.approx(expected.mean, rel=1e-12)
    assert error == pytest.approx(expected.error, rel=1e-7)
    assert error > 2 * reweighted_mean(x, 0.3 * x)[1]


def test_reweighted_mean_refuses_unequal_shapes_and_nan():
    with pytest.raises(ValueError, match=r"one shape, found \(3,\) and \(4,\)"):
        reweighted_mean(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="observable must not hold nan, found at index 2"):
        reweighted_mean([0.0, 1.0, np.nan], np.zeros(3))


def test_predicted_acceptance_is_the_double_sum():
    logs = np.random.default_rng(7).normal(scale=1.5, size=60)
    weights = np.exp(logs)
    brute = np.minimum(weights[:, None], weights).sum() / (60 * weights.sum())
    assert predicted_acceptance(logs) == pytest.approx(brute, rel=1e-12)


def test_predicted_acceptance_is_that_of_a_simulated_chain(metropolis_states):
    """The spread over 200 independent chains gives the error; five standard deviations, rate 6e-7."""
    logs = np.random.default_rng(8).normal(scale=1.5, size=60)
    _, accepted = metropolis_states(np.exp(logs), 200, 1000, seed=9)
    rates = accepted.mean(axis=1)
    error = rates.std() / np.sqrt(200)
    assert error < 0.005
    assert abs(rates.mean() - predicted_acceptance(logs)) < 5 * error
