"""The Schwinger model: two-dimensional QED with Wilson fermions, the determinant included exactly."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from latticeflow.actions.base import Action, check_coupling
from latticeflow.actions.u1 import U1Action
from latticeflow.dirac import log_abs_det
from latticeflow.u1 import shift_holonomies


@dataclass(frozen=True)
class SchwingerAction(Action):
    """`S = -beta sum_x cos P(x) - flavours * log|det M(kappa)|` for links `(batch, 2, L0, L1)`.

    Raises ValueError for a negative or non-finite beta, kappa outside [0, 0.5), or flavours not a positive integer.
    """

    beta: float
    kappa: float
    flavours: int = 2

    theory = "schwinger"
    field_name = "links"

    def __post_init__(self) -> None:
        check_coupling("beta", self.beta, low=0.0)
        check_coupling("kappa", self.kappa, low=0.0, below=0.5)
        if not isinstance(self.flavours, int) or self.flavours < 1:
            raise ValueError(f"flavours must be a positive integer, got {self.flavours!r}")

    @property
    def gauge(self) -> U1Action:
        """Return the gauge part of the action."""
        return U1Action(self.beta)

    def __call__(self, field: Tensor) -> Tensor:
        return self.gauge(field) - self.flavours * log_abs_det(field, self.kappa)[0]

    def force(self, field: Tensor) -> Tensor:
        """Return `-dS/dtheta`, the determinant's part by the adjoint of the cyclic reduction."""
        with torch.enable_grad():
            leaf = field.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(log_abs_det(leaf, self.kappa)[0].sum(), leaf)
        return self.gauge.force(field.detach()) + self.flavours * gradient

    def wrap(self, field: Tensor) -> Tensor:
        return self.gauge.wrap(field)

    def field_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.gauge.field_shape(shape)

    def at_holonomies(self, links: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return S after every holonomy shift by `2 pi (i / G0, j / G1)`, `(batch, G0, G1)`.

        One cyclic reduction per spatial shift serves all temporal ones.
        """
        g0, g1 = grid
        twists = 2 * math.pi * torch.arange(g0, dtype=links.dtype, device=links.device) / g0
        spatial = 2 * math.pi * torch.arange(g1, dtype=links.dtype, device=links.device) / g1
        shifts = torch.stack([torch.zeros_like(spatial), spatial], dim=-1).repeat(len(links), 1)
        shifted = shift_holonomies(links.repeat_interleave(g1, dim=0), shifts)
        log_det = log_abs_det(shifted, self.kappa, twists=twists)[0].reshape(len(links), g1, g0)
        return self.gauge(links)[:, None, None] - self.flavours * log_det.mT
