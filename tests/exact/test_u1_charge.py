"""Topological charge of U(1) on a torus, against printed values, exact rationals and direct convolution."""

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.integrate import dblquad
from scipy.signal import fftconvolve
from scipy.special import iv

from latticeflow.exact import u1_charge_distribution, u1_charge_log_z, u1_log_z, u1_susceptibility

# extent, beta, chi_t
TABLE = [
    (4, 1.0, 0.0406311122),
    (4, 2.0, 0.0181647570),
    (8, 2.0, 0.0193640455),
    (8, 3.0, 0.0110600470),
    (16, 5.0, 0.0057558073),
    (16, 7.0, 0.0039313053),
]
PRINTED_PROBABILITIES = [0.358991, 0.239219, 0.071116, 0.009559, 0.000593]
VOLUMES = [1, 2, 3, 4, 5, 7, 15, 64, 4096]
BETAS = [0.0, 0.5, 2.0, 20.0, 60.0, 200.0]
BAD_BETAS = [-0.1, math.nan, math.inf, 1e7]


def probability(beta, shape, charge):
    charges, probabilities = u1_charge_distribution(beta, shape)
    return float(probabilities[charges == charge].sum())


def haar_probability(volume, charge):
    """`P(Q)` at beta = 0 in rational numbers: the density of a sum of uniform variables on `(-1/2, 1/2)`."""
    position = Fraction(2 * charge + volume, 2)
    terms = (
        (-1) ** k * math.comb(volume, k) * (position - k) ** (volume - 1) for k in range(volume + 1) if k < position
    )
    return sum(terms, Fraction(0)) / math.factorial(volume - 1)


def convolved_probabilities(beta, volume, *, points):
    """`P(Q)` for `Q = 0..(V-1)/2` by repeated discrete convolution, with an error of order `1 / points^2`."""
    angle = np.linspace(-math.pi, math.pi, points + 1)
    density = np.exp(beta * (np.cos(angle) - 1.0))
    density[[0, -1]] *= 0.5
    total = density
    for _ in range(volume - 1):
        total = fftconvolve(total, density)
    centre = (total.size - 1) // 2
    half = np.array([total[centre + charge * points] for charge in range((volume - 1) // 2 + 1)])
    return half / (2.0 * half.sum() - half[0])


def richardson_probabilities(beta, volume, *, points):
    coarse, fine = (convolved_probabilities(beta, volume, points=n) for n in (points, 2 * points))
    return (4.0 * fine - coarse) / 3.0


@pytest.mark.parametrize(("extent", "beta", "chi_t"), TABLE)
def test_table(extent, beta, chi_t):
    assert u1_susceptibility(beta, (extent, extent)) == pytest.approx(chi_t, rel=0.0, abs=0.51e-10)


@pytest.mark.parametrize("charge", range(-4, 5))
def test_printed_probabilities(charge):
    assert f"{probability(2.0, (8, 8), charge):.6f}" == f"{PRINTED_PROBABILITIES[abs(charge)]:.6f}"


@pytest.mark.parametrize("volume", VOLUMES)
@pytest.mark.parametrize("beta", BETAS)
def test_distribution_and_susceptibility_agree(beta, volume):
    charges, probabilities = u1_charge_distribution(beta, (1, volume))
    assert probabilities.sum() == pytest.approx(1.0, abs=1e-14)
    assert probabilities.min() > 0.0
    np.testing.assert_array_equal(charges, -charges[::-1])
    np.testing.assert_array_equal(probabilities, probabilities[::-1])
    half = probabilities[charges >= 0]
    assert np.all(np.diff(half) < 0.0)
    assert 2 * charges.max() < volume
    assert u1_susceptibility(beta, (volume, 1)) == pytest.approx(
        probabilities @ charges**2 / volume, rel=0.0, abs=5e-15
    )


@pytest.mark.parametrize("volume", [2, 3, 4, 5, 6, 7, 8, 12, 25, 64, 144])
def test_haar_limit_in_rational_numbers(volume):
    charges, probabilities = u1_charge_distribution(0.0, (1, volume))
    expected = [float(haar_probability(volume, int(charge))) for charge in charges]
    np.testing.assert_allclose(probabilities, expected, rtol=0.0, atol=1e-15)
    assert float(haar_probability(volume, int(charges[-1]) + 1)) < 1.1e-16  # nothing that matters is left out


def test_haar_susceptibility_is_the_variance_of_a_uniform_angle():
    # <Q^2> of independent uniform angles, and the constraint does not change it from three plaquettes on
    for volume in (3, 4, 5, 16):
        moment = sum(charge**2 * haar_probability(volume, charge) for charge in range(-volume, volume + 1))
        assert u1_susceptibility(0.0, (1, volume)) == pytest.approx(float(moment / volume), abs=1e-15)
        assert moment / volume == Fraction(1, 12)


@pytest.mark.parametrize("beta", [0.0, 1.0, 50.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1)])
def test_one_or_two_plaquettes_have_no_charge(beta, shape):
    charges, probabilities = u1_charge_distribution(beta, shape)
    assert charges.tolist() == [0]
    assert probabilities.tolist() == [1.0]
    assert u1_susceptibility(beta, shape) == 0.0


@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0, 5.0])
def test_three_plaquettes_by_adaptive_integration(beta):
    """`Q = 1` where `a + b + c = 2 pi`, all three in `(-pi, pi]`; normalised by the known partition function."""
    inside, _ = dblquad(
        lambda b, a: math.exp(beta * (math.cos(a) + math.cos(b) + math.cos(a + b))),
        0.0,
        math.pi,
        lambda a: math.pi - a,
        math.pi,
        epsabs=1e-13,
        epsrel=1e-12,
    )
    partition = sum(iv(n, beta) ** 3 for n in range(-40, 41))
    assert probability(beta, (3, 1), 1) == pytest.approx(inside / (2.0 * math.pi) ** 2 / partition, rel=1e-10)


