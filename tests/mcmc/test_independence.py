"""Independence Metropolis on a finite set, where everything is known exactly.

Means compare at five standard deviations (false-alarm rate 6e-7 each), chi^2 and T^2 statistics fail below a p-value
of 1e-4, which is their false-alarm rate; seeds are fixed.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chi2, chisquare, multinomial
from scipy.stats import f as f_distribution
from torch import nn
from torch.testing import assert_close

from latticeflow.actions import Action
from latticeflow.mcmc import ChainState, IndependenceMetropolis, Kernel
from latticeflow.stats import gamma_method, predicted_acceptance

P = np.array([0.05, 0.10, 0.15, 0.30, 0.40])
Q = np.array([0.35, 0.25, 0.20, 0.15, 0.05])
STATES = len(P)
FALSE_ALARM = 1e-4
LOG_Z = 7.0


class TableSampler(nn.Module):
    """Draws states 0, 1, ... as fields `(n, 1)` with the probabilities of a table; notes how many it is asked for."""

    def __init__(self, probabilities):
        super().__init__()
        self.probabilities = torch.tensor(probabilities, dtype=torch.float64)
        self.asked = []

    def sample(self, n, generator=None):
        self.asked.append(n)
        x = torch.multinomial(self.probabilities, n, replacement=True, generator=generator)[:, None].double()
        return x, self.log_prob(x)

    def log_prob(self, x):
        return self.probabilities.log()[x[:, 0].long()]


class TableAction(Action):
    """`S = -log p - log Z` of a table of probabilities; an entry NaN, 0 or infinite gives such a weight."""

    def __init__(self, probabilities):
        self.log_probabilities = torch.tensor(probabilities, dtype=torch.float64).log()

    def __call__(self, field):
        return -self.log_probabilities[field[:, 0].long()] - LOG_Z

    def field_shape(self, shape):
        return (1,)


def transition_matrix(p=P, q=Q):
    """Return `P_ij = q_j min(1, w_j / w_i)`, what is left over staying at i."""
    weight = p / q
    matrix = q * np.minimum(1, weight / weight[:, None])
    np.fill_diagonal(matrix, 0)
    np.fill_diagonal(matrix, 1 - matrix.sum(1))
    return matrix


def exact_tau(f):
    """Return `f D Z f / f D f - 1/2`, `Z = (1 - P + 1 p)^-1`, f centred, `D = diag(p)`."""
    f = f - P @ f
    z = np.linalg.inv(np.eye(STATES) - transition_matrix() + P)
    return (f * P) @ z @ f / ((f * P) @ f) - 0.5


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def kernel(p=P, q=Q, **options):
    return IndependenceMetropolis(TableSampler(q), TableAction(p), **options)


def placed(kernel, states):
    """Return a chain state with these states, one per replica."""
    field = torch.as_tensor(states)[:, None].double()
    log_q, orbit = kernel.sampler.log_prob(field), kernel.action.orbit(field)
    return ChainState(field, orbit, log_q, -orbit[:, 0] - log_q)


def drawn_from(p, n, seed):
    return torch.multinomial(torch.tensor(p), n, replacement=True, generator=seeded(seed))


def states_of(chain_state):
    return chain_state.field[:, 0].long().numpy()


@pytest.fixture(scope="module")
def history():
    """Return states, acceptance and proposed log weights, `(replica, steps)`, of chains that start in equilibrium."""
    metropolis, draws = kernel(), seeded(1)
    state, columns = placed(metropolis, drawn_from(P, 128, 2)), []
    for _ in range(2500):
        state, info = metropolis.step(state, draws)
        columns.append((states_of(state), info.accepted.numpy(), info.proposals["log_weight"].numpy()))
    return [np.stack(column, axis=1) for column in zip(*columns, strict=True)]


# ---------------------------------------------------------------- the law


def test_one_step_has_the_exact_transition_probabilities():
    """Replica are independent, so pairs (before, after) are multinomial with `p_i P_ij`; chi^2, 24 degrees."""
    metropolis, replica = kernel(), 40_000
    before = drawn_from(P, replica, 3)
    after = states_of(metropolis.step(placed(metropolis, before), seeded(4))[0])
    counts = np.bincount(STATES * before.numpy() + after, minlength=STATES**2)
    expected = (P[:, None] * transition_matrix()).ravel()
    possible = expected > 0
    assert not counts[~possible].any()
    assert chisquare(counts[possible], replica * expected[possible]).pvalue > FALSE_ALARM


@pytest.mark.parametrize(("first", "steps"), [(4, 1), (4, 3), (0, 2)])
def test_law_after_some_steps_from_a_given_state(first, steps):
    metropolis, replica, draws = kernel(), 40_000, seeded(5)
    state = placed(metropolis, torch.full((replica,), first))
    for _ in range(steps):
        state, _ = metropolis.step(state, draws)
    expected = np.linalg.matrix_power(transition_matrix(), steps)[first]
    counts = np.bincount(states_of(state), minlength=STATES)
    assert chisquare(counts, replica * expected).pvalue > FALSE_ALARM
    assert chisquare(counts, replica * P).pvalue < FALSE_ALARM


def test_long_chains_have_the_law_of_the_target(history):
    """T^2 of the replica's mean occupations: their spread contains all autocorrelation."""
    occupations = np.stack([(history[0] == state).mean(1) for state in range(STATES - 1)], axis=1)
    n, d = occupations.shape
    difference = occupations.mean(0) - P[:-1]
    t2 = difference @ np.linalg.solve(np.cov(occupations.T) / n, difference)
    assert f_distribution.sf(t2 * (n - d) / (d * (n - 1)), d, n - d) > FALSE_ALARM
    assert np.abs(difference).max() < 0.02


