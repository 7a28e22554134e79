import numpy as np
import pytest

from latticeflow.stats import split_r_hat, thermalisation_cut


def test_split_r_hat_in_closed_form():
    """Halves (0,2), (1,3), (2,4), (5,7): every variance is 2, the means 1, 2, 3, 6 have variance 14/3."""
    assert split_r_hat([[0.0, 2, 1, 3], [2.0, 4, 5, 7]]) == pytest.approx(np.sqrt(0.5 + 14 / 3 / 2))


def test_odd_sample_in_the_middle_is_left_out():
    assert split_r_hat([[0.0, 2, 99, 1, 3], [2.0, 4, -99, 5, 7]]) == split_r_hat([[0.0, 2, 1, 3], [2.0, 4, 5, 7]])


def test_independent_chains_are_close_to_one():
    """``R^2 - 1`` is some ``1/n`` in size; 0.002 is over five standard deviations at n = 5000 and eight halves."""
    chains = np.random.default_rng(1).normal(size=(4, 10_000))
    assert abs(split_r_hat(chains) - 1) < 0.002


def test_shifted_chain_and_drift_are_seen():
    chains = np.random.default_rng(2).normal(size=(4, 1000))
    assert split_r_hat(chains + np.array([[1.0], [0], [0], [0]])) > 1.05
    assert split_r_hat(chains[0] + np.linspace(0, 2, 1000)) > 1.05


def test_chains_that_stand_still():
    assert split_r_hat(np.full((2, 10), 0.1)) == 1
    assert split_r_hat([np.full(10, 0.1), np.full(10, 0.3)]) == np.inf


def test_unequal_chains_and_nan_are_refused():
    with pytest.raises(ValueError, match=r"one length, found \[5, 6\]"):
        split_r_hat([np.zeros(5), np.zeros(6)])
    with pytest.raises(ValueError, match="found at index 4"):
        split_r_hat([0.0, 1.0, 2.0, 3.0, np.nan])


def test_cut_lies_where_the_relaxation_ends():
    """A start at 20 sigma that decays in 50 steps is below one sigma after 150 steps, below a tenth after 265."""
    noise = np.random.default_rng(3).normal(size=5000)
    assert 100 < thermalisation_cut(noise + 20 * np.exp(-np.arange(5000) / 50)) < 400


def test_cut_minimises_the_naive_error_of_the_rest():
    series = np.random.default_rng(4).normal(size=60) + 3 * np.exp(-np.arange(60) / 5)
    series[-1] += 2
    errors = [series[cut:].var() / (60 - cut) for cut in range(31)]
    assert thermalisation_cut(series) == np.argmin(errors)


def test_equilibrium_is_left_alone():
    """100 stationary series: the mean share that is cut is a few per cent, and a tenth would be a defect."""
    series = np.random.default_rng(5).normal(size=(100, 2000))
    assert np.mean([thermalisation_cut(row) for row in series]) < 200
    assert all(thermalisation_cut(np.full(n, 0.1)) == 0 for n in range(4, 60))


def test_cut_takes_one_chain():
    with pytest.raises(ValueError, match="one chain"):
        thermalisation_cut(np.zeros((2, 10)))
