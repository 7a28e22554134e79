"""Independence Metropolis on the 4x4 Schwinger model, with holonomy orbits; reproducibility and precision.

Means compare at four or five standard deviations, both errors combined: 2e-4 for all of them together; seeds are fixed.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from latticeflow.actions import HolonomyMarginal, SchwingerAction, U1Action
from latticeflow.flows import Sequential, gauge_flow
from latticeflow.mcmc import HMC, IndependenceMetropolis
from latticeflow.observables import observables
from latticeflow.priors import HaarUniform, QuenchedU1
from latticeflow.samplers import FlowSampler
from latticeflow.stats import gamma_method, predicted_acceptance
from latticeflow.u1 import polyakov_loop

TRUSTED = {  # PHYSICS.md, section 4: 4x4, beta 2, kappa 0.276
    "plaquette": (0.76341, 0.00020),
    "topological_susceptibility": (0.003547, 0.000022),
    "condensate": (1.46807, 0.00018),
}


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


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def schwinger():
    """Return the series `(replica, steps)` of observables, of acceptance and proposed log weights, and the end."""
    action = HolonomyMarginal(SchwingerAction(2.0, 0.276), grid=(4, 2))
    sampler = FlowSampler(QuenchedU1(2.35, (4, 4), sector=0.6), Sequential())
    metropolis, draws = IndependenceMetropolis(sampler, action), seeded(17)
    wanted = {name: o for name, o in observables(action).items() if name in TRUSTED}
    state, series = metropolis.start(224, draws), {name: [] for name in (*wanted, "accepted", "proposed")}
    for _ in range(70):
        state, info = metropolis.step(state, draws)
        for name, observable in wanted.items():
            series[name].append(observable(state.field).numpy())
        series["accepted"].append(info.accepted.numpy())
        series["proposed"].append(info.proposals["log_weight"].numpy())
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
        IndependenceMetropolis(Tilted(strength), marginal).start(16, seeded(18))


@pytest.mark.parametrize("action", [SchwingerAction(1.0, 0.2), HolonomyMarginal(U1Action(1.0), grid=(1, 1))])
def test_such_a_sampler_may_serve_an_action_without_orbits(action):
    assert IndependenceMetropolis(Tilted(1.0), action).start(16, seeded(18)).field.shape == (16, 2, 4, 4)


def test_a_state_that_hmc_moved_has_the_weight_of_its_marginal():
    action = HolonomyMarginal(SchwingerAction(1.0, 0.2), grid=(2, 2))
    prior = QuenchedU1(1.0, (4, 4))
    metropolis, draws = IndependenceMetropolis(FlowSampler(prior, Sequential()), action, candidates=16), seeded(34)
    moved, _ = HMC(action, prior, step_size=0.5).step(metropolis.start(16, draws), draws)
    assert moved.log_q is None
    after, info = metropolis.step(moved, draws)
    kept = ~info.accepted
    assert kept.any()
    expected = -action(moved.field) - prior.log_prob(moved.field)
    assert_close(after.log_weight[kept], expected[kept], rtol=0, atol=1e-9)
    assert_close(after.log_q[kept], prior.log_prob(moved.field)[kept], rtol=0, atol=1e-9)


# ---------------------------------------------------------------- reproducibility and precision


def test_same_seed_same_chain():
    runs = []
    for seed in (19, 19, 20):
        action = HolonomyMarginal(SchwingerAction(1.0, 0.2), grid=(2, 2))
        metropolis = IndependenceMetropolis(FlowSampler(QuenchedU1(1.0, (4, 4)), Sequential()), action, candidates=64)
        draws, infos = seeded(seed), []
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
        assert torch.equal(first.proposals["log_weight"], second.proposals["log_weight"])


def test_single_precision_flow_in_a_double_precision_chain():
    sampler = FlowSampler(HaarUniform((4, 4)), gauge_flow((4, 4), layers=2, hidden=[4])).float()
    metropolis = IndependenceMetropolis(sampler, U1Action(0.5), candidates=64)
    state, info = metropolis.step(metropolis.start(8, seeded(21)), seeded(22))
    for tensor in (state.field, state.orbit, state.log_q, state.log_weight, info.proposals["log_weight"]):
        assert tensor.dtype == torch.float64
        assert not tensor.requires_grad
    assert_close(state.log_weight, -U1Action(0.5)(state.field) - state.log_q, rtol=0, atol=1e-12)