@pytest.mark.parametrize("f", [np.arange(STATES), np.eye(STATES)[4], np.eye(STATES)[0], np.array([1, -1, 1, -1, 1])])
def test_autocorrelation_time_is_the_exact_one(history, f):
    result = gamma_method(f[history[0]].astype(float))
    exact = exact_tau(f.astype(float))
    assert abs(result.tau_int - exact) < 5 * result.tau_int_error
    assert result.tau_int_error < 0.05 * exact
    assert abs(result.mean - P @ f) < 5 * result.error


def test_exact_tau_of_a_perfect_and_of_a_two_state_chain():
    """The oracle itself: `rho(t) = lambda^t` gives `(1 + lambda) / (2 (1 - lambda))` for an eigenvector."""
    values, vectors = np.linalg.eig(transition_matrix())
    for value, vector in zip(values, vectors.T, strict=True):
        if value < 1 - 1e-9:
            assert exact_tau(vector) == pytest.approx((1 + value) / (2 * (1 - value)))
    assert exact_tau(np.arange(STATES)) > 2


def test_acceptance_is_the_exact_and_the_predicted_one(history):
    _, accepted, proposed = history
    weight = P / Q
    exact = (P[:, None] * Q * np.minimum(1, weight / weight[:, None])).sum()
    measured = gamma_method(accepted.astype(float))
    assert abs(measured.mean - exact) < 5 * measured.error
    assert measured.error < 0.01
    predicted = predicted_acceptance(proposed)
    batches = [predicted_acceptance(part) for part in proposed]
    assert abs(predicted - exact) < 5 * np.std(batches) / math.sqrt(len(batches))
    assert abs(measured.mean - predicted) < 5 * math.hypot(measured.error, np.std(batches) / math.sqrt(len(batches)))


def test_perfect_proposals_are_always_accepted():
    metropolis = kernel(q=P)
    _, info = metropolis.step(placed(metropolis, drawn_from(P, 2000, 6)), seeded(7))
    assert info.accepted.all()
    assert_close(info.proposals["log_weight"], torch.full((2000,), LOG_Z, dtype=torch.float64))


