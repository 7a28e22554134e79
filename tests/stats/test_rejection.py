import numpy as np
import pytest

from latticeflow.stats import longest_rejection_run, rejection_tau
from latticeflow.stats.rejection import rejection_runs


def test_runs_are_counted_at_both_ends():
    assert rejection_runs([0, 0, 1, 0, 1, 1, 0, 0, 0]).tolist() == [2, 1, 3]
    assert rejection_runs([1, 1]).tolist() == []


@pytest.mark.parametrize("rate", [0.2, 0.7])
def test_tau_is_the_direct_count_of_rejected_stretches(rate):
    accepted = np.random.default_rng(1).random(60) < rate
    shares = [np.mean([not accepted[i : i + t].any() for i in range(61 - t)]) for t in range(1, 61)]
    assert rejection_tau(accepted) == pytest.approx(0.5 + sum(shares), rel=1e-12)


def test_constant_acceptance_has_a_geometric_tau():
    """``rho(t) = (1-A)^t``, so ``tau = 1/2 + (1-A)/A``; 2 per cent is over five standard deviations at 400000 steps."""
    accepted = np.random.default_rng(2).random((4, 100_000)) < 0.3
    assert rejection_tau(accepted) == pytest.approx(0.5 + 0.7 / 0.3, rel=0.02)


def test_several_chains_do_not_join_their_runs():
    chains = np.array([[True, False, False], [False, True, True]])
    assert longest_rejection_run(chains) == 2
    assert longest_rejection_run(chains.ravel()) == 3
    assert rejection_tau(chains) == pytest.approx(0.5 + 3 / 6 + 1 / 4)


def test_extremes():
    assert rejection_tau(np.ones(10, dtype=bool)) == 0.5
    assert longest_rejection_run(np.ones(10, dtype=bool)) == 0
    assert rejection_tau(np.zeros(10, dtype=bool)) == pytest.approx(10.5)
    assert longest_rejection_run(np.zeros(10, dtype=bool)) == 10


def test_other_input_is_refused():
    with pytest.raises(ValueError, match=r"must hold booleans, found 0\.5"):
        rejection_tau([0.5, 1.0])
    with pytest.raises(ValueError, match=r"found shape \(0,\)"):
        rejection_tau([])
