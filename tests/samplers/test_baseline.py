"""The training-free baseline: exact where it must be, better when tuned, better still as a marginal."""

import math

import pytest
import torch

from latticeflow.actions import HolonomyMarginal, SchwingerAction, U1Action
from latticeflow.exact import u1_charge_distribution, u1_log_z
from latticeflow.priors import QuenchedU1
from latticeflow.samplers import quenched_baseline, tune_quenched
from latticeflow.stats import ess, ess_error, log_z, reweighted_mean
from latticeflow.u1 import topological_charge

SHAPE, SAMPLES = (4, 4), 4000
LOG_Z, LOG_Z_ERROR = 16.0845, 0.0017  # PHYSICS, section 4: 4x4, beta 2, kappa 0.276
ACTION = SchwingerAction(2.0, 0.276)
MARGINAL = HolonomyMarginal(ACTION, (4, 2))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def tuned():
    return tune_quenched(MARGINAL, SHAPE, beta=2.0, generator=seeded(1))


@pytest.fixture(scope="module")
def baselines(tuned):
    """Weights of tuned draws and of draws at the coupling of the action, in this order."""
    priors = tuned, QuenchedU1(2.0, SHAPE)
    return [quenched_baseline(prior, MARGINAL, samples=SAMPLES, generator=seeded(2)) for prior in priors]


def test_tuning_raises_the_ess(tuned, baselines):
    """By more than five errors, for the marginal as well as without it."""
    assert tuned.beta > 2.0  # the determinant favours large plaquettes and small charges
    assert sum(a * math.exp(-c) for a, c in tuned.smooth_sector) < 0.5
    better, plain = baselines
    for name in ("log_weight", "plain_log_weight"):
        high, low = (getattr(baseline, name).numpy() for baseline in (better, plain))
        assert ess(high) - ess(low) > 5 * math.hypot(ess_error(high), ess_error(low))


def test_averaging_over_the_orbit_raises_the_ess(baselines):
    """By more than five errors: the weights of the marginal are means of the plain ones."""
    for baseline in baselines:
        marginal, plain = baseline.log_weight.numpy(), baseline.plain_log_weight.numpy()
        assert ess(marginal) - ess(plain) > 5 * math.hypot(ess_error(marginal), ess_error(plain))
        assert marginal.std() < plain.std()


def test_ess_of_the_plain_weights_is_at_least_that_of_the_record(baselines):
    """PHYSICS, section 4, quotes 0.460 for a draw with another sector factor; four errors, 3e-5."""
    plain = baselines[0].plain_log_weight.numpy()
    assert ess(plain) > 0.460 - 4 * ess_error(plain)


def test_log_z_is_the_trusted_one(baselines):
    """Four sets of weights, two of them independent, each within 4 deviations: 1.3e-4 at most."""
    for baseline in baselines:
        for log_weight in (baseline.log_weight, baseline.plain_log_weight):
            value, error = log_z(log_weight.numpy())
            assert abs(value - LOG_Z) < 4 * math.hypot(error, LOG_Z_ERROR)
            assert error < 0.03


def test_weights_are_those_of_the_draws_in_chunks():
    """The generator is used in the order of the chunks, so the draws can be had again."""
    prior, samples = QuenchedU1(2.3, SHAPE, smooth_sector=((1.0, 0.7),)), 300
    baseline = quenched_baseline(prior, MARGINAL, samples=samples, generator=seeded(3))
    assert baseline.log_weight.shape == baseline.plain_log_weight.shape == (samples,)
    again = seeded(3)
    links = torch.cat([prior.sample(256, again), prior.sample(44, again)])
    log_q = prior.log_prob(links)
    torch.testing.assert_close(baseline.log_weight, -MARGINAL(links) - log_q, rtol=0, atol=1e-10)
    torch.testing.assert_close(baseline.plain_log_weight, -ACTION(links) - log_q, rtol=0, atol=1e-10)
    assert torch.equal(baseline.charge, topological_charge(links))


def test_without_a_marginal_both_weights_are_the_same():
    baseline = quenched_baseline(QuenchedU1(2.3, SHAPE), ACTION, samples=50, generator=seeded(4))
    assert torch.equal(baseline.log_weight, baseline.plain_log_weight)
    assert not baseline.log_weight.requires_grad


@pytest.mark.parametrize("action", [U1Action(1.5), HolonomyMarginal(U1Action(1.5), (3, 2)), SchwingerAction(1.5, 0.0)])
@pytest.mark.parametrize("shape", [(2, 2), (3, 5)])
def test_pure_gauge_theory_is_its_own_baseline(action, shape):
    """Every weight is the partition function itself."""
    baseline = quenched_baseline(QuenchedU1(1.5, shape), action, samples=40, generator=seeded(5))
    for log_weight in (baseline.log_weight, baseline.plain_log_weight):
        expected = torch.full_like(log_weight, u1_log_z(1.5, shape))
        torch.testing.assert_close(log_weight, expected, rtol=0, atol=1e-10)


def test_charges_are_those_of_the_quenched_theory():
    """Fractions of 4000 draws within 4 deviations of the exact ones, in five sectors: 3e-4."""
    charge = quenched_baseline(QuenchedU1(2.0, SHAPE), U1Action(2.0), samples=SAMPLES, generator=seeded(10)).charge
    assert charge.shape == (SAMPLES,)
    for q, p in zip(*u1_charge_distribution(2.0, SHAPE), strict=True):
        assert abs((charge == q).double().mean() - p) <= 4 * math.sqrt(p * (1 - p) / SAMPLES) + 1 / SAMPLES


def test_weighted_charges_are_those_of_the_target(baselines):
    """Two laws, with other fractions of the sectors, agree once they are weighed: 4 deviations, 6e-5 for each Q."""
    better, plain = baselines
    assert (better.charge == 0).double().mean() - (plain.charge == 0).double().mean() > 0.1
    for q in (0, 1, -1):
        (one, error), (other, other_error) = (
            reweighted_mean((baseline.charge == q).double().numpy(), baseline.log_weight.numpy())
            for baseline in baselines
        )
        assert abs(one - other) < 4 * math.hypot(error, other_error)


@pytest.mark.parametrize("start", [1.5, 1.2, 1.8])
def test_tuning_finds_pure_gauge_theory(start):
    """From any start nearby; the coupling is known to some 0.02 from 4000 draws, so 0.15 is several deviations."""
    action = U1Action(1.5)
    prior = tune_quenched(action, (3, 4), beta=start, generator=seeded(6))
    assert prior.beta == pytest.approx(1.5, abs=0.15)
    weights = quenched_baseline(prior, action, samples=1000, generator=seeded(7)).log_weight.numpy()
    assert ess(weights) > 0.98


def test_tuning_follows_its_generator():
    first, again, other = (tune_quenched(ACTION, (2, 2), beta=2.0, generator=seeded(s), pilot=300) for s in (8, 8, 9))
    assert (first.beta, first.smooth_sector) == (again.beta, again.smooth_sector)
    assert first.beta != other.beta
    assert first.shape == (2, 2)