def test_step_takes_the_proposal_where_it_accepts_and_keeps_the_state_elsewhere():
    metropolis = kernel()
    state = placed(metropolis, drawn_from(P, 500, 8))
    after, info = metropolis.step(state, seeded(9))
    accepted = info.accepted
    assert 0.2 < accepted.double().mean() < 0.8
    assert torch.equal(after.log_weight, torch.where(accepted, info.proposals["log_weight"], state.log_weight))
    for name in ("field", "orbit", "log_q"):
        assert torch.equal(getattr(after, name)[~accepted], getattr(state, name)[~accepted])
    again = placed(metropolis, after.field[:, 0])
    for name in ("orbit", "log_q", "log_weight", "action"):
        assert_close(getattr(after, name), getattr(again, name))
    assert (info.proposals["log_weight"] >= state.log_weight)[accepted].any()
    assert accepted[info.proposals["log_weight"] >= state.log_weight].all()
    assert info.bad == 0


# ---------------------------------------------------------------- starting states


def resampling_law(candidates):
    """Return the exact law of a state resampled by weight from this number m of draws.

    `E[n_i w_i / sum_j n_j w_j]` over multinomial occupation numbers n, all of them summed.
    """
    bars = np.array(list(itertools.combinations(range(candidates + STATES - 1), STATES - 1)))
    ends = np.pad(bars, ((0, 0), (1, 1)), constant_values=((0, 0), (-1, candidates + STATES - 1)))
    occupation, weight = np.diff(ends, axis=1) - 1, P / Q
    chance = multinomial(candidates, Q).pmf(occupation)
    return chance @ (occupation * weight / (occupation @ weight)[:, None])


def start_counts(candidates, starts, seed):
    metropolis, draws = kernel(candidates=candidates), seeded(seed)
    return np.bincount([int(metropolis.start(1, draws).field) for _ in range(starts)], minlength=STATES)


@pytest.mark.parametrize("candidates", [1, 2, 4, 40])
def test_starts_have_the_resampling_law(candidates):
    starts, expected = 2500, resampling_law(candidates)
    counts = start_counts(candidates, starts, 10)
    assert chisquare(counts, starts * expected).pvalue > FALSE_ALARM
    unlike = P if candidates < 10 else Q
    assert chisquare(counts, starts * unlike).pvalue < FALSE_ALARM


def test_resampling_law_is_the_target_up_to_one_over_the_candidates():
    """`p (1 + (E_p[w] - w) / m)` to first order, w of mean one: for 1024 candidates less than 1 percent off."""
    weight, laws = P / Q, {m: resampling_law(m) for m in (1, 20, 40)}
    assert_close(torch.tensor(laws[1]), torch.tensor(Q))
    distances = [np.abs(laws[m] - P).max() for m in (20, 40)]
    remainders = [np.abs(laws[m] - P * (1 + (P @ weight - weight) / m)).max() for m in (20, 40)]
    assert distances[1] == pytest.approx(distances[0] / 2, rel=0.2)
    assert remainders[1] < 0.4 * remainders[0]


def test_start_is_a_consistent_state_of_the_wanted_size():
    metropolis = kernel(candidates=600)
    state = metropolis.start(7, seeded(12))
    assert state.field.shape == (7, 1)
    assert sum(metropolis.sampler.asked) == 600
    assert max(metropolis.sampler.asked) <= 256
    again = placed(metropolis, state.field[:, 0])
    for name in ("orbit", "log_q", "log_weight", "action"):
        assert_close(getattr(state, name), getattr(again, name))


def test_more_replica_than_candidates():
    metropolis = kernel(candidates=2)
    assert metropolis.start(300, seeded(13)).field.shape == (300, 1)
    assert sum(metropolis.sampler.asked) == 300


# ---------------------------------------------------------------- weights that are not finite

