"""Winding: the field of one flux quantum, the symmetry of the proposal, and the law of the charge."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, chisquare, kstest

from latticeflow.actions import HolonomyMarginal, ScalarAction, SchwingerAction, U1Action
from latticeflow.exact import u1_charge_distribution
from latticeflow.mcmc import HMC, Composite, Kernel, Winding, unit_flux
from latticeflow.observables import observables
from latticeflow.priors import HaarUniform, Normal, QuenchedU1
from latticeflow.stats import reweighted_mean
from latticeflow.u1 import plaquette, polyakov_loop, topological_charge, wrap

FALSE_ALARM = 1e-4
SHAPES = [(4, 4), (3, 5), (6, 2), (2, 3), (1, 5), (7, 1), (16, 16)]


def close(first, second, tolerance=1e-11):
    torch.testing.assert_close(first, second, rtol=0, atol=tolerance)


# ---------------------------------------------------------------- the field of one quantum


@pytest.mark.parametrize("shape", SHAPES)
def test_unit_flux_has_uniform_plaquettes_and_charge_one(shape):
    links = unit_flux(shape)[None]
    assert links.shape == (1, 2, *shape)
    assert links.dtype == torch.float64
    close(wrap(plaquette(links)), torch.full((1, *shape), 2 * math.pi / math.prod(shape), dtype=torch.float64))
    assert topological_charge(links) == 1
    assert topological_charge(-links) == -1
    assert topological_charge(2 * links) == 2 or math.prod(shape) <= 4


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1)])
def test_unit_flux_on_the_smallest_lattices(shape):
    """On the branch cut only the cosine is defined."""
    cosine = torch.cos(plaquette(unit_flux(shape)[None]))
    close(cosine, torch.full_like(cosine, math.cos(2 * math.pi / math.prod(shape))))


@pytest.mark.parametrize("shape", SHAPES)
def test_adding_and_taking_away_is_nothing(shape, generator):
    links = HaarUniform(shape).sample(3, generator(1))
    there = wrap(links + unit_flux(shape))
    close(torch.exp(1j * wrap(there - unit_flux(shape))), torch.exp(1j * links))


# ---------------------------------------------------------------- the proposal


@pytest.fixture
def free_moves(generator):
    """At beta = 0 every proposal is accepted: links before and after one step of many replica."""
    kernel = Winding(U1Action(0.0), QuenchedU1(4.0, (3, 4)))
    before = kernel.start(4000, generator(2))
    after, info = kernel.step(before, generator(3))
    assert info.accepted.all()
    return before.field, after.field


def test_proposal_adds_one_quantum_of_either_sign(free_moves):
    """The plaquettes all move by `-+ 2 pi / V`, both signs equally often: either way is as likely as the way back."""
    before, after = free_moves
    moved = wrap(plaquette(after) - plaquette(before)) * 12 / (2 * math.pi)
    sign = torch.round(moved[:, 0, 0])
    assert set(sign.tolist()) == {-1.0, 1.0}
    close(moved, sign[:, None, None].expand_as(moved))
    ups = int((sign > 0).sum())
    assert min(binom.cdf(ups, 4000, 0.5), binom.sf(ups - 1, 4000, 0.5)) > FALSE_ALARM
    change = topological_charge(after) - topological_charge(before)
    assert (change == sign).double().mean() > 0.9


def test_proposal_makes_the_holonomies_uniform(free_moves):
    """Each Polyakov loop moves by a uniform angle that knows nothing of the other and of the sign."""
    before, after = free_moves
    sign = torch.round(wrap(plaquette(after) - plaquette(before))[:, 0, 0] * 12 / (2 * math.pi))
    shifts = [wrap(polyakov_loop(after, mu)[:, 0] - polyakov_loop(before, mu)[:, 0]).numpy() for mu in (0, 1)]
    for angle in (*shifts, wrap(torch.tensor(shifts[0] - shifts[1])).numpy()):
        for part in (angle, angle[sign.numpy() > 0]):
            assert kstest(part, "uniform", args=(-math.pi, 2 * math.pi)).pvalue > FALSE_ALARM


@pytest.mark.parametrize("action", [U1Action(2.0), SchwingerAction(1.0, 0.2)])
def test_acceptance_is_that_of_the_change_of_the_action(action, generator):
    """Among replica that moved the action may rise; the mean of `min(1, exp(S - S'))` is that of `accepted`."""
    kernel = Winding(action, QuenchedU1(2.0, (4, 4)))
    before = kernel.start(400, generator(4))
    after, info = kernel.step(before, generator(5))
    accepted = info.accepted
    assert 0.1 < accepted.double().mean() < 0.95
    assert (after.action > before.action)[accepted].any()
    close(after.action, action(after.field), 1e-9)
    for name in ("field", "orbit"):
        assert torch.equal(getattr(after, name)[~accepted], getattr(before, name)[~accepted])
    assert (topological_charge(after.field) != topological_charge(before.field))[accepted].double().mean() > 0.8
    assert after.log_q is None
    assert info.bad == 0


@pytest.mark.parametrize("action", [U1Action(2.0), HolonomyMarginal(U1Action(2.0), (2, 3))])
def test_step_is_pure_and_stays_on_the_branch(action, generator):
    kernel = Winding(action, QuenchedU1(2.0, (4, 4)))
    before = kernel.start(50, generator(6))
    copy = before.field.clone()
    (first, _), (second, _), (third, _) = (kernel.step(before, generator(seed)) for seed in (7, 7, 8))
    assert torch.equal(before.field, copy)
    assert torch.equal(first.field, second.field)
    assert not torch.equal(first.field, third.field)
    assert first.field.max() <= math.pi
    assert first.field.min() > -math.pi


class Cliff(U1Action):
    """`beyond` where the links add up to more than 0; flat elsewhere."""

    beyond = 0.0

    def __call__(self, field):
        total = field.flatten(1).sum(1)
        return torch.where(total > 0, torch.full_like(total, self.beyond), 0.0)


@pytest.mark.parametrize("beyond", [math.nan, math.inf, -math.inf])
def test_non_finite_actions_are_rejected_and_counted(beyond, generator, constant):
    action = Cliff(1.0)
    object.__setattr__(action, "beyond", beyond)
    kernel = Winding(action, constant((2, 4, 4), -0.01))
    before = kernel.start(200, generator(15))
    after, info = kernel.step(before, generator(16))
    assert 20 < info.bad < 180
    assert info.accepted.sum() == 200 - info.bad
    assert torch.isfinite(after.action).all()
    assert torch.equal(after.field[~info.accepted], before.field[~info.accepted])


def test_protocol(generator):
    kernel = Winding(HolonomyMarginal(SchwingerAction(1.0, 0.2), (2, 2)), QuenchedU1(1.0, (4, 4)))
    state, info = kernel.step(kernel.start(5, generator(9)), generator(10))
    assert isinstance(kernel, Kernel)
    assert {name: values.dtype for name, values in info.history.items()} == kernel.history
    assert kernel.parameters == {}
    assert not info.proposals
    close(state.orbit, kernel.action.orbit(state.field), 1e-9)


def test_a_scalar_theory_is_refused():
    with pytest.raises(ValueError, match=r"winding needs a gauge theory, got ScalarAction\(m2=1.0, lam=0.0\)"):
        Winding(ScalarAction(1.0, 0.0), Normal((4, 4)))


# ---------------------------------------------------------------- the law


def charge_counts(charges, probabilities, values, least=8):
    """Return observed and expected counts, the outer charges together where fewer than `least` are expected."""
    edge = max(q for q, p in zip(charges, probabilities, strict=True) if len(values) * p >= least)
    bins = np.clip(charges, -edge, edge)
    expected = np.array([probabilities[bins == q].sum() for q in range(-edge, edge + 1)])
    observed = [(np.clip(values, -edge, edge) == q).sum() for q in range(-edge, edge + 1)]
    return np.array(observed), len(values) * expected / expected.sum()


def test_topology_where_hmc_is_frozen(run_chains, constant):
    """16x16, beta 7, from Q = 0: with winding P(Q) is the exact one, without it the charge hardly moves.

    Counts at one step are those of independent replica; those of three steps 20 apart are added, between which the
    measured autocorrelation has gone. chi^2 at 1e-4.
    """
    action, cold = U1Action(7.0), constant((2, 16, 16))
    hmc = HMC(action, cold, step_size=0.125, integrator="leapfrog")
    kernel = Composite([hmc, Winding(action, cold)])
    chains = run_chains(kernel, ["topological_charge"], replica=256, steps=70, seed=11)
    series = chains.observables["topological_charge"]
    charges, probabilities = u1_charge_distribution(7.0, (16, 16))
    observed, expected = charge_counts(charges, probabilities, series[:, [29, 49, 69]].ravel())
    assert len(expected) >= 5
    assert chisquare(observed, expected).pvalue > FALSE_ALARM
    assert abs(np.corrcoef(series[:, 29], series[:, 49])[0, 1]) < 0.25
    assert chains.history["accepted_winding"].mean() > 0.4
    alone = run_chains(hmc, ["topological_charge"], replica=64, steps=20, seed=12).observables["topological_charge"]
    assert (alone == 0).mean() > 0.99
    assert chisquare(*charge_counts(charges, probabilities, alone[:, -1], least=3)).pvalue < FALSE_ALARM


def test_means_with_fermions_are_those_without_a_chain(run_chains, generator):
    """4x4, beta 2, kappa 0.2 against reweighted quenched draws; 4 standard deviations, 2e-4 for the three."""
    action, names = SchwingerAction(2.0, 0.2), ["plaquette", "topological_susceptibility", "condensate"]
    prior = QuenchedU1(2.2, (4, 4))
    links = prior.sample(4000, generator(13))
    log_weight = (-action(links) - prior.log_prob(links)).numpy()
    kernel = Composite([HMC(action, prior, step_size=0.34, integrator="leapfrog"), Winding(action, prior)])
    chains = run_chains(kernel, names, replica=128, steps=14, burn=4, seed=14)
    assert chains.history["accepted_winding"].mean() > 0.05
    for name, observable in observables(action, names).items():
        value, value_error = reweighted_mean(observable(links).numpy(), log_weight)
        mean, error = chains.mean(name)
        assert abs(mean - value) < 4 * math.hypot(error, value_error), name
        assert error < 0.1 * value
