"""Independence Metropolis: on a finite set, where everything is known exactly, and on the 4x4 Schwinger model.

Means compare at five standard deviations (false-alarm rate 6e-7 each), chi^2 and T^2 statistics fail below a p-value
of 1e-4, which is their false-alarm rate; seeds are fixed.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import chi2, chisquare, multinomial
from scipy.stats import f as f_distribution
from torch import nn
from torch.testing import assert_close

from latticeflow.actions import Action, HolonomyMarginal, SchwingerAction, U1Action
from latticeflow.flows import Sequential, gauge_flow
from latticeflow.mcmc import ChainState, IndependenceMetropolis
from latticeflow.observables import observables
from latticeflow.priors import HaarUniform, QuenchedU1
from latticeflow.samplers import FlowSampler
from latticeflow.stats import gamma_method, predicted_acceptance
from latticeflow.u1 import polyakov_loop

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


class Tilted(nn.Module):
    """Quenched draws whose stated density depends on a holonomy, consistently in `sample` and `log_prob`."""

    def __init__(self, strength):
        super().__init__()
        self.prior, self.strength = QuenchedU1(1.0, (4, 4)), strength

    def sample(self, n, generator=None):
        x = self.prior.sample(n, generator)
        return x, self.log_prob(x)

    def log_prob(self, x):
        return self.prior.log_prob(x) + self.strength * torch.cos(polyakov_loop(x, 0)).mean(-1)


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


def generator(seed):
    return torch.Generator().manual_seed(seed)


def kernel(p=P, q=Q, **options):
    return IndependenceMetropolis(TableSampler(q), TableAction(p), **options)


def placed(kernel, states):
    """Return a chain state with these states, one per replica."""
    field = torch.as_tensor(states)[:, None].double()
    log_q, orbit = kernel.sampler.log_prob(field), kernel.action.orbit(field)
    return ChainState(field, orbit, log_q, -orbit[:, 0] - log_q)


def drawn_from(p, n, seed):
    return torch.multinomial(torch.tensor(p), n, replacement=True, generator=generator(seed))


def states_of(chain_state):
    return chain_state.field[:, 0].long().numpy()


@pytest.fixture(scope="module")
def history():
    """Return states, acceptance and proposed log weights, `(replica, steps)`, of chains that start in equilibrium."""
    metropolis, draws = kernel(), generator(1)
    state, columns = placed(metropolis, drawn_from(P, 128, 2)), []
    for _ in range(2500):
        state, info = metropolis.step(state, draws)
        columns.append((states_of(state), info.accepted.numpy(), info.proposal_log_weight.numpy()))
    return [np.stack(column, axis=1) for column in zip(*columns, strict=True)]


# ---------------------------------------------------------------- the law


def test_one_step_has_the_exact_transition_probabilities():
    """Replica are independent, so pairs (before, after) are multinomial with `p_i P_ij`; chi^2, 24 degrees."""
    metropolis, replica = kernel(), 40_000
    before = drawn_from(P, replica, 3)
    after = states_of(metropolis.step(placed(metropolis, before), generator(4))[0])
    counts = np.bincount(STATES * before.numpy() + after, minlength=STATES**2)
    expected = (P[:, None] * transition_matrix()).ravel()
    possible = expected > 0
    assert not counts[~possible].any()
    assert chisquare(counts[possible], replica * expected[possible]).pvalue > FALSE_ALARM


@pytest.mark.parametrize(("first", "steps"), [(4, 1), (4, 3), (0, 2)])
def test_law_after_some_steps_from_a_given_state(first, steps):
    metropolis, replica, draws = kernel(), 40_000, generator(5)
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
    _, info = metropolis.step(placed(metropolis, drawn_from(P, 2000, 6)), generator(7))
    assert info.accepted.all()
    assert_close(info.proposal_log_weight, torch.full((2000,), LOG_Z, dtype=torch.float64))


def test_step_takes_the_proposal_where_it_accepts_and_keeps_the_state_elsewhere():
    metropolis = kernel()
    state = placed(metropolis, drawn_from(P, 500, 8))
    after, info = metropolis.step(state, generator(9))
    accepted = info.accepted
    assert 0.2 < accepted.double().mean() < 0.8
    assert torch.equal(after.log_weight, torch.where(accepted, info.proposal_log_weight, state.log_weight))
    for name in ("field", "orbit", "log_q"):
        assert torch.equal(getattr(after, name)[~accepted], getattr(state, name)[~accepted])
    again = placed(metropolis, after.field[:, 0])
    for name in ("orbit", "log_q", "log_weight", "action"):
        assert_close(getattr(after, name), getattr(again, name))
    assert (info.proposal_log_weight >= state.log_weight)[accepted].any()
    assert accepted[info.proposal_log_weight >= state.log_weight].all()
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
    metropolis, draws = kernel(candidates=candidates), generator(seed)
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
    state = metropolis.start(7, generator(12))
    assert state.field.shape == (7, 1)
    assert sum(metropolis.sampler.asked) == 600
    assert max(metropolis.sampler.asked) <= 256
    again = placed(metropolis, state.field[:, 0])
    for name in ("orbit", "log_q", "log_weight", "action"):
        assert_close(getattr(state, name), getattr(again, name))


def test_more_replica_than_candidates():
    metropolis = kernel(candidates=2)
    assert metropolis.start(300, generator(13)).field.shape == (300, 1)
    assert sum(metropolis.sampler.asked) == 300


# ---------------------------------------------------------------- weights that are not finite

BAD = np.array([0.2, 0.3, math.nan, 0.0, math.inf])
RESTRICTED = np.array([0.4, 0.6, 0.0, 0.0, 0.0])


def test_non_finite_weights_are_counted_and_never_accepted():
    """Zero, NaN and infinite densities alike; on the rest the law is the target's."""
    metropolis, draws, replica = kernel(p=BAD), generator(14), 20_000
    state = placed(metropolis, torch.full((replica,), 1))
    for _ in range(12):
        before = state
        state, info = metropolis.step(state, draws)
        bad = torch.isneginf(info.proposal_log_weight)
        assert info.bad == bad.sum() == pytest.approx(replica * Q[2:].sum(), rel=0.1)
        assert not info.accepted[bad].any()
        assert torch.equal(state.field[bad], before.field[bad])
        assert torch.isfinite(state.log_weight).all()
    counts = np.bincount(states_of(state), minlength=STATES)
    assert not counts[2:].any()
    statistic = (counts[0] - 0.4 * replica) ** 2 / (replica * 0.4 * 0.6)
    assert chi2.sf(statistic, 1) > FALSE_ALARM


