"""Proposals N(0, 1), targets ``exp(-(x - m)^2 / (2 v))``, so that ``log Z = log sqrt(2 pi v)``.

Statistical tests compare at five standard deviations (false-alarm rate 6e-7 each) unless they say otherwise.
"""

import numpy as np
import pytest
from scipy.special import expit

from latticeflow.stats import bennett, free_energy_difference, gamma_method, log_z


def log_weights(x, shift, variance=1.0):
    return -((x - shift) ** 2) / (2 * variance) + x**2 / 2 + np.log(2 * np.pi) / 2


def exact_log_z(variance=1.0):
    return np.log(2 * np.pi * variance) / 2


def both_sides(sizes, shift, variance=1.0, seed=1, repeats=()):
    rng = np.random.default_rng(seed)
    proposals = rng.normal(size=(*repeats, sizes[0]))
    targets = shift + np.sqrt(variance) * rng.normal(size=(*repeats, sizes[1]))
    return log_weights(proposals, shift, variance), log_weights(targets, shift, variance)


@pytest.mark.parametrize(
    ("sizes", "shift", "variance"), [((2000, 2000), 1.0, 1.0), ((500, 8000), 1.5, 0.5), ((9000, 300), 0.3, 2.0)]
)
def test_log_z_of_a_gaussian(sizes, shift, variance):
    value, error = bennett(*both_sides(sizes, shift, variance))
    assert abs(value - exact_log_z(variance)) < 5 * error
    assert error < 0.1


@pytest.mark.parametrize(("sizes", "shift"), [((400, 400), 1.0), ((200, 800), 2.0), ((800, 200), 0.2)])
def test_bennett_is_calibrated(sizes, shift):
    """2000 repeats: pull width known to 0.016 and coverage to 0.010; bands of four of these (rate 1e-4 each)."""
    proposals, targets = both_sides(sizes, shift, seed=2, repeats=(2000,))
    results = np.array([bennett(*pair) for pair in zip(proposals, targets, strict=True)])
    pulls = (results[:, 0] - exact_log_z()) / results[:, 1]
    assert np.sqrt(np.mean(pulls**2)) == pytest.approx(1, abs=0.064)
    assert np.mean(np.abs(pulls) < 1) == pytest.approx(0.683, abs=0.042)
    assert abs(pulls.mean()) < 0.1


def test_correlated_target_samples_are_calibrated(ar1):
    """Targets with tau_int 9.5, 1000 repeats of N/tau = 210: width known to 0.022, band of four; naively it is 2."""
    proposals, _ = both_sides((400, 1), 1.0, seed=3, repeats=(1000,))
    targets = log_weights(1.0 + ar1(0.9, (1000, 2000), seed=4), 1.0)
    pairs = list(zip(proposals, targets, strict=True))
    results = np.array([bennett(*pair, correlated=True) for pair in pairs])
    pulls = (results[:, 0] - exact_log_z()) / results[:, 1]
    assert np.sqrt(np.mean(pulls**2)) == pytest.approx(1.02, abs=0.09)
    naive = np.array([bennett(*pair) for pair in pairs[:100]])
    assert np.all(naive[:, 0] == results[:100, 0])
    assert np.mean(results[:100, 1] / naive[:, 1]) > 1.5


def test_error_of_replica_is_that_of_the_linearised_equation(ar1):
    proposals, _ = both_sides((300, 1), 1.0)
    targets = log_weights(1.0 + ar1(0.8, (3, 500), seed=5), 1.0)
    value, error = bennett(proposals, targets, correlated=True)
    u_q, u_p = (logs - value + np.log(1500 / 300) for logs in (proposals, targets))
    left, right = expit(u_q), expit(-u_p)
    assert left.sum() == pytest.approx(right.sum(), rel=1e-10)
    variance = 300 * left.var() + (1500 * gamma_method(right).error) ** 2
    slope = np.sum(left * (1 - left)) + np.sum(right * (1 - right))
    assert error == pytest.approx(np.sqrt(variance) / slope, rel=1e-10)


def test_independent_error_agrees_with_the_formula_of_bennett():
    """``1/D - 1/n_q - 1/n_p``; equal up to statistical noise."""
    proposals, targets = both_sides((20_000, 30_000), 1.0)
    value, error = bennett(proposals, targets)
    u = np.concatenate([proposals, targets]) - value + np.log(1.5)
    formula = 1 / np.sum(expit(u) * expit(-u)) - 1 / 20_000 - 1 / 30_000
    assert error == pytest.approx(np.sqrt(formula), rel=0.03)


def test_smaller_error_than_from_the_proposals_alone_and_the_same_value():
    """From the same 5000 proposals; the value may differ by the larger error, here times five."""
    proposals, targets = both_sides((5000, 5000), 1.5)
    (value, error), (alone, error_alone) = bennett(proposals, targets), log_z(proposals)
    assert error < 0.5 * error_alone
    assert abs(value - alone) < 5 * error_alone