BAD = np.array([0.2, 0.3, math.nan, 0.0, math.inf])
RESTRICTED = np.array([0.4, 0.6, 0.0, 0.0, 0.0])


def test_non_finite_weights_are_counted_and_never_accepted():
    """Zero, NaN and infinite densities alike; on the rest the law is the target's."""
    metropolis, draws, replica = kernel(p=BAD), seeded(14), 20_000
    state = placed(metropolis, torch.full((replica,), 1))
    for _ in range(12):
        before = state
        state, info = metropolis.step(state, draws)
        bad = torch.isneginf(info.proposals["log_weight"])
        assert info.bad == bad.sum() == pytest.approx(replica * Q[2:].sum(), rel=0.1)
        assert not info.accepted[bad].any()
        assert torch.equal(state.field[bad], before.field[bad])
        assert torch.isfinite(state.log_weight).all()
    counts = np.bincount(states_of(state), minlength=STATES)
    assert not counts[2:].any()
    statistic = (counts[0] - 0.4 * replica) ** 2 / (replica * 0.4 * 0.6)
    assert chi2.sf(statistic, 1) > FALSE_ALARM


def test_start_avoids_non_finite_weights():
    state = kernel(p=BAD).start(200, seeded(15))
    assert set(states_of(state)) == {0, 1}


def test_start_without_any_finite_weight_is_refused():
    with pytest.raises(ValueError, match="none of 1024 proposals has a finite weight"):
        kernel(p=np.full(STATES, math.nan)).start(4, seeded(16))


# ---------------------------------------------------------------- the protocol


def test_a_step_fills_the_columns_that_it_announces():
    metropolis = kernel()
    _, info = metropolis.step(metropolis.start(3, seeded(23)), seeded(24))
    assert isinstance(metropolis, Kernel)
    assert {name: values.dtype for name, values in info.history.items()} == metropolis.history
    assert tuple(info.proposals) == metropolis.proposals
    assert all(values.shape == (3,) for values in [*info.history.values(), *info.proposals.values()])


def test_history_is_that_of_the_state_after_the_step():
    metropolis = kernel()
    after, info = metropolis.step(placed(metropolis, drawn_from(P, 50, 25)), seeded(26))
    assert torch.equal(info.history["log_q"], after.log_q)
    assert torch.equal(info.history["log_weight"], after.log_weight)


def test_a_state_that_another_kernel_moved_is_weighed_afresh():
    """Without `log_q` the step is the one with it, bit for bit; a step from such a state has the exact law."""
    metropolis, before = kernel(), drawn_from(P, 40_000, 27)
    known = placed(metropolis, before)
    unknown = ChainState(known.field, known.orbit)
    for first, second in zip(*(metropolis.step(state, seeded(28)) for state in (known, unknown)), strict=True):
        for column in ("field", "orbit", "log_q", "log_weight") if isinstance(first, ChainState) else ("accepted",):
            assert torch.equal(getattr(first, column), getattr(second, column))
    counts = np.bincount(states_of(metropolis.step(unknown, seeded(29))[0]), minlength=STATES)
    assert chisquare(counts, 40_000 * P).pvalue > FALSE_ALARM


def test_stored_weights_are_believed():
    """Nothing is evaluated again where the state knows its weight: with an infinite one it never moves."""
    metropolis = kernel()
    state = placed(metropolis, drawn_from(P, 50, 30))
    stuck = replace(state, log_weight=torch.full((50,), math.inf, dtype=torch.float64))
    assert not metropolis.step(stuck, seeded(31))[1].accepted.any()


def test_it_has_nothing_to_tune():
    metropolis = kernel()
    metropolis.tune(metropolis.step(metropolis.start(3, seeded(32)), seeded(33))[1])
    assert metropolis.parameters == {}
    metropolis.parameters = {}
    with pytest.raises(ValueError, match=r"kernel independence has no parameters, got \['step_size'\]"):
        metropolis.parameters = {"step_size": 0.1}
