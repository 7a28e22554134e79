"""Priors of links against closed forms: exact charge distribution, plaquette, partition functions and single-link laws.

Thresholds of statistical tests are set for a false-alarm rate of 1e-5 or less per case (chi^2 p-values) or 4.9 standard
deviations (1e-6); all generators are seeded.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.special import ive
from scipy.stats import chisquare, kstest, vonmises

from latticeflow.exact import u1_charge_distribution, u1_log_z
from latticeflow.priors import HaarUniform, QuenchedU1, links_from_plaquettes, von_mises
from latticeflow.u1 import plaquette, polyakov_loop, topological_charge

FACTORS = [0.0, 0.6, 0.25]  # of Q^2
SMOOTH = ((0.7, 3.0), (0.3, 0.4))
BETAS = [0.0, 0.5, 2.0, 6.0, 30.0]
SHAPES = [(2, 2), (3, 4), (4, 4), (8, 8)]
SAMPLES = 3000
DEVIATIONS = 4.9


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def mean_and_error(values):
    array = np.asarray(values, dtype=np.float64)
    return array.mean(), array.std() / math.sqrt(len(array))


def quenched(beta, shape, factor):
    return QuenchedU1(beta, shape, sector=factor)


def sector_action(charge, factor):
    return factor * charge**2.0


def exact_charges(beta, shape, factor):
    """Charges, their probabilities with the sector factor, and the logarithm of the normalisation of these."""
    charges, probabilities = u1_charge_distribution(beta, shape)
    weights = probabilities * np.exp(-sector_action(charges, factor))
    return charges, weights / weights.sum(), math.log(weights.sum())


def exact_log_z(beta, shape, factor):
    return u1_log_z(beta, shape) + exact_charges(beta, shape, factor)[2]


def exact_plaquette(beta, shape, factor, *, step=1e-4):
    """`(1/V) d log Z_F / d beta`, from one side so that beta = 0 is included."""
    log_z = [exact_log_z(b, shape, factor) for b in (beta, beta + step, beta + 2 * step)]
    return (-3 * log_z[0] + 4 * log_z[1] - log_z[2]) / (2 * step * math.prod(shape))


def merged(observed, expected):
    """Counts with the bins that expect fewer than five put into the smallest of the others."""
    common = expected >= 5
    smallest = np.argmin(expected[common])
    counts = []
    for values in (observed, expected):
        kept = values[common].astype(float)
        kept[smallest] += values[~common].sum()
        counts.append(kept)
    return counts


def test_haar_density_is_one():
    prior = HaarUniform((3, 4))
    assert torch.equal(prior.log_prob(prior.sample(5, seeded(6))), torch.zeros(5, dtype=torch.float64))


def test_haar_links_are_uniform():
    """Kolmogorov-Smirnov over all links, at 1e-6."""
    links = HaarUniform((3, 4)).sample(SAMPLES, seeded(7)).numpy()
    assert kstest(links.ravel(), "uniform", args=(-math.pi, 2 * math.pi)).pvalue > 1e-6


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_quenched_charges_and_plaquette(shape, beta, factor):
    """Chi^2 of the charges with p above 1e-5, the plaquette within 4.9 deviations: 7e-4 for all 60 cases together."""
    links = quenched(beta, shape, factor).sample(SAMPLES, seeded(8))
    charges, probabilities, _ = exact_charges(beta, shape, factor)
    sampled = topological_charge(links).numpy()
    assert sampled.min() >= charges[0]
    assert sampled.max() <= charges[-1]
    observed, expected = merged((sampled[:, None] == charges).sum(0), SAMPLES * probabilities)
    if len(expected) > 1:
        assert chisquare(observed, expected).pvalue > 1e-5
    mean, error = mean_and_error(torch.cos(plaquette(links)).mean((1, 2)))
    assert abs(mean - exact_plaquette(beta, shape, factor)) < DEVIATIONS * error


@pytest.mark.parametrize("shape", [(1, 2), (3, 1), (2, 2), (3, 4)])
@pytest.mark.parametrize(("beta", "factor"), [(0.0, 1.0), (0.5, 0.0), (1.0, 0.6)])
def test_quenched_density_integrates_to_one_over_haar_links(shape, beta, factor):
    """The Haar mean of the density, within 4.9 deviations (1e-6)."""
    links = HaarUniform(shape).sample(20_000, seeded(9))
    mean, error = mean_and_error(quenched(beta, shape, factor).log_prob(links).exp())
    assert abs(mean - 1) < DEVIATIONS * error + 1e-7
    assert error < 0.1


@pytest.mark.parametrize("shape", [(2, 2), (3, 4), (8, 8)])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((2.0, 0.0), (2.3, 0.0)),
        ((2.0, 0.3), (1.8, 0.0)),
        ((0.0, 0.0), (0.2, 0.6)),
        ((6.0, 0.8), (6.2, 0.9)),
    ],
)
def test_reweighting_gives_the_ratio_of_partition_functions(shape, first, second):
    """The mean of `exp(-S_2) / q_1` against exact character sums, within 4.9 deviations (1e-6)."""
    prior = quenched(first[0], shape, first[1])
    links = prior.sample(SAMPLES, seeded(10))
    cosines, charge = torch.cos(plaquette(links)).sum((1, 2)), topological_charge(links)
    weight = (second[0] * cosines - sector_action(charge, second[1]) - prior.log_prob(links)).exp()
    mean, error = mean_and_error(weight)
    exact = math.exp(exact_log_z(second[0], shape, second[1]))
    assert abs(mean - exact) < DEVIATIONS * error
    assert error < 0.2 * exact
    mean, error = mean_and_error((quenched(second[0], shape, second[1]).log_prob(links) - prior.log_prob(links)).exp())
    assert abs(mean - 1) < DEVIATIONS * error


@pytest.mark.parametrize("factor", FACTORS)
def test_density_is_the_boltzmann_weight(factor):
    links, offset = boltzmann_offset(factor)
    np.testing.assert_allclose(offset, -exact_log_z(1.5, (3, 4), factor), rtol=0, atol=1e-12)
    assert {-1.0, 0.0, 1.0} <= set(topological_charge(links).tolist())


def boltzmann_offset(factor):
    """Links, and their `log q + S` by NumPy, which must be minus the logarithm of the normalisation."""
    links = HaarUniform((3, 4)).sample(40, seeded(11))
    angles = plaquette(links).numpy()
    charge = np.round(((angles + math.pi) % (2 * math.pi) - math.pi).sum((1, 2)) / (2 * math.pi))
    log_weight = 1.5 * np.cos(angles).sum((1, 2)) - sector_action(charge, factor)
    return links, quenched(1.5, (3, 4), factor).log_prob(links).numpy() - log_weight


@pytest.mark.parametrize("beta", [0.5, 6.0])
def test_quenched_links_are_uniform_one_by_one_and_in_pairs(beta):
    """Fourier modes of links and pairs, none of them gauge invariant: each `n |mean|^2` exceeds 23 at a rate of 1e-10.

    With 600 modes the false-alarm rate is 6e-8.
    """
    links = QuenchedU1(beta, (3, 4)).sample(SAMPLES, seeded(12)).reshape(SAMPLES, 24).numpy()
    assert links.min() > -math.pi
    assert links.max() <= math.pi
    modes = [k * links[:, i] for k in (1, 2) for i in range(24)]
    modes += [links[:, i] + sign * links[:, j] for i, j in itertools.combinations(range(24), 2) for sign in (1, -1)]
    powers = [SAMPLES * abs(np.exp(1j * mode).mean()) ** 2 for mode in modes]
    assert max(powers) < 23
    assert np.mean(powers) == pytest.approx(1, abs=0.35)


def test_quenched_polyakov_loops_are_uniform_whatever_the_plaquettes():
    """Kolmogorov-Smirnov of both loops in each half of the plaquette distribution, p above 1e-6."""
    links = QuenchedU1(2.0, (3, 4)).sample(SAMPLES, seeded(13))
    cosine = torch.cos(plaquette(links))[:, 0, 0]
    for mu, half in itertools.product((0, 1), (cosine > 0.8, cosine <= 0.8)):
        angle = np.mod(polyakov_loop(links, mu)[half, 0].numpy(), 2 * math.pi)
        assert len(angle) > 200
        assert kstest(angle, "uniform", args=(0, 2 * math.pi)).pvalue > 1e-6


def test_every_plaquette_has_the_same_law():
    """The plaquette that closes the torus is drawn differently: its mean cosine agrees within 4.9 deviations."""
    angles = plaquette(quenched(2.0, (2, 2), 0.5).sample(4 * SAMPLES, seeded(14)))
    for x0, x1 in itertools.product(range(2), range(2)):
        mean, error = mean_and_error(torch.cos(angles[:, x0, x1]))
        assert abs(mean - exact_plaquette(2.0, (2, 2), 0.5)) < DEVIATIONS * error


@pytest.mark.parametrize(("shape", "n"), [((1, 1), 5), ((2, 2), 0)])
def test_quenched_on_one_site_and_empty_batches(shape, n):
    assert QuenchedU1(2.0, shape).sample(n, seeded(15)).shape == (n, 2, *shape)


@pytest.mark.parametrize("concentration", [0.0, 0.5, 2.0, 6.0, 30.0, 1000.0])
def test_von_mises_moments_are_bessel_ratios(concentration):
    """`<cos m x> = I_m / I_0` and `<sin m x> = 0` within 4.9 deviations, and Kolmogorov-Smirnov above 1e-6."""
    size = 20_000
    x = von_mises(concentration, (size,), seeded(16)).numpy()
    ratios = [ive(m, concentration) / ive(0, concentration) for m in range(7)]
    for m in (1, 2, 3):
        error = math.sqrt(max((1 + ratios[2 * m]) / 2 - ratios[m] ** 2, 0) / size)
        assert abs(np.cos(m * x).mean() - ratios[m]) < DEVIATIONS * error
        assert abs(np.sin(m * x).mean()) < DEVIATIONS * math.sqrt((1 - ratios[2 * m]) / 2 / size)
    law = vonmises(concentration) if concentration else None
    assert kstest(x, law.cdf if law else lambda t: (t + math.pi) / (2 * math.pi)).pvalue > 1e-6


def test_von_mises_shape_and_independence():
    x = von_mises(2.0, (200, 3, 5), seeded(17))
    assert x.shape == (200, 3, 5)
    assert x.dtype == torch.float64
    assert x.unique().numel() == 3000
    flat = np.sin(x.numpy().ravel())
    mean, error = mean_and_error(flat[1:] * flat[:-1])
    assert abs(mean) < DEVIATIONS * error  # 1e-6


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 1), (2, 2), (3, 5), (4, 4)])
def test_links_from_plaquettes_round_trip(shape):
    generator = seeded(18)
    drawn = 2 * math.pi * torch.rand(6, math.prod(shape), dtype=torch.float64, generator=generator) - math.pi
    drawn[:, -1] = 2 * math.pi * torch.arange(-3.0, 3.0).double() - drawn[:, :-1].sum(1)
    plaquettes = drawn.reshape(6, *shape)
    holonomies = 2 * math.pi * torch.rand(6, 2, dtype=torch.float64, generator=generator)
    links = links_from_plaquettes(plaquettes, holonomies)
    assert links.shape == (6, 2, *shape)
    torch.testing.assert_close(torch.exp(1j * plaquette(links)), torch.exp(1j * plaquettes), rtol=0, atol=1e-12)
    for mu in (0, 1):
        torch.testing.assert_close(polyakov_loop(links, mu)[:, 0], holonomies[:, mu], rtol=0, atol=1e-12)


def test_links_from_plaquettes_keep_the_charge():
    plaquettes = torch.full((1, 3, 4), 2 * math.pi * 2 / 12, dtype=torch.float64)
    links = links_from_plaquettes(plaquettes, torch.zeros(1, 2, dtype=torch.float64))
    assert float(topological_charge(links)) == 2


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_bad_quenched_couplings_are_named(value):
    with pytest.raises(ValueError, match=f"beta must be finite and not negative, got {value!r}"):
        QuenchedU1(value, (4, 4))
    with pytest.raises(ValueError, match=f"sector must be finite and not negative, got {value!r}"):
        QuenchedU1(1.0, (4, 4), sector=value)
    with pytest.raises(ValueError, match=f"smooth_sector must be finite and not negative, got {value!r}"):
        QuenchedU1(1.0, (4, 4), smooth_sector=((1.0, value),))


@pytest.mark.parametrize("more", [{"smooth_sector": ((0.5, 1.0),)}, {"smooth_sector": SMOOTH, "sector": 0.1}])
def test_smooth_sector_weights_and_a_second_factor_are_refused(more):
    with pytest.raises(ValueError, match="add up to 1 and sector = 0"):
        QuenchedU1(1.0, (4, 4), **more)


@pytest.mark.parametrize(("beta", "shape"), [(0.0, (3, 5)), (1.0, (2, 2)), (2.4, (8, 8)), (6.0, (4, 4))])
def test_smooth_sector_factor_is_normalised(beta, shape):
    """Mean of `q / q'` over draws of q' = plain quenched, and of `q' / q` over draws of q, are 1; 4.9 deviations."""
    smooth, plain = QuenchedU1(beta, shape, smooth_sector=SMOOTH), QuenchedU1(beta, shape)
    for drawn, other in ((plain, smooth), (smooth, plain)):
        links = drawn.sample(SAMPLES, seeded(21))
        mean, error = mean_and_error((other.log_prob(links) - drawn.log_prob(links)).exp())
        assert abs(mean - 1) < DEVIATIONS * error
        assert error < 0.1


@pytest.mark.parametrize(("factor", "jumps"), [({"sector": 0.8}, True), ({"smooth_sector": SMOOTH}, False)])
def test_only_the_smooth_factor_is_continuous_where_a_plaquette_passes_pi(factor, jumps):
    prior = QuenchedU1(1.0, (3, 3), **factor)
    angles = torch.full((2, 3, 3), 0.1, dtype=torch.float64)
    angles[:, 0, 0] = torch.tensor([math.pi - 1e-9, math.pi + 1e-9], dtype=torch.float64)
    angles[:, 2, 2] = -(angles.sum((1, 2)) - angles[:, 2, 2])
    links = links_from_plaquettes(angles, torch.zeros(2, 2, dtype=torch.float64))
    change = float((prior.log_prob(links[:1]) - prior.log_prob(links[1:])).abs())
    assert (change > 0.1) == jumps
    assert jumps or change < 1e-7


@pytest.mark.parametrize("shape", [(4,), (4, 0), (2, 2, 2)])
@pytest.mark.parametrize("make", [HaarUniform, lambda shape: QuenchedU1(1.0, shape)])
def test_bad_gauge_shapes_are_named(make, shape):
    with pytest.raises(ValueError, match="lattice shape"):
        make(shape)
