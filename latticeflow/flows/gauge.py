"""Gauge-equivariant couplings for U(1) links in two dimensions (arXiv:2003.06413; 2202.11712).

A link enters only through gauge-invariant loops, and its update is a function of them: with an active plaquette
`P -> P'`, `theta_mu(x) -> theta_mu(x) +- (P' - P)`, the sign with which the link enters its plaquette. Gauge
transformations therefore commute with the layer and the log-determinant is that of the map of plaquettes.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from latticeflow.flows.bijection import Bijection, Sequential
from latticeflow.flows.masks import StripeMask, stripe_cycle
from latticeflow.flows.networks import Conditioner
from latticeflow.flows.spline import circular_spline, spline_forward, spline_inverse
from latticeflow.lattice import Shape
from latticeflow.u1 import plaquette, sawtooth, wrap

FEATURES, CONTEXTS = 8, 2


class PlaquetteCoupling(Bijection):
    """A circular spline and a shift of the active plaquettes of one mask, conditioned on the frozen loops.

    The conditioner sees cos and sin of the two frozen plaquettes of each cell and of the 2x1 loops around them and
    around the active and passive plaquettes. It works on cells, V/4 places. A "global" one connects each cell to all of
    them in its first layer, by distance, and goes on cell by cell: the screening of the charge density by fermions is
    long-ranged. A "local" one is made of `kernel x kernel` convolutions with `dilations` (1 where not given). Either
    also knows the frozen charge (`frozen_charge`): without it a flow can hardly tell the topological sectors apart, in
    which the determinant is very different. Raises ValueError for another conditioner.
    """

    def __init__(
        self,
        mask: StripeMask,
        *,
        bins: int = 6,
        hidden: Sequence[int] = (64, 64),
        conditioner: Literal["global", "local"] = "global",
        kernel: int = 3,
        dilations: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.sign = 1.0 if mask.mu == 0 else -1.0
        self.register_buffer("active_links", mask.active_links(), persistent=False)
        self.register_buffer("columns", torch.stack([mask.sites(c) for c in range(-1, 3)]).flatten(), persistent=False)
        if conditioner not in ("global", "local"):
            raise ValueError(f"conditioner must be 'global' or 'local', got {conditioner!r}")
        if conditioner == "global":
            tables = [mask.all_cells(), *[mask.neighbours(1)] * len(hidden)]
        else:
            tables = [mask.neighbours(kernel, dilation) for dilation in dilations or [1] * (len(hidden) + 1)]
        self.network = Conditioner([FEATURES, *hidden, 3 * bins + 1], tables, contexts=CONTEXTS)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        active, parameters = self._condition(z)
        new, log_slope = spline_forward(circular_spline(parameters[..., 1:]), active)
        return self._update(z, active, new + parameters[..., 0]), log_slope.sum(-1)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        active, parameters = self._condition(x)
        old, log_slope = spline_inverse(circular_spline(parameters[..., 1:]), active - parameters[..., 0])
        return self._update(x, active, old), log_slope.sum(-1)

    def _condition(self, links: Tensor) -> tuple[Tensor, Tensor]:
        """Return the active plaquettes `(batch, cells)` and their splines' parameters."""
        loops = plaquette(links).flatten(1).index_select(1, self.columns).unflatten(1, (4, -1))
        passive, active, frozen, next_frozen = loops.unbind(1)
        invariants = torch.stack([passive + active, frozen, next_frozen, frozen + next_frozen], dim=-1)
        cosine, sine = torch.cos(invariants), torch.sin(invariants)
        charge = frozen_charge(cosine[..., :3], sine[..., :3])
        charge = charge / torch.sqrt(1 + charge**2)  # bounded: far from the vacuum it would make the map chaotic
        return active, self.network(torch.cat([cosine, sine], dim=-1), torch.stack([charge, charge**2], dim=-1))

    def _update(self, links: Tensor, old: Tensor, new: Tensor) -> Tensor:
        moved = links.flatten(1).index_add(1, self.active_links, self.sign * (new - old))
        return wrap(moved).reshape(links.shape)


def frozen_charge(cosine: Tensor, sine: Tensor) -> Tensor:
    """Return `(1/2pi) sum sawtooth(loop)` over loops that tile the lattice, `(batch, cells, 3) -> (batch,)`.

    Each active plaquette is joined with its passive one, so the layer cannot change it. With `wrap` for the sawtooth
    it would be an integer, nearly always the topological charge, and jump; pathwise gradients do not see jumps and
    would be biased.
    """
    return sawtooth(cosine, sine).sum(dim=(1, 2)) / (2 * math.pi)


def gauge_flow(shape: Shape, *, layers: int, **coupling: Any) -> Sequential:
    """Return `layers` plaquette couplings with the stripe masks in turn; 8 layers update every link once."""
    return Sequential(PlaquetteCoupling(mask, **coupling) for mask in stripe_cycle(shape, layers))