def test_start_avoids_non_finite_weights():
    state = kernel(p=BAD).start(200, generator(15))
    assert set(states_of(state)) == {0, 1}


def test_start_without_any_finite_weight_is_refused():
    with pytest.raises(ValueError, match="none of 1024 proposals has a finite weight"):
        kernel(p=np.full(STATES, math.nan)).start(4, generator(16))


# ---------------------------------------------------------------- the Schwinger model

TRUSTED = {  # PHYSICS.md, section 4: 4x4, beta 2, kappa 0.276
    "plaquette": (0.76341, 0.00020),
    "topological_susceptibility": (0.003547, 0.000022),
    "condensate": (1.46807, 0.00018),
}


@pytest.fixture(scope="module")
def schwinger():
    """Return the series `(replica, steps)` of observables, of acceptance and proposed log weights, and the end."""
    action = HolonomyMarginal(SchwingerAction(2.0, 0.276), grid=(4, 2))
    sampler = FlowSampler(QuenchedU1(2.35, (4, 4), sector=0.6), Sequential())
    metropolis, draws = IndependenceMetropolis(sampler, action), generator(17)
    wanted = {name: o for name, o in observables(action).items() if name in TRUSTED}
    state, series = metropolis.start(256, draws), {name: [] for name in (*wanted, "accepted", "proposed")}
    for _ in range(90):
        state, info = metropolis.step(state, draws)
        for name, observable in wanted.items():
            series[name].append(observable(state.field).numpy())
        series["accepted"].append(info.accepted.numpy())
        series["proposed"].append(info.proposal_log_weight.numpy())
    return {name: np.stack(columns, axis=1).astype(float) for name, columns in series.items()}, action, state


@pytest.mark.parametrize("name", TRUSTED)
def test_schwinger_observables_are_the_trusted_ones(schwinger, name):
    """Four standard deviations, both errors combined: false-alarm rate 6e-5 each."""
    value, error = TRUSTED[name]
    result = gamma_method(schwinger[0][name])
    assert abs(result.mean - value) < 4 * math.hypot(error, result.error)
    assert result.error < 0.05 * value