@pytest.mark.parametrize("volume", [3, 4, 5, 6, 8, 15])
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_direct_convolution_of_plaquette_angles(beta, volume):
    expected = richardson_probabilities(beta, volume, points=2048)
    found = [probability(beta, (1, volume), charge) for charge in range(expected.size)]
    np.testing.assert_allclose(found, expected, rtol=0.0, atol=2e-10)


def test_random_plaquettes_at_four_by_four():
    """Exact draws of independent angles, reweighted by the last plaquette; false alarms below 1e-4 (four sigma)."""
    generator, beta, draws = np.random.default_rng(20), 1.0, 60_000
    free = generator.vonmises(0.0, beta, size=(draws, 15))
    last = -np.angle(np.exp(1j * free.sum(axis=1)))
    charge = np.rint((free.sum(axis=1) + last) / (2.0 * math.pi))
    weight = np.exp(beta * np.cos(last))
    for value in (0, 1, 2):
        hit = np.abs(charge) == value
        mean = np.average(hit, weights=weight)
        error = np.sqrt(np.mean((weight * (hit - mean)) ** 2) / draws) / weight.mean()
        expected = probability(beta, (4, 4), value) * (1 if value == 0 else 2)
        assert mean == pytest.approx(expected, rel=0.0, abs=4.0 * error)


def test_width_in_a_large_volume():
    # a large lattice at weak coupling: a discrete Gaussian of variance V / (4 pi^2 beta_eff), nearly the value below
    charges, probabilities = u1_charge_distribution(200.0, (64, 64))
    assert probabilities @ charges**2 == pytest.approx(4096 / (4.0 * math.pi**2 * 200.0), rel=0.02)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 5), (16, 16)])
def test_sector_factor(shape):
    charges, probabilities = u1_charge_distribution(0.8, shape)
    for c in (0.0, 1e-9, 0.6, 50.0):
        expected = math.log(probabilities @ np.exp(-c * charges**2.0))
        assert u1_charge_log_z(0.8, shape, c) == pytest.approx(expected, abs=1e-14)


def test_sector_factor_limits():
    assert u1_charge_log_z(2.0, (8, 8), 0.0) == 0.0
    assert u1_charge_log_z(2.0, (8, 8), 1e6) == pytest.approx(math.log(probability(2.0, (8, 8), 0)), abs=1e-14)
    mean_square = 64 * u1_susceptibility(2.0, (8, 8))
    assert u1_charge_log_z(2.0, (8, 8), 1e-9) == pytest.approx(-1e-9 * mean_square, rel=1e-7)


def test_susceptibility_is_the_curvature_in_the_vacuum_angle():
    step, shape = 0.05, (3, 5)
    curve = [u1_log_z(1.5, shape, vartheta=k * step) for k in (-2, -1, 0, 1, 2)]
    curvature = (-curve[0] + 16 * curve[1] - 30 * curve[2] + 16 * curve[3] - curve[4]) / (12.0 * step**2)
    assert u1_susceptibility(1.5, shape) == pytest.approx(-curvature / 15, rel=1e-5)


@pytest.mark.parametrize("function", [u1_charge_distribution, u1_susceptibility])
@pytest.mark.parametrize("beta", BAD_BETAS)
def test_bad_beta_is_named(function, beta):
    with pytest.raises(ValueError, match="beta = "):
        function(beta, (4, 4))


@pytest.mark.parametrize("function", [u1_charge_distribution, u1_susceptibility])
@pytest.mark.parametrize("shape", [(0, 4), (4, -1), (4,), (4, 4, 4), (4.5, 4), 16])
def test_bad_shape_is_named(function, shape):
    with pytest.raises(ValueError, match="shape = "):
        function(1.0, shape)


@pytest.mark.parametrize("c", [-0.1, math.nan, math.inf])
def test_bad_sector_factor_is_named(c):
    with pytest.raises(ValueError, match="c = "):
        u1_charge_log_z(1.0, (4, 4), c)
