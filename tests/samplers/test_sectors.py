"""A flow in every topological sector: exact membership, weights that become the sectors' probabilities.

Thresholds of statistical tests are 4.9 standard deviations (1e-6 per case) unless said otherwise; seeds are fixed.
"""

import math

import pytest
import torch
from torch.testing import assert_close

from latticeflow.actions import HolonomyMarginal, SchwingerAction, U1Action
from latticeflow.exact import u1_charge_distribution, u1_plaquette
from latticeflow.flows import Sequential, gauge_flow
from latticeflow.priors import QuenchedSectors, QuenchedU1
from latticeflow.samplers import SectorSampler
from latticeflow.stats import ess, reweighted_mean
from latticeflow.training import train
from latticeflow.u1 import plaquette, topological_charge

SHAPE = (4, 4)
DEVIATIONS = 4.9


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def sampler(beta, *, strength=0.0, shape=SHAPE):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        flow = gauge_flow(shape, layers=8, keep_charge=True, hidden=[8], bins=4).double()
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(strength * torch.randn_like(parameter))
    return SectorSampler(QuenchedSectors(beta, shape), flow)


@torch.no_grad()
def draws(found, n, seed=2):
    return found.sample(n, seeded(seed))


def test_draws_keep_the_charge_they_were_given_and_know_their_density():
    found = sampler(1.0, strength=0.1)
    z = found.latent(300, seeded(3))
    with torch.no_grad():
        x, log_q = found.sample(300, seeded(3))
        assert torch.equal(topological_charge(x), topological_charge(z))
        assert (x - z).abs().max() > 0.3
        assert_close(found.log_prob(x), log_q, rtol=0, atol=1e-9)
    assert topological_charge(x).unique().tolist() == [-2.0, -1.0, 0.0, 1.0, 2.0]


def test_the_density_is_normalised():
    """`<p / q>` over draws of q is 1 for any normalised p; here p is exact pure gauge theory."""
    found, target = sampler(1.0, strength=0.1), QuenchedU1(1.2, SHAPE)
    x, log_q = draws(found, 5000)
    ratio = torch.exp(target.log_prob(x) - log_q)
    assert abs(ratio.mean() - 1) < DEVIATIONS * ratio.std() / math.sqrt(len(x))
    assert ratio.std() > 0.1


@pytest.mark.parametrize("wrong", [0.0, 3.0])
def test_refined_weights_are_the_probabilities_of_the_sectors(wrong):
    """Of pure gauge theory at another coupling, to 4% each, whatever the weights were before."""
    found = sampler(1.0, strength=0.03)
    prior = found.prior
    prior.set_log_weights(prior.log_weights + wrong * torch.tensor(prior.charges).abs().clamp(max=2))
    assert found.refine(U1Action(2.0), seeded(4), draws=2000)
    charges, exact = u1_charge_distribution(2.0, SHAPE)
    for charge, probability in zip(charges, exact, strict=True):
        if probability > 1e-3:
            weight = prior.log_weights[charge + prior.charges[-1]].exp().item()
            assert weight == pytest.approx(probability, rel=0.2)
    assert prior.log_weights.exp().sum() == pytest.approx(1)


def test_a_flow_that_is_exact_has_weight_one_after_refining():
    """The same coupling, no flow: only the weights of the sectors were wrong."""
    found = SectorSampler(QuenchedSectors(2.0, SHAPE), Sequential())
    found.prior.set_log_weights(-0.5 * torch.tensor(found.prior.charges).abs())
    before = ess((-U1Action(2.0)(draws(found, 2000)[0]) - draws(found, 2000)[1]).numpy())
    found.refine(U1Action(2.0), seeded(5), draws=64)
    x, log_q = draws(found, 2000)
    assert before < 0.8
    assert ess((-U1Action(2.0)(x) - log_q).numpy()) == pytest.approx(1, abs=1e-9)


def test_pieces_without_a_finite_weight_change_nothing():
    class Nowhere(U1Action):
        def __call__(self, field):
            return torch.full((len(field),), math.nan, dtype=torch.float64)

    found = sampler(1.0)
    before = found.prior.log_weights.clone()
    found.refine(Nowhere(1.0), seeded(6))
    assert torch.equal(found.prior.log_weights, before)


def test_training_and_reweighting_give_the_exact_plaquette():
    found, action = sampler(1.0), U1Action(2.0)
    train(found, action, steps=60, batch=64, learning_rate=5e-3, warmup=5)
    found = found.double()
    x, log_q = draws(found, 4000)
    log_weight = (-action(x) - log_q).numpy()
    mean, error = reweighted_mean(plaquette(x).cos().mean((1, 2)).numpy(), log_weight)
    assert ess(log_weight) > 0.5
    assert abs(mean - u1_plaquette(2.0, SHAPE)) < DEVIATIONS * error
    charges, exact = u1_charge_distribution(2.0, SHAPE)
    weights = found.prior.log_weights.exp()[[q + found.prior.charges[-1] for q in (-1, 0, 1)]]
    assert_close(weights, torch.from_numpy(exact[[i for i, q in enumerate(charges) if abs(q) <= 1]]), rtol=0.1, atol=0)


def test_training_is_exactly_repeatable():
    losses = []
    for _ in range(2):
        found = sampler(1.0)
        losses.append([record.loss for record in train(found, U1Action(2.0), steps=3, batch=8, seed=5)])
    assert losses[0] == losses[1]


def test_the_sampler_is_blind_to_holonomies():
    """So it may be used with the marginal of an action."""
    found, action = sampler(1.0, strength=0.1), HolonomyMarginal(SchwingerAction(1.0, 0.2, 2), (2, 2))
    x, log_q = draws(found, 16)
    shifted, _ = action.draw(x, action.orbit(x), seeded(8))
    assert (shifted - x).abs().max() > 0.1
    assert_close(found.log_prob(shifted), log_q, rtol=0, atol=1e-8)