def test_schwinger_acceptance_is_the_predicted_one(schwinger):
    """The prediction's error, from blocks of replica, is combined with the measured one."""
    series = schwinger[0]
    measured = gamma_method(series["accepted"])
    blocks = [predicted_acceptance(block) for block in np.split(series["proposed"], 16)]
    error = math.hypot(measured.error, np.std(blocks) / math.sqrt(len(blocks) - 1))
    assert abs(measured.mean - predicted_acceptance(series["proposed"])) < 5 * error
    assert error < 0.01
    assert measured.mean > 0.4


def test_schwinger_states_stay_consistent_along_the_chain(schwinger):
    """The stored orbits are those of the stored fields, after all shifts and index permutations."""
    _, action, state = schwinger
    assert_close(state.orbit, action.orbit(state.field), rtol=0, atol=1e-9)
    assert_close(state.action, action.action(state.field), rtol=0, atol=1e-9)
    assert_close(state.log_weight, -action(state.field) - state.log_q, rtol=0, atol=1e-9)


def test_holonomies_follow_the_action_along_the_orbit(schwinger):
    """An element drawn with probability `p_g` has `E[p_g] = E[sum_g p_g^2]`, above 1/8, the mean over all elements."""
    orbit = schwinger[2].orbit.flatten(1)
    probability = torch.softmax(-orbit, dim=1)
    expected, variance = (probability**2).sum(1), (probability**3).sum(1) - (probability**2).sum(1) ** 2
    error = math.sqrt(variance.sum()) / len(orbit)
    assert abs(probability[:, 0].mean() - expected.mean()) < 5 * error
    assert expected.mean() > 1 / 8 + 10 * error


@pytest.mark.parametrize("strength", [0.1, 1.0])
def test_start_refuses_a_sampler_that_sees_holonomies(strength):
    marginal = HolonomyMarginal(SchwingerAction(1.0, 0.2), grid=(4, 2))
    with pytest.raises(ValueError, match=r"log q changes by up to .* along holonomy orbits"):
        IndependenceMetropolis(Tilted(strength), marginal).start(16, generator(18))


@pytest.mark.parametrize("action", [SchwingerAction(1.0, 0.2), HolonomyMarginal(U1Action(1.0), grid=(1, 1))])
def test_such_a_sampler_may_serve_an_action_without_orbits(action):
    assert IndependenceMetropolis(Tilted(1.0), action).start(16, generator(18)).field.shape == (16, 2, 4, 4)


# ---------------------------------------------------------------- reproducibility and precision


def test_same_seed_same_chain():
    runs = []
    for seed in (19, 19, 20):
        action = HolonomyMarginal(SchwingerAction(1.0, 0.2), grid=(2, 2))
        metropolis = IndependenceMetropolis(FlowSampler(QuenchedU1(1.0, (4, 4)), Sequential()), action, candidates=64)
        draws, infos = generator(seed), []
        state = metropolis.start(8, draws)
        for _ in range(3):
            state, info = metropolis.step(state, draws)
            infos.append(info)
        runs.append((state, infos))
    for name in ("field", "orbit", "log_q", "log_weight"):
        assert torch.equal(getattr(runs[0][0], name), getattr(runs[1][0], name))
    assert not torch.equal(runs[0][0].field, runs[2][0].field)
    for first, second in zip(runs[0][1], runs[1][1], strict=True):
        assert torch.equal(first.accepted, second.accepted)
        assert torch.equal(first.proposal_log_weight, second.proposal_log_weight)


def test_single_precision_flow_in_a_double_precision_chain():
    sampler = FlowSampler(HaarUniform((4, 4)), gauge_flow((4, 4), layers=2, hidden=[4])).float()
    metropolis = IndependenceMetropolis(sampler, U1Action(0.5), candidates=64)
    state, info = metropolis.step(metropolis.start(8, generator(21)), generator(22))
    for tensor in (state.field, state.orbit, state.log_q, state.log_weight, info.proposal_log_weight):
        assert tensor.dtype == torch.float64
        assert not tensor.requires_grad
    assert_close(state.log_weight, -U1Action(0.5)(state.field) - state.log_q, rtol=0, atol=1e-12)
