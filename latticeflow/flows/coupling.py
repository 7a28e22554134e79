"""Couplings of real fields: the active sites of a mask move, by a map that the frozen ones choose.

The map acts on each active site by itself, so the log-determinant is a sum over them and the inverse is exact
(arXiv:1605.08803, affine; 1906.04032, rational-quadratic splines).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from latticeflow.flows.asked import without
from latticeflow.flows.bijection import Move, Mover, Sequential
from latticeflow.flows.clamps import Clamp
from latticeflow.flows.networks import SiteConditioner
from latticeflow.flows.site_masks import check_mask, mask_cycle
from latticeflow.flows.spline import tailed_forward, tailed_inverse, tailed_spline
from latticeflow.lattice import Shape

TRANSFORMS = ("affine", "spline")
MOST_BINS = 64
CYCLE = 2
"""Couplings that move every site once: a mask and its opposite."""
DEFAULT_CLAMP = Clamp()


class SiteMap(nn.Module, ABC):
    """An increasing map of the line with parameters `(..., outputs)`, 0 for (nearly) the identity.

    `forward(parameters, z) -> (x, log dx/dz)`, elementwise, and back. `reflect` turns the parameters of `f(z)` into
    those of `-f(-z)`.
    """

    outputs: int
    compiled = False

    @abstractmethod
    def forward(self, parameters: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map latent to field."""

    @abstractmethod
    def inverse(self, parameters: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map field to latent."""

    @abstractmethod
    def reflect(self, parameters: Tensor) -> Tensor:
        """Return the parameters of `-f(-z)`."""


class AffineMap(SiteMap):
    """`x = z exp(c(s)) + t`, c being a soft clamp and `(s, t)` the parameters."""

    outputs = 2

    def __init__(self, clamp: Clamp) -> None:
        super().__init__()
        self.clamp = clamp

    def forward(self, parameters: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = self._log_scale(parameters)
        return z * torch.exp(log_scale) + parameters[..., 1], log_scale

    def inverse(self, parameters: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = self._log_scale(parameters)
        return (x - parameters[..., 1]) * torch.exp(-log_scale), -log_scale

    def reflect(self, parameters: Tensor) -> Tensor:
        return parameters * parameters.new_tensor([1.0, -1.0])

    def _log_scale(self, parameters: Tensor) -> Tensor:
        return self.clamp(parameters[..., 0])


class SplineMap(SiteMap):
    """A rational-quadratic spline of `[-bound, bound]` with `bins` bins and linear tails, then an affine map."""

    def __init__(self, clamp: Clamp, *, bins: int, bound: float) -> None:
        super().__init__()
        if not 2 <= bins <= MOST_BINS:
            raise ValueError(f"bins must be from 2 to {MOST_BINS}, got {bins!r}")
        if not 0 < bound < math.inf:
            raise ValueError(f"bound must be positive and finite, got {bound!r}")
        self.affine, self.bins, self.bound = AffineMap(clamp), bins, bound
        self.outputs = 2 + 3 * bins - 1

    def forward(self, parameters: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        y, log_slope = tailed_forward(
            tailed_spline(parameters[..., 2:], self.bound, compiled=self.compiled), z, self.bound
        )
        x, log_scale = self.affine(parameters, y)
        return x, log_slope + log_scale

    def inverse(self, parameters: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_scale = self.affine.inverse(parameters, x)
        z, log_slope = tailed_inverse(
            tailed_spline(parameters[..., 2:], self.bound, compiled=self.compiled), y, self.bound
        )
        return z, log_slope + log_scale

    def reflect(self, parameters: Tensor) -> Tensor:
        pieces = parameters[..., 2:].split([self.bins, self.bins, self.bins - 1], dim=-1)
        return torch.cat([self.affine.reflect(parameters[..., :2]), *(piece.flip(-1) for piece in pieces)], dim=-1)


class Coupling(Mover):
    """A map of each active site of `mask`, with parameters that a network reads off the frozen sites.

    Fields `(batch, *shape)`, the mask's shape. With `odd` the layer commutes with `z -> -z`, the Z2 symmetry of phi^4:
    its parameters are `(f(frozen) + R f(-frozen)) / 2`, R being the map's reflection. `conditioner` are the settings
    of `SiteConditioner`. Raises ValueError for a mask without active or frozen sites.
    """

    def __init__(self, mask: Tensor, site_map: SiteMap, *, odd: bool = False, **conditioner: Any) -> None:
        super().__init__()
        check_mask(mask)
        self.register_buffer("active", mask.flatten().nonzero().flatten(), persistent=False)
        self.register_buffer("frozen", (~mask).flatten().nonzero().flatten(), persistent=False)
        self.shape, self.odd, self.site_map = tuple(mask.shape), odd, site_map
        self.network = SiteConditioner(mask, site_map.outputs, **conditioner)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, log_slope, *_ = self._apply_map(self.site_map.forward, z)
        return x, log_slope.sum(1)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_slope, *_ = self._apply_map(self.site_map.inverse, x)
        return z, log_slope.sum(1)

    def move(self, z: Tensor) -> tuple[Tensor, Move]:
        x, log_slope, moved, active = self._apply_map(self.site_map.forward, z)
        own = torch.zeros_like(log_slope)
        if not isinstance(self.site_map, AffineMap):  # whose slope does not depend on where it is
            with without("parameters"):
                (own,) = torch.autograd.grad(log_slope.sum(), active, retain_graph=True)
        return x, Move(self.active, moved, log_slope, own)

    def _apply_map(
        self, site_map: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], field: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the field, the logarithmic slopes of the active sites, and these after and before."""
        if field.shape[1:] != self.shape:
            raise ValueError(f"a mask of shape {list(self.shape)} does not fit fields of shape {list(field.shape)}")
        flat = field.flatten(1)
        parameters = self._conditioned(flat.index_select(1, self.frozen))
        active = flat.index_select(1, self.active)
        moved, log_slope = site_map(parameters, active)
        return flat.index_copy(1, self.active, moved).reshape(field.shape), log_slope, moved, active

    def _conditioned(self, frozen: Tensor) -> Tensor:
        if not self.odd:
            return self.network(frozen)
        plus, minus = self.network(torch.cat([frozen, -frozen])).chunk(2)
        return 0.5 * (plus + self.site_map.reflect(minus))


def coupling_flow(
    shape: Shape,
    *,
    layers: int,
    mask: str = "checkerboard",
    transform: str = "affine",
    clamp: Clamp = DEFAULT_CLAMP,
    bins: int = 8,
    bound: float = 3.0,
    hidden: Sequence[int] = (64,),
    **coupling: Any,
) -> Sequential:
    """Return `layers` couplings with the masks of one kind in turn; the other settings are those of `Coupling`.

    Raises ValueError for an unknown mask or transform, and a mask
    that does not fit the shape.
    """
    if transform not in TRANSFORMS:
        raise ValueError(f"transform must be one of {', '.join(TRANSFORMS)}, got {transform!r}")

    def site_map() -> SiteMap:
        if transform == "affine":
            return AffineMap(clamp)
        return SplineMap(clamp, bins=bins, bound=bound)

    couplings = (Coupling(one, site_map(), hidden=hidden, **coupling) for one in mask_cycle(mask, shape, layers))
    return Sequential(couplings, cycle=CYCLE)
