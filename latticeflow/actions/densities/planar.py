"""Densities of the plane with several modes: the benchmark targets of piecewise flows (arXiv:2305.02930)."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Generator, Tensor

from latticeflow.actions.densities.base import Density, check_positive
from latticeflow.actions.densities.drawing import accepted, choices, on_circles, ring_radii
from latticeflow.actions.densities.normal import HALF_LOG_TWO_PI
from latticeflow.lattice import check_integer
from latticeflow.streams import device_options, draw_options

MOONS, MOONS_DEPTH, MOONS_RADIUS, MOONS_WIDTH = (-2.0, 2.0), 0.3, 2.0, 0.2
GRID_SIDE, GRID_POINTS = 5.0, 401
RINGS, RINGS_WIDTH = (1.0, 2.0), 0.125


@dataclass(frozen=True)
class TwoMoons(Density):
    r"""Two crescents, left and right on a circle of radius 2, for fields `(batch, 2)`:

        -S = -1/2 ((|z| - 2) / 0.2)^2 - 1/2 ((|z_0| - 2) / 0.3)^2 + log(1 + exp(-4 |z_0| / 0.09))

    The last two terms are `log[ e^{-((z_0 - 2) / 0.3)^2 / 2} + e^{-((z_0 + 2) / 0.3)^2 / 2} ]`, smooth in z_0. At the
    origin, where |z| has a kink, its gradient is taken as 0.
    Source: Rezende and Mohamed, arXiv:1505.05770, table 1 (potential 1), as in arXiv:2305.02930.
    """

    theory = "two_moons"
    dimension = 2

    @cached_property
    def log_z(self) -> float:
        """Return the logarithm of the integral, by the trapezoidal rule, whose error is below 1e-13."""
        line = torch.linspace(-GRID_SIDE, GRID_SIDE, GRID_POINTS, dtype=torch.float64)
        total = torch.logsumexp(-self._action(torch.cartesian_prod(line, line)), dim=0)
        return float(total) + 2 * math.log(2 * GRID_SIDE / (GRID_POINTS - 1))

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """Return n independent draws, `(n, 2)`, float64: points of a ring, accepted by their first coordinate."""
        log_bound = math.log1p(math.exp(-0.5 * (MOONS_RADIUS / MOONS_DEPTH) ** 2))

        def propose(m: int) -> tuple[Tensor, Tensor]:
            means = torch.full((m,), MOONS_RADIUS, **device_options(generator))
            points = on_circles(ring_radii(means, MOONS_WIDTH, generator), generator)
            return points, _log_pair(points[:, 0], MOONS, MOONS_DEPTH) - log_bound

        return accepted(n, propose, generator)

    def _action(self, x: Tensor) -> Tensor:
        return 0.5 * ((radius(x) - MOONS_RADIUS) / MOONS_WIDTH) ** 2 - _log_pair(x[:, 0], MOONS, MOONS_DEPTH)


@dataclass(frozen=True)
class CircleOfGaussians(Density):
    r"""Equal Gaussians on a circle, normalised, for fields `(batch, 2)`:

        exp(-S) = (1/modes) sum_k N(z; c_k, sigma^2),   c_k = radius (cos, sin)(2 pi k / modes)

    with `sigma = (radius/3) sin(pi/modes)`, a sixth of the distance between neighbours. Raises ValueError for less than
    two modes and a radius that is not positive and finite. Source: arXiv:2305.02930.
    """

    modes: int = 8
    radius: float = 2.0

    theory = "circle_of_gaussians"
    dimension = 2
    log_z = 0.0

    def __post_init__(self) -> None:
        check_integer("modes", self.modes, low=2)
        check_positive("radius", self.radius)

    @property
    def width(self) -> float:
        """Return sigma."""
        return self.radius / 3 * math.sin(math.pi / self.modes)

    @property
    def means(self) -> Tensor:
        """Return the centres, `(modes, 2)`, float64."""
        angles = 2 * math.pi / self.modes * torch.arange(self.modes, dtype=torch.float64)
        return self.radius * torch.stack([torch.cos(angles), torch.sin(angles)], dim=1)

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """Return n independent draws, `(n, 2)`, float64."""
        normal = torch.randn(n, 2, **draw_options(generator))
        return self.means.to(normal)[choices([1.0] * self.modes, n, generator)] + self.width * normal

    def _action(self, x: Tensor) -> Tensor:
        means, variance = self.means.to(x), self.width**2
        nearest = means[(x.detach() @ means.T).argmax(dim=1)]
        others = (x[:, None] * (means - nearest[:, None])).sum(-1) / variance  # |c_k| is the same for all k
        constant = 2 * HALF_LOG_TWO_PI + math.log(variance) + math.log(self.modes)
        return constant + 0.5 * ((x - nearest) ** 2).sum(1) / variance - torch.logsumexp(others, dim=1)


@dataclass(frozen=True)
class TwoRings(Density):
    r"""Two concentric rings, for fields `(batch, 2)`: `exp(-S) = sum_{m=1,2} exp(-(|z| - m)^2 / (2 0.125^2))`.

    At the origin, where |z| has a kink, its gradient is taken as 0. Source: arXiv:2305.02930.
    """

    theory = "two_rings"
    dimension = 2

    @cached_property
    def log_z(self) -> float:
        """Return the logarithm of the integral, in closed form."""
        return math.log(sum(map(_ring_integral, RINGS)))

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """Return n independent draws, `(n, 2)`, float64: a ring by its integral, then radius and angle."""
        means = torch.tensor(RINGS, **device_options(generator))
        which = choices([_ring_integral(mean) for mean in RINGS], n, generator)
        return on_circles(ring_radii(means[which], RINGS_WIDTH, generator), generator)

    def _action(self, x: Tensor) -> Tensor:
        distance = radius(x)
        return -_log_pair(distance, RINGS, RINGS_WIDTH)


def radius(x: Tensor) -> Tensor:
    """Return `|x|`, `(batch, 2) -> (batch,)`, without overflow; its gradient at the origin is 0."""
    origin = (x == 0).all(dim=1)
    first, second = torch.where(origin, 1.0, x[:, 0]), torch.where(origin, 0.0, x[:, 1])
    return torch.where(origin, 0.0, torch.hypot(first, second))


def _log_pair(x: Tensor, centres: tuple[float, float], width: float) -> Tensor:
    """Return `log[ e^{-((x - a) / width)^2 / 2} + e^{-((x - b) / width)^2 / 2} ]`, elementwise, (a, b) the centres.

    The difference of the exponents is linear in x, so the gradient is finite where their squares overflow.
    """
    a, b = centres
    difference = (b - a) / width**2 * (x - 0.5 * (a + b))
    return -0.5 * ((x - a) / width) ** 2 + torch.logaddexp(difference, torch.zeros_like(difference))


def _ring_integral(mean: float) -> float:
    """Return `2 pi int_0^inf r exp(-(r - mean)^2 / (2 width^2)) dr`."""
    scaled = mean / (math.sqrt(2) * RINGS_WIDTH)
    tail, bulk = RINGS_WIDTH**2 * math.exp(-(scaled**2)), math.sqrt(math.pi / 2) * (1 + math.erf(scaled))
    return 2 * math.pi * (tail + mean * RINGS_WIDTH * bulk)
