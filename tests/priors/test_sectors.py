"""Sector-wise quenched draws against pure gauge theory as a whole, whose draws and probabilities are known exactly.

Thresholds of statistical tests are set for a false-alarm rate of 1e-6 per case (4.9 standard deviations); all
generators are seeded.
"""

import math

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torch.testing import assert_close

from latticeflow.exact import u1_charge_distribution, u1_plaquette
from latticeflow.priors import QuenchedSectors, QuenchedU1
from latticeflow.u1 import plaquette, polyakov_loop, shift_holonomies, topological_charge, wrap

CASES = [(0.5, (4, 4)), (2.0, (8, 8)), (2.0, (3, 5)), (6.0, (8, 4)), (30.0, (4, 4))]
DEVIATIONS = 4.9


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def mean_and_error(values):
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


@pytest.mark.parametrize(("beta", "shape"), CASES)
def test_with_its_own_weights_it_is_pure_gauge_theory(beta, shape):
    links = QuenchedU1(beta, shape).sample(500, seeded(1))
    prior = QuenchedSectors(beta, shape)
    assert_close(prior.log_prob(links), QuenchedU1(beta, shape).log_prob(links), rtol=0, atol=1e-9)
    drawn = plaquette(prior.sample(4000, seeded(2))).cos().mean((1, 2))
    mean, error = mean_and_error(drawn)
    assert abs(mean - u1_plaquette(beta, shape)) < DEVIATIONS * error


@pytest.mark.parametrize(("beta", "shape"), CASES)
def test_charges_follow_the_weights(beta, shape):
    prior = QuenchedSectors(beta, shape)
    largest = prior.charges[-1]
    weights = torch.tensor([1.0 if abs(charge) <= 1 else 1e-30 for charge in prior.charges]).double()
    prior.set_log_weights(weights.log() + torch.arange(2.0 * largest + 1) * 0.5)
    expected = prior.log_weights.exp()[largest - 1 : largest + 2]
    charge = topological_charge(prior.sample(3000, seeded(3)))
    found = torch.stack([(charge == q).double().mean() for q in (-1, 0, 1)])
    assert ((found - expected).abs() < DEVIATIONS * (expected * (1 - expected) / 3000).sqrt()).all()
    assert expected[2] / expected[0] == pytest.approx(math.e)


@pytest.mark.parametrize(("beta", "shape"), CASES)
def test_draws_in_a_sector_are_those_of_pure_gauge_theory(beta, shape):
    """Of all and the last plaquette, drawn in another way than the others, in sectors that pure gauge theory visits."""
    links = QuenchedU1(beta, shape).sample(8000, seeded(4))
    charge, prior = topological_charge(links), QuenchedSectors(beta, shape)
    for one in (0, 1):
        plain = wrap(plaquette(links[charge == one]))
        if len(plain) < 100:
            continue
        drawn = prior.in_sectors(torch.full((2000,), one), seeded(5))
        assert (topological_charge(drawn) == one).all()
        angle = wrap(plaquette(drawn))
        for quantity in (lambda a: a[:, -1, -1], lambda a: a[:, 0, 0], lambda a: a.cos().sum((1, 2))):
            assert ks_2samp(quantity(angle), quantity(plain)).pvalue > 1e-6


def test_a_far_sector_lies_on_a_uniform_flux():
    angle = wrap(plaquette(QuenchedSectors(2.0, (8, 8)).in_sectors(torch.full((2000,), 6), seeded(6))))
    assert_close(angle.sum((1, 2)), torch.full((2000,), 12 * math.pi, dtype=torch.float64))
    for x in ((0, 0), (7, 7), (3, 4)):
        mean, error = mean_and_error(angle[:, x[0], x[1]])
        assert abs(mean - 12 * math.pi / 64) < DEVIATIONS * error


def test_the_order_of_the_draws_is_random():
    charge = topological_charge(QuenchedSectors(2.0, (8, 8)).sample(4000, seeded(7)))
    assert abs(np.corrcoef(charge[1:], charge[:-1])[0, 1]) < DEVIATIONS / math.sqrt(4000)


def test_holonomies_and_gauge_are_uniform():
    prior = QuenchedSectors(2.0, (4, 4))
    links = prior.sample(4000, seeded(8))
    for mu in (0, 1):
        assert wrap(polyakov_loop(links, mu)).cos().mean().abs() < DEVIATIONS / math.sqrt(2 * 4 * 4000)
    assert_close(prior.log_prob(shift_holonomies(links, torch.tensor([1.0, 2.0]))), prior.log_prob(links))


def test_charges_beyond_those_of_pure_gauge_theory_have_no_density():
    prior = QuenchedSectors(30.0, (4, 4))
    assert prior.charges == list(u1_charge_distribution(30.0, (4, 4))[0])
    far = QuenchedSectors(0.5, (4, 4)).in_sectors(torch.tensor([5, 0]), seeded(9))
    assert prior.charges[-1] < 5
    log_prob = prior.log_prob(far)
    assert log_prob[0] == -math.inf
    assert torch.isfinite(log_prob[1])


def test_weights_are_normalised_and_saved():
    prior, other = QuenchedSectors(2.0, (4, 4)), QuenchedSectors(2.0, (4, 4))
    prior.set_log_weights(prior.log_weights + torch.linspace(3, 5, len(prior.charges)))
    assert prior.log_weights.exp().sum() == pytest.approx(1)
    other.load_state_dict(prior.state_dict())
    links = prior.sample(10, seeded(10))
    assert torch.equal(other.log_prob(links), prior.log_prob(links))


def test_single_precision_changes_no_normalisation():
    """The weights are rounded and still add up to 1; the partition functions, of order 1000, are not."""
    prior, plain = QuenchedSectors(7.0, (16, 16)), QuenchedU1(7.0, (16, 16))
    links = plain.sample(50, seeded(11))
    assert_close(prior.float().double().log_prob(links), plain.log_prob(links), rtol=0, atol=1e-5)
    prior.set_log_weights(prior.log_weights + torch.tensor(prior.charges).abs())
    prior.float()
    assert prior.log_w.exp().sum() == pytest.approx(1, abs=1e-14)


def test_no_draws_are_no_draws():
    assert QuenchedSectors(2.0, (4, 4)).sample(0, seeded(1)).shape == (0, 2, 4, 4)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan])
def test_couplings_that_are_not_positive_are_refused(beta):
    with pytest.raises(ValueError, match="beta must be positive and finite"):
        QuenchedSectors(beta, (4, 4))


@pytest.mark.parametrize("change", ["shorter", "nan", "zero"])
def test_weights_that_are_none_are_refused(change):
    prior = QuenchedSectors(2.0, (4, 4))
    weights = prior.log_weights.clone()
    bad = {"shorter": weights[1:], "nan": weights * math.nan, "zero": torch.where(weights < -5, -math.inf, weights)}
    with pytest.raises(ValueError, match=f"expected {len(weights)} finite log weights of sectors"):
        prior.set_log_weights(bad[change])
