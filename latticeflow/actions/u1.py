"""Pure compact U(1) gauge theory in two dimensions."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from latticeflow.actions.base import Action, check_coupling
from latticeflow.lattice import check_shape, shift, site_sum
from latticeflow.u1 import plaquette, wrap


@dataclass(frozen=True)
class U1Action(Action):
    """`S = -beta sum_x cos P(x)` for links `(batch, 2, L0, L1)`.

    Raises ValueError for a negative or non-finite beta.
    """

    beta: float

    theory = "u1"
    field_name = "links"

    def __post_init__(self) -> None:
        check_coupling("beta", self.beta, low=0.0)

    def __call__(self, field: Tensor) -> Tensor:
        return -self.beta * site_sum(torch.cos(plaquette(field)))

    def force(self, field: Tensor) -> Tensor:
        """Return `-dS/dtheta`: `beta sin P` of the two plaquettes that hold a link, with their signs."""
        sine = self.beta * torch.sin(plaquette(field))
        return torch.stack([shift(sine, 1, -1) - sine, sine - shift(sine, 0, -1)], dim=-3)

    def wrap(self, field: Tensor) -> Tensor:
        """Return the links on `(-pi, pi]`; those that are there already stay as they are, bit for bit."""
        outside = (field > math.pi) | (field <= -math.pi)
        return torch.where(outside, wrap(field), field)

    def field_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return 2, *check_shape(shape, dimensions=2)

    def at_holonomies(self, links: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return S after every holonomy shift by `2 pi (i / G0, j / G1)`, `(batch, G0, G1)`: here all are the same."""
        return self(links)[:, None, None].expand(-1, *grid)
