"""Densities of the plane: formulas, integrals and symmetries; and exact draws, of other densities as well.

Statistical tests have fixed seeds and p-values above 1e-6, so each is a false alarm with that probability.
"""

import math
import re

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats

from latticeflow.actions import (
    CircleOfGaussians,
    Drawable,
    Funnel,
    GaussianMixture,
    MultivariateStudentT,
    TwoMoons,
    TwoRings,
    synthetic_horseshoe,
    synthetic_regression,
)
from latticeflow.actions.densities.drawing import accepted, choices, on_circles, ring_radii

SAMPLES = 40_000
LEAST = 1e-6
PLANAR = {
    "two_moons": TwoMoons(),
    "circle_of_gaussians": CircleOfGaussians(),
    "circle of three": CircleOfGaussians(3, radius=1.1),
    "two_rings": TwoRings(),
}
KINKED = ("two_moons", "two_rings")
DRAWABLE = PLANAR | {
    "mixture": GaussianMixture(2, radius=1.5, weights=(0.6, 0.1, 0.3)),
    "mixture in 5d": GaussianMixture(5),
    "funnel": Funnel(4),
    "student_t": MultivariateStudentT(3),
}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def log_density(name, z):
    """The formulas of the papers, `(n, 2) -> (n,)`."""
    r, first = np.sqrt((z**2).sum(1)), np.abs(z[:, 0])
    if name == "two_moons":
        ring = -0.5 * ((r - 2) / 0.2) ** 2 - 0.5 * ((first - 2) / 0.3) ** 2
        return ring + np.log(1 + np.exp(-4 * first / 0.09))
    if name == "two_rings":
        return np.log(sum(np.exp(-((r - i) ** 2) / (2 * 0.125**2)) for i in (1, 2)))
    modes, radius = (3, 1.1) if name == "circle of three" else (8, 2.0)
    sigma = radius / 3 * math.sin(math.pi / modes)
    angles = [2 * math.pi * k / modes for k in range(modes)]
    centres = [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]
    return np.log(np.mean([stats.multivariate_normal(c, sigma**2).pdf(z) for c in centres], axis=0))


def points(n=200, *, scale=1.2, seed=1):
    return scale * torch.randn(n, 2, dtype=torch.float64, generator=seeded(seed))


@pytest.mark.parametrize("name", PLANAR)
def test_values_by_the_formulas(name):
    z = points()
    np.testing.assert_allclose(-PLANAR[name](z).numpy(), log_density(name, z.numpy()), rtol=1e-10, atol=1e-10)


def test_the_width_of_the_circle_is_that_of_the_paper():
    assert CircleOfGaussians().width == pytest.approx(2 / 3 * math.sin(math.pi / 8), rel=1e-15)


# ---------------------------------------------------------------- integrals


def test_integral_of_the_moons_by_adaptive_quadrature():
    """A quarter of the plane, in polar coordinates."""

    def integrand(r, angle):
        first = r * math.cos(angle)
        return r * math.exp(-12.5 * (r - 2) ** 2 - (first - 2) ** 2 / 0.18) * (1 + math.exp(-4 * first / 0.09))

    value, _ = integrate.dblquad(integrand, 0, math.pi / 2, 0.2, 3.8, epsabs=1e-12)
    assert TwoMoons().log_z == pytest.approx(math.log(4 * value), abs=1e-10)


def test_integral_of_the_rings_by_adaptive_quadrature():
    def integrand(r):
        return 2 * math.pi * r * sum(math.exp(-((r - i) ** 2) / (2 * 0.125**2)) for i in (1, 2))

    value, _ = integrate.quad(integrand, 0, 4, points=[1, 2], epsabs=1e-13)
    assert TwoRings().log_z == pytest.approx(math.log(value), abs=1e-11)


