"""Neal's funnel: one variable sets the width of all the others."""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from latticeflow.actions.densities.base import Density, check_positive
from latticeflow.actions.densities.normal import normal_action
from latticeflow.lattice import check_integer
from latticeflow.streams import draw_options


@dataclass(frozen=True)
class Funnel(Density):
    """`x_0 ~ N(0, scale^2)`, `x_i ~ N(0, e^{x_0})` for `i = 1..D-1`; normalised, fields `(batch, D)`.

    Raises ValueError for a dimension below 2 and a scale that is not positive and finite.
    Source: Neal, Annals of Statistics 31 (2003) 705, section 8.
    """

    dimension: int
    scale: float = 3.0

    theory = "funnel"
    log_z = 0.0

    def __post_init__(self) -> None:
        check_integer("dimension", self.dimension, low=2)
        check_positive("scale", self.scale)

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """Return n independent draws, `(n, D)`, float64."""
        normal = torch.randn(n, self.dimension, **draw_options(generator))
        neck = self.scale * normal[:, :1]
        return torch.cat([neck, torch.exp(0.5 * neck) * normal[:, 1:]], dim=1)

    def _action(self, x: Tensor) -> Tensor:
        neck, others = x[:, :1], x[:, 1:]
        log_scale = torch.full_like(neck, math.log(self.scale))
        return normal_action(neck, log_scale)[:, 0] + normal_action(others, 0.5 * neck).sum(1)
