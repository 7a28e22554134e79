"""Three Gaussians at the corners of a triangle: separated modes of unequal weight."""

import math
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Generator, Tensor

from latticeflow.actions.base import check_coupling
from latticeflow.actions.densities.base import Density, check_positive
from latticeflow.actions.densities.drawing import choices
from latticeflow.actions.densities.normal import HALF_LOG_TWO_PI
from latticeflow.lattice import check_integer
from latticeflow.streams import draw_options

CORNERS = 3


@dataclass(frozen=True)
class GaussianMixture(Density):
    r"""`exp(-S) = sum_k w_k N(x; mu_k, 1)`, k = 0, 1, 2, normalised, for fields `(batch, D)`.

    The means are the corners of an equilateral triangle of circumradius `radius` in a plane that involves all
    coordinates, in pairs: `radius / sqrt(D // 2) (cos, sin, cos, sin, ...)(2 pi k / 3)`, the last one 0 for odd D.
    Raises ValueError for a dimension below 2, a negative or non-finite radius, and weights that are not three positive
    numbers which add up to 1.
    """

    dimension: int
    radius: float = 3.0
    _: KW_ONLY
    weights: tuple[float, float, float] = (0.5, 0.3, 0.2)

    theory = "mixture"
    log_z = 0.0

    def __post_init__(self) -> None:
        check_integer("dimension", self.dimension, low=2)
        check_coupling("radius", self.radius, low=0.0)
        object.__setattr__(self, "weights", tuple(check_positive("weights", weight) for weight in self.weights))
        if len(self.weights) != CORNERS or not math.isclose(sum(self.weights), 1.0, abs_tol=1e-9):
            raise ValueError(f"weights must be three positive numbers that add up to 1, got {self.weights!r}")

    @property
    def means(self) -> Tensor:
        """Return the means of the three components, `(3, D)`, float64."""
        angles = 2 * math.pi / CORNERS * torch.arange(CORNERS, dtype=torch.float64)[:, None]
        pairs = self.dimension // 2
        corners = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1).repeat(1, pairs)
        padded = torch.nn.functional.pad(corners, (0, self.dimension % 2))
        return self.radius / math.sqrt(pairs) * padded

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """Return n independent draws, `(n, D)`, float64."""
        normal = torch.randn(n, self.dimension, **draw_options(generator))
        return self.means.to(normal)[choices(self.weights, n, generator)] + normal

    def _action(self, x: Tensor) -> Tensor:
        squares = ((x[:, None] - self.means.to(x)) ** 2).sum(-1)
        log_weights = torch.log(torch.tensor(self.weights, dtype=torch.float64)).to(x)
        return self.dimension * HALF_LOG_TWO_PI - torch.logsumexp(log_weights - 0.5 * squares, dim=1)