@pytest.mark.parametrize("name", PLANAR)
def test_integrals_on_another_grid(name):
    line = torch.linspace(-3.7, 3.9, 700, dtype=torch.float64)
    total = torch.logsumexp(-PLANAR[name](torch.cartesian_prod(line, line)), 0) + 2 * math.log(7.6 / 699)
    assert float(total) == pytest.approx(PLANAR[name].log_z, abs=1e-10)


def test_the_integral_is_computed_once():
    density = TwoMoons()
    assert density.log_z == density.__dict__["log_z"]
    assert density == TwoMoons()


# ---------------------------------------------------------------- gradients and symmetries


@pytest.mark.parametrize("name", PLANAR)
def test_first_and_second_derivatives(name):
    z = points(8, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(PLANAR[name], (z,))
    assert torch.autograd.gradgradcheck(PLANAR[name], (z,), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", PLANAR)
def test_gradients_are_finite_everywhere(name, dtype):
    """At the origin, on the axes, next to 0, and as far out as the action itself; beyond they are not NaN."""
    far, beyond, near = (1e150, 1e160, 1e-200) if dtype == torch.float64 else (1e16, 1e22, 1e-30)
    rows = [(0, 0), (0, 1), (2, 0), (0, -2), (near, 0), (near, -near), (far, 1), (-far, far), (0, far)]
    z = torch.tensor(rows, dtype=dtype)
    force = PLANAR[name].force(z)
    assert torch.isfinite(force).all()
    assert torch.isfinite(PLANAR[name](z)).all()
    assert force[0].abs().max() < (1e-4 if dtype == torch.float32 else 1e-12)
    assert ((force[-3:] / far * z[-3:]).sum(1) < 0).all()
    lost = z[-3:] * (beyond / far)
    assert PLANAR[name](lost).tolist() == [math.inf] * 3
    assert not torch.isnan(PLANAR[name].force(lost)).any()


@pytest.mark.parametrize("name", KINKED)
def test_next_to_the_kink_the_force_is_that_of_a_ring(name):
    force = PLANAR[name].force(torch.tensor([[0.0, 1e-9], [0.0, -1e-9]], dtype=torch.float64))
    size = 2 / 0.2**2 if name == "two_moons" else 1 / 0.125**2
    torch.testing.assert_close(force[:, 1], torch.tensor([size, -size], dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", PLANAR)
def test_reflections(name):
    z, density = points(), PLANAR[name]
    torch.testing.assert_close(density(z * torch.tensor([1, -1])), density(z), rtol=1e-12, atol=1e-12)
    left = density(z * torch.tensor([-1, 1]))
    assert torch.allclose(left, density(z), rtol=1e-12, atol=1e-11) == (name != "circle of three")


@pytest.mark.parametrize(("name", "turns"), [("circle_of_gaussians", 8), ("circle of three", 3), ("two_rings", 7)])
def test_rotations(name, turns):
    c, s = math.cos(2 * math.pi / turns), math.sin(2 * math.pi / turns)
    z, density = points(), PLANAR[name]
    turned = z @ torch.tensor([[c, s], [-s, c]], dtype=torch.float64)
    torch.testing.assert_close(density(turned), density(z), rtol=1e-11, atol=1e-11)
    assert not torch.allclose(TwoMoons()(turned), TwoMoons()(z), rtol=1e-3)


# ---------------------------------------------------------------- draws


@pytest.mark.parametrize("name", DRAWABLE)
def test_contract_of_draws(name):
    density = DRAWABLE[name]
    assert isinstance(density, Drawable)
    first, again, other = (density.sample(50, seeded(seed)) for seed in (1, 1, 2))
    assert first.shape == (50, density.dimension)
    assert first.dtype == torch.float64
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(torch.unique(first, dim=0)) == 50
    assert density.sample(0, seeded(1)).shape == (0, density.dimension)
    state = torch.random.get_rng_state()
    density.sample(3, seeded(1))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_posteriors_have_no_draws():
    assert not isinstance(synthetic_horseshoe(4), Drawable)
    assert not isinstance(synthetic_regression(3), Drawable)


def chi_squared(density, drawn):
    """The p-value of the counts on a grid of 60x60 cells, each integrated by 4x4 points; rare cells are one cell."""
    side, cells, fine = 6.0, 60, 4
    line = torch.linspace(-side, side, 2 * cells * fine + 1, dtype=torch.float64)[1::2]
    density_at = torch.exp(-density(torch.cartesian_prod(line, line)) - density.log_z).reshape(cells, fine, cells, fine)
    expected = len(drawn) * (density_at.sum((1, 3)) * (2 * side / cells / fine) ** 2).numpy().ravel()
    edges = np.linspace(-side, side, cells + 1)
    counts = np.histogram2d(*drawn.numpy().T, bins=(edges, edges))[0].ravel()
    often = expected > 10
    rest = [counts[~often].sum() + len(drawn) - counts.sum()], [len(drawn) - expected[often].sum()]
    counts, expected = np.append(counts[often], rest[0]), np.append(expected[often], rest[1])
    return stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), len(counts) - 1)


@pytest.mark.parametrize("name", [*PLANAR, "mixture"])
def test_draws_in_the_plane_follow_the_density(name):
    """A chi^2 test, which notices draws that are 3% too wide."""
    density = DRAWABLE[name]
    drawn = density.sample(SAMPLES, seeded(3))
    assert chi_squared(density, drawn) > LEAST
    assert chi_squared(density, 1.03 * drawn) < LEAST


@pytest.mark.parametrize("name", [*PLANAR, "mixture"])
def test_actions_of_draws_have_the_exact_mean(name):
    """The entropy, `<S> + log Z`, on a grid: the mean within 4.9 errors."""
    density = DRAWABLE[name]
    line = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    action = density(torch.cartesian_prod(line, line))
    exact = float((action * torch.exp(-action - density.log_z)).sum()) * 0.016**2
    found = density(density.sample(SAMPLES, seeded(4)))
    assert abs(float(found.mean()) - exact) < 4.9 * float(found.std()) / math.sqrt(SAMPLES)


def test_radii_of_the_rings():
    """Kolmogorov-Smirnov with the integral of `2 pi r exp(-(r - i)^2 / (2 w^2))`."""
    w = 0.125
    grid = np.linspace(0, 4, 8001)
    density = sum(grid * np.exp(-((grid - i) ** 2) / (2 * w**2)) for i in (1, 2))
    cumulative = integrate.cumulative_trapezoid(density, grid, initial=0)
    radii = TwoRings().sample(SAMPLES, seeded(5)).norm(dim=1).numpy()
    assert stats.kstest(radii, lambda r: np.interp(r, grid, cumulative / cumulative[-1])).pvalue > LEAST


@pytest.mark.parametrize(("mean", "width"), [(1.0, 0.125), (0.5, 0.5), (0.3, 2.0), (50.0, 1.0)])
def test_radii_of_a_ring_also_where_it_reaches_the_origin(mean, width):
    radii = ring_radii(torch.full((SAMPLES,), mean, dtype=torch.float64), width, seeded(6)).numpy()

    def integral(r):
        """Of `r exp(-(r - mean)^2 / (2 width^2))`, up to a constant."""
        t = (r - mean) / width
        return mean * width * math.sqrt(2 * math.pi) * special.ndtr(t) - width**2 * np.exp(-0.5 * t**2)

    low, high = integral(0.0), integral(mean + 40 * width)
    assert radii.min() > 0
    assert stats.kstest(radii, lambda r: (integral(r) - low) / (high - low)).pvalue > LEAST


def test_directions_are_uniform():
    found = on_circles(torch.full((SAMPLES,), 3.0, dtype=torch.float64), seeded(7)).numpy()
    np.testing.assert_allclose((found**2).sum(1), 9.0, rtol=1e-14)
    turns = np.arctan2(found[:, 1], found[:, 0]) / (2 * math.pi) + 0.5
    assert stats.kstest(turns, "uniform").pvalue > LEAST


def test_choices_follow_their_weights():
    weights = [0.5, 3.0, 1.5]
    counts = np.bincount(choices(weights, SAMPLES, seeded(8)).numpy(), minlength=3)
    assert stats.chisquare(counts, SAMPLES * np.array(weights) / 5).pvalue > LEAST
    assert stats.chisquare(counts, SAMPLES * np.array([0.6, 2.9, 1.5]) / 5).pvalue < LEAST


def test_accepted_points_are_those_of_the_probabilities():
    """A uniform square, its right half accepted always, its left half one time in four."""

    def propose(m):
        drawn = 2 * torch.rand(m, 2, dtype=torch.float64, generator=generator) - 1
        return drawn, torch.where(drawn[:, 0] > 0, 0.0, math.log(0.25))

    generator = seeded(9)
    found = accepted(SAMPLES, propose, generator)
    assert found.shape == (SAMPLES, 2)
    assert stats.binomtest(int((found[:, 0] > 0).sum()), SAMPLES, 0.8).pvalue > LEAST


@pytest.mark.parametrize("nu", [0.3, 1.0, 7.0])
def test_draws_of_the_student_t(nu):
    """`|x|^2 / D` has an F law, and one coordinate a t law."""
    x = MultivariateStudentT(3, degrees_of_freedom=nu).sample(SAMPLES, seeded(10)).numpy()
    assert stats.kstest((x**2).sum(1) / 3, stats.f(3, nu).cdf).pvalue > LEAST
    assert stats.kstest(x[:, 1], stats.t(nu).cdf).pvalue > LEAST


def test_draws_of_the_student_t_with_the_heaviest_tails():
    """For nu << 1, `log |x|` has the tail `e^{-nu log |x|}`: from 1e10 to 1e100, where a Gamma draw would underflow."""
    x = MultivariateStudentT(1, degrees_of_freedom=0.02).sample(SAMPLES, seeded(11)).abs()
    beyond = [int((x > size).sum()) for size in (1e10, 1e100)]
    assert stats.binomtest(beyond[1], beyond[0], 10 ** (-0.02 * 90)).pvalue > LEAST


def test_draws_of_the_funnel():
    x = Funnel(4, scale=1.7).sample(SAMPLES, seeded(12)).numpy()
    assert stats.kstest(x[:, 0] / 1.7, "norm").pvalue > LEAST
    assert stats.kstest((x[:, 1:] * np.exp(-0.5 * x[:, :1])).ravel(), "norm").pvalue > LEAST
    assert abs(stats.spearmanr(x[:, 0], np.abs(x[:, 2])).statistic) > 0.4


def test_draws_of_the_mixture_in_five_dimensions():
    """Around the nearest mean, five widths or more from the others."""
    density = GaussianMixture(5, radius=8.0, weights=(0.6, 0.1, 0.3))
    x = density.sample(SAMPLES, seeded(13))
    nearest = torch.cdist(x, density.means).argmin(1)
    assert stats.chisquare(np.bincount(nearest, minlength=3), SAMPLES * np.array(density.weights)).pvalue > LEAST
    assert stats.kstest((x - density.means[nearest]).numpy().ravel(), "norm").pvalue > LEAST


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CircleOfGaussians(1), "modes must be an integer of at least 2, got 1"),
        (lambda: CircleOfGaussians(2.5), "modes must be an integer of at least 2, got 2.5"),
        (lambda: CircleOfGaussians(radius=0.0), "radius must be positive and finite, got 0.0"),
        (lambda: CircleOfGaussians(radius=math.inf), "radius must be positive and finite, got inf"),
        (lambda: TwoMoons().field_shape((3,)), "two_moons: lattice shape [3] does not fit dimension 2, expected [2]"),
        (lambda: TwoRings()(torch.zeros(4, 3)), "two_rings: field has shape (4, 3), expected (batch, 2)"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