@pytest.mark.parametrize("sizes", [(100, 100), (40, 700), (5, 1)])
def test_a_perfect_proposal_has_no_error(sizes):
    value, error = bennett(np.full(sizes[0], -3.7), np.full(sizes[1], -3.7))
    assert value == pytest.approx(-3.7, abs=1e-11)
    assert error == pytest.approx(0, abs=1e-15)


def test_nearly_perfect_proposals_have_the_error_of_their_small_spread():
    """Width ``e`` of ``l``: with equal sizes the error is ``e / sqrt(4 n) sqrt(2)``, which is far above rounding."""
    noise = 1e-5 * np.random.default_rng(6).normal(size=(2, 10_000))
    _, error = bennett(*noise)
    assert error == pytest.approx(1e-5 * np.sqrt(2 / 40_000), rel=0.05)


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_a_shift_of_the_action_is_a_shift_of_log_z(shift):
    proposals, targets = both_sides((300, 200), 1.0)
    value, error = bennett(proposals, targets)
    assert bennett(proposals + shift, targets + shift) == (pytest.approx(value + shift), pytest.approx(error, rel=1e-6))


def test_samples_without_overlap_have_an_honest_error():
    """Shift 8: the 100 samples of either side do not meet, and the true value still lies within the error."""
    value, error = bennett(*both_sides((100, 100), 8.0))
    assert error > 3
    assert abs(value - exact_log_z()) < error


def test_no_overlap_at_all_gives_an_infinite_error_and_no_overflow():
    value, error = bennett(np.linspace(-1, 1, 30) - 1e4, np.linspace(-1, 1, 20) + 1e4)
    assert abs(value) < 1e4 + 10
    assert error == np.inf


def test_sets_that_contradict_each_other_do_not_overflow():
    """Proposals weigh more than target samples, which no distributions allow: ``<l>_q <= log Z <= <l>_p``."""
    value, error = bennett(np.full(30, 1e4), np.full(30, -1e4))
    assert abs(value) < 1e4 + 10
    assert error == np.inf


def test_proposals_of_weight_zero_count():
    """Half the proposals outside a target that is a constant 1 on the other half: ``Z`` is one half."""
    logs = np.tile([0.0, -np.inf], 2000)
    value, error = bennett(logs, np.zeros(4000))
    assert abs(value - np.log(0.5)) < 5 * error
    assert 0 < error < 0.03


@pytest.mark.parametrize(
    ("proposals", "targets", "message"),
    [
        ([0.0, np.nan], [0.0], "log_weights_of_proposals must not hold nan, found at index 1"),
        ([0.0, np.inf], [0.0], "log_weights_of_proposals must not hold inf, found at index 1"),
        ([-np.inf, -np.inf], [0.0], "every weight is zero"),
        ([0.0], [0.0, 1.0, -np.inf], "log_weights_of_target_samples must not hold -inf, found at index 2"),
        ([0.0], [], "log_weights_of_target_samples must hold at least one sample"),
        ([], [0.0], "log_weights_of_proposals must hold at least one sample"),
    ],
)
def test_bad_log_weights_are_refused(proposals, targets, message):
    with pytest.raises(ValueError, match=message):
        bennett(proposals, targets)


def test_too_few_correlated_samples_are_refused():
    with pytest.raises(ValueError, match="at least 4 samples"):
        bennett(np.zeros(5), np.zeros(3), correlated=True)


def test_free_energy_difference_has_the_sign_of_minus_log_z():
    wide, narrow = np.full(10, 2.0), np.full(10, -1.0)
    assert free_energy_difference(wide, narrow) == (pytest.approx(3), 0)
    assert free_energy_difference(wide, narrow, paired=True) == (pytest.approx(3), 0)


@pytest.mark.parametrize("paired", [True, False])
def test_free_energy_difference_is_calibrated(paired):
    """2000 repeats, widths known to 0.016, band of four (rate 6e-5)."""
    x = np.random.default_rng(7).normal(size=(2, 2000, 1000))
    a, b = log_weights(x[0], 0.4, 0.8), log_weights(x[0 if paired else 1], 0.6, 0.9)
    results = np.array([free_energy_difference(*pair, paired=paired) for pair in zip(a, b, strict=True)])
    pulls = (results[:, 0] - (exact_log_z(0.8) - exact_log_z(0.9))) / results[:, 1]
    assert np.sqrt(np.mean(pulls**2)) == pytest.approx(1, abs=0.064)


def test_what_paired_weights_have_in_common_cancels():
    x = np.random.default_rng(8).normal(size=2000)
    a, b = log_weights(x, 1.0), log_weights(x, 1.05)
    (independent, error), (paired, paired_error) = (free_energy_difference(a, b, paired=p) for p in (False, True))
    assert independent == paired
    assert paired_error < 0.1 * error
    assert free_energy_difference(a, a, paired=True) == (0, 0)
    assert error == pytest.approx(np.hypot(log_z(a)[1], log_z(b)[1]))


def test_paired_weights_of_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match=r"one shape, found \(3,\) and \(4,\)"):
        free_energy_difference(np.zeros(3), np.zeros(4), paired=True)
    with pytest.raises(ValueError, match="nan, found at index 1"):
        free_energy_difference(np.zeros(3), np.array([0.0, np.nan]))
