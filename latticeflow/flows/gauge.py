"""Gauge-equivariant couplings for U(1) links in two dimensions (arXiv:2003.06413; 2202.11712).

A link enters only through gauge-invariant loops, and its update is a function of them: with an active plaquette
`P -> P'`, `theta_mu(x) -> theta_mu(x) +- (P' - P)`, the sign with which the link enters its plaquette. Gauge
transformations therefore commute with the layer and the log-determinant is that of the map of plaquettes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from latticeflow.flows.asked import without
from latticeflow.flows.bijection import Bijection, Move, Mover, Sequential
from latticeflow.flows.holonomy import HolonomyCoupling
from latticeflow.flows.masks import CYCLE, StripeMask, stripe_cycle
from latticeflow.flows.networks import Conditioner, Postponed
from latticeflow.flows.spline import (
    Spline,
    circular_spline,
    spline_forward,
    spline_forward_held,
    spline_inverse,
    tailed_forward,
    tailed_inverse,
    tailed_spline,
)
from latticeflow.lattice import Shape, check_integer
from latticeflow.u1 import links_gradient, plaquette, polyakov_loop, sawtooth, sawtooth_slope, wrap

FEATURES, CONTEXTS, POLYAKOV = 8, 2, 4
BINS = 6
PAIR, FROZEN, AHEAD = (0, 4), (1, 2, 3, 5, 6, 7), 2
"""Features of the active and passive plaquettes of a cell, and of the frozen ones two sites further along nu."""

PlaquetteMap = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
TailedMap = Callable[[Spline, Tensor, float], tuple[Tensor, Tensor]]


class PlaquetteCoupling(Mover):
    """A circular spline and a shift of the active plaquettes of one mask, conditioned on the frozen loops.

    The conditioner sees cos and sin of the two frozen plaquettes of each cell and of the 2x1 loops around them and
    around the active and passive plaquettes. It works on cells, V/4 places. A "global" one connects each cell to all of
    them in its first layer, by distance, and goes on cell by cell: the screening of the charge density by fermions is
    long-ranged. A "local" one is made of `kernel x kernel` convolutions with `dilations` (1 where not given). Either
    also knows the frozen charge (`frozen_charge`): without it a flow can hardly tell the topological sectors apart, in
    which the determinant is very different. With `polyakov` it also sees cos and sin of two frozen Polyakov loops, the
    one of direction nu through the active link and the one of direction mu next to it; without, it is blind to the
    holonomies. Raises ValueError for another conditioner.
    """

    compiled = False

    def __init__(
        self,
        mask: StripeMask,
        *,
        bins: int = BINS,
        hidden: Sequence[int] = (64, 64),
        conditioner: Literal["global", "local"] = "global",
        kernel: int = 3,
        dilations: Sequence[int] | None = None,
        polyakov: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("sign", torch.tensor(1.0 if mask.mu == 0 else -1.0), persistent=False)
        self.register_buffer("active_links", mask.active_links(), persistent=False)
        self.register_buffer("columns", torch.stack([mask.sites(c) for c in range(-1, 3)]).flatten(), persistent=False)
        self.register_buffer("column_of", self.columns.argsort(), persistent=False)
        if conditioner not in ("global", "local"):
            raise ValueError(f"conditioner must be 'global' or 'local', got {conditioner!r}")
        if conditioner == "global":
            tables = [mask.all_cells(), *[mask.neighbours(1)] * len(hidden)]
        else:
            tables = [mask.neighbours(kernel, dilation) for dilation in dilations or [1] * (len(hidden) + 1)]
        steps = [1] * len(tables) if dilations is None else dilations
        self.windows = [] if conditioner == "global" else [mask.steps(kernel, dilation) for dilation in steps]
        self.mu, self.polyakov = mask.mu, polyakov
        if polyakov:
            self.register_buffer("winding", torch.stack(mask.frozen_windings()), persistent=False)
        self.mask, self.sees_all, self.features = mask, conditioner == "global", FEATURES + POLYAKOV * polyakov
        self.network = Conditioner([self.features, *hidden, self.parameters_of(bins)], tables, contexts=CONTEXTS)

    @staticmethod
    def parameters_of(bins: int) -> int:
        """Return the number of parameters of one plaquette's map."""
        return 3 * bins + 1

    @torch.no_grad()
    def use_nearest_images(self) -> None:
        """Move weights of cells that are the same on this lattice to the nearest of their images, evenly if several.

        The map on this lattice stays as it is, but for rounding. On a larger one, where the images are different cells,
        the weights then are those of the nearest: of 8 extents a local conditioner sees both cells of a row twice.
        """
        for place, (layer, steps) in enumerate(zip(self.network.layers, self.windows, strict=False)):
            layer.gather_images((steps**2).sum(1), None if place else PAIR)
            if place == 0:
                layer.gather_images(((steps + steps.new_tensor([0, AHEAD])) ** 2).sum(1), FROZEN)

    def spread(self, weight: Tensor, larger: Shape) -> Tensor:
        """Return the first layer's weight for a larger lattice, all cells of which it sees: that of nearest images."""
        by_cell = weight.unflatten(1, (-1, self.features))
        images = [self.mask.nearest(larger, AHEAD * (k in FROZEN)) for k in range(self.features)]
        return torch.einsum("lsf,hsf->hlf", torch.stack(images, dim=-1).to(weight), by_cell).flatten(1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, log_slope, *_ = self._apply_map(z, self._map)
        return x, log_slope.sum(-1)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_slope, *_ = self._apply_map(x, self._inverse_map)
        return z, log_slope.sum(-1)

    def carry_score(self, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if torch.is_grad_enabled() or not self.written:
            return super().carry_score(z, score)
        x, log_slope, carried, seen = self._sweep(z, score)
        if Postponed.current is not None:
            self.network.postpone(*seen)
        return x, log_slope.sum(1), carried

    @property
    def written(self) -> bool:
        """Whether its derivatives are written out, so that a score is carried without autograd."""
        return not self.polyakov

    def _sweep(self, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[Any, ...]]:
        """Do what `Mover.carry_score` does, with derivatives that are written out.

        Return the field, the logarithmic slopes, the score, and all that the network saw and the derivatives by that.
        """
        active, _, features, context = self._seen(z)
        outputs = self.network.outputs(features, context)
        spline = circular_spline(outputs[-1][..., 1:])
        new, log_slope, own_slope, pull = spline_forward_held(spline, active)
        x = self._moved(z, self.sign * (new + outputs[-1][..., 0] - active))
        flat = score.flatten(1)
        moved = (flat.index_select(1, self.active_links) - self.sign * own_slope) * torch.exp(-log_slope)
        of_new = self.sign * moved
        of_spline, of_angle = pull(of_new, torch.ones_like(of_new))
        of_last = torch.cat([of_new[..., None], of_spline], dim=-1)
        of_outputs, of_features, of_context = self.network.pull(features, outputs, of_last)
        of_links = self._seen_gradient(features, context, of_angle - of_new, of_features, of_context)
        carried = (flat - of_links.flatten(1)).index_copy(1, self.active_links, moved)
        return x, log_slope, carried.reshape(score.shape), (features, context, outputs, of_outputs)

    def _seen_gradient(
        self, features: Tensor, context: Tensor, of_active: Tensor, of_features: Tensor, of_context: Tensor
    ) -> Tensor:
        """Return the derivative by the links, given those by the active plaquettes and by what the network sees."""
        (cosine, sine), (of_cosine, of_sine) = features.chunk(2, dim=-1), of_features.chunk(2, dim=-1)
        charge, of_charge = context[:, :1], of_context[:, :1] + 2 * context[:, :1] * of_context[:, 1:]
        of_charge = of_charge * (1 - charge**2) ** 1.5 / (2 * math.pi)  # of the charge before it was bounded
        of_loops = torch.addcmul(cosine * of_sine, sine, of_cosine, value=-1)
        by_charge = of_charge[..., None] * sawtooth_slope(cosine[..., :3], sine[..., :3])
        both, first, second = (of_loops[..., :3] + by_charge).unbind(-1)
        two = of_loops[..., 3]
        of_columns = torch.stack([both, both + of_active, first + two, second + two], dim=1).flatten(1)
        return links_gradient(of_columns.index_select(1, self.column_of).reshape(-1, *self.mask.shape))

    def move(self, z: Tensor) -> tuple[Tensor, Move]:
        x, log_slope, change, ends = self._apply_map(z, self._map)
        with without("parameters"):
            slopes = torch.autograd.grad(
                log_slope, ends, torch.ones_like(log_slope), retain_graph=True, allow_unused=True
            )
        of_active, of_passive = (torch.zeros_like(log_slope) if slope is None else slope for slope in slopes)
        return x, Move(self.active_links, change, log_slope, self.sign * (of_active - of_passive))

    def _map(self, parameters: Tensor, active: Tensor, passive: Tensor) -> tuple[Tensor, Tensor]:
        new, log_slope = spline_forward(circular_spline(parameters[..., 1:], compiled=self.compiled), active)
        return new + parameters[..., 0], log_slope

    def _inverse_map(self, parameters: Tensor, active: Tensor, passive: Tensor) -> tuple[Tensor, Tensor]:
        return spline_inverse(circular_spline(parameters[..., 1:], compiled=self.compiled), active - parameters[..., 0])

    def _apply_map(
        self, links: Tensor, plaquette_map: PlaquetteMap
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Map the active plaquettes `(batch, cells)`, as links that pass the change on to the passive ones.

        Return the links, the logarithmic slopes, the change of the active links, and what was mapped.
        """
        active, passive, parameters = self._conditioned(links)
        mapped = active.view_as(active), passive.view_as(passive)  # apart from what the network saw of them
        new, log_slope = plaquette_map(parameters, *mapped)
        change = self.sign * (new - mapped[0])
        return self._moved(links, change), log_slope, change, mapped

    def _moved(self, links: Tensor, change: Tensor) -> Tensor:
        return wrap(links.flatten(1).index_add(1, self.active_links, change)).reshape(links.shape)

    def _conditioned(self, links: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the active and the passive plaquettes and what the frozen loops say about their map."""
        active, passive, features, context = self._seen(links)
        return active, passive, self.network(features, context)

    def _seen(self, links: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the active and the passive plaquettes, and what the network sees of the frozen loops."""
        loops = plaquette(links).flatten(1).index_select(1, self.columns).unflatten(1, (4, -1))
        passive, active, frozen, next_frozen = loops.unbind(1)
        invariants = torch.stack([passive + active, frozen, next_frozen, frozen + next_frozen], dim=-1)
        cosine, sine = torch.cos(invariants), torch.sin(invariants)
        charge = self._charge(loops, cosine[..., :3], sine[..., :3])
        charge = charge / torch.sqrt(1 + charge**2)  # bounded: far from the vacuum it would make the map chaotic
        context = torch.stack([charge, charge**2], dim=-1)
        return active, passive, torch.cat([cosine, sine, *self._polyakov(links)], dim=-1), context

    def _polyakov(self, links: Tensor) -> list[Tensor]:
        """Return cos and sin of the two frozen loops, each `(batch, cells, 2)`, where they are seen."""
        if not self.polyakov:
            return []
        across, along = self.winding
        loops = [polyakov_loop(links, 1 - self.mu)[:, across], polyakov_loop(links, self.mu)[:, along]]
        angles = torch.stack(loops, dim=-1)
        return [torch.cos(angles), torch.sin(angles)]

    def _charge(self, loops: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        return frozen_charge(cosine, sine)


class SectorCoupling(PlaquetteCoupling):
    r"""A coupling that never changes the topological charge, which it therefore knows exactly.

    Active and passive plaquette, wrapped, change by opposite amounts, so their sum s is frozen. Neither passes pi as
    long as the active one stays within `h = pi - |s| / 2` of `s / 2`: a spline with fixed ends maps that interval onto
    itself, `P' = s / 2 + (h / pi) f((pi / h) (P - s / 2))`. There are two parameters less than a circular spline and
    a shift have. No trajectory of the weights takes a configuration across the boundary of a sector, so pathwise
    gradients are right although the action may jump there.
    """

    written = False

    @staticmethod
    def parameters_of(bins: int) -> int:
        return 3 * bins - 1

    def _map(self, parameters: Tensor, active: Tensor, passive: Tensor) -> tuple[Tensor, Tensor]:
        return self._inside(tailed_forward, parameters, active, passive)

    def _inverse_map(self, parameters: Tensor, active: Tensor, passive: Tensor) -> tuple[Tensor, Tensor]:
        return self._inside(tailed_inverse, parameters, active, passive)

    def _inside(self, tailed: TailedMap, parameters: Tensor, active: Tensor, passive: Tensor) -> tuple[Tensor, Tensor]:
        wrapped = wrap(active)
        half_sum = 0.5 * (wrapped + wrap(passive))
        reach = (1 - half_sum.abs() / math.pi).clamp(min=torch.finfo(active.dtype).tiny)
        position = ((wrapped - half_sum) / reach).clamp(-math.pi, math.pi)
        new, log_slope = tailed(tailed_spline(parameters, math.pi, compiled=self.compiled), position, math.pi)
        return active + reach * (new - position), log_slope

    def _charge(self, loops: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        return torch.round(wrap(loops).sum(dim=(1, 2)) / (2 * math.pi))


def frozen_charge(cosine: Tensor, sine: Tensor) -> Tensor:
    """Return `(1/2pi) sum sawtooth(loop)` over loops that tile the lattice, `(batch, cells, 3) -> (batch,)`.

    Each active plaquette is joined with its passive one, so the layer cannot change it. With `wrap` for the sawtooth
    it would be an integer, nearly always the topological charge, and jump; pathwise gradients do not see jumps and
    would be biased.
    """
    return sawtooth(cosine, sine).sum(dim=(1, 2)) / (2 * math.pi)


def gauge_flow(
    shape: Shape, *, layers: int, keep_charge: bool = False, holonomy_pairs: int = 0, **coupling: Any
) -> Sequential:
    """Return `layers` plaquette couplings with the stripe masks in turn; 8 layers update every link once.

    With `holonomy_pairs` so many pairs of holonomy couplings, one per direction, follow each cycle of 8 and the last
    layer. They belong to the layer before them, so that layers are counted, and cut, as without them. Raises ValueError
    for a negative number.
    """
    check_integer("holonomy_pairs", holonomy_pairs, low=0)
    kind = SectorCoupling if keep_charge else PlaquetteCoupling
    flow: list[Bijection] = []
    for count, mask in enumerate(stripe_cycle(shape, layers), start=1):
        flow.append(kind(mask, **coupling))
        if holonomy_pairs and (count % CYCLE == 0 or count == layers):
            bins = coupling.get("bins", BINS)
            turns = [HolonomyCoupling(shape, mu, bins=bins) for _ in range(holonomy_pairs) for mu in (0, 1)]
            flow[-1] = Sequential([flow[-1], *turns])
    return Sequential(flow, cycle=CYCLE)


def weights_for(larger: nn.Module, flow: nn.Module) -> dict[str, Tensor]:
    """Return a flow's weights for the same flow on a larger lattice, where what its couplings see is nearest.

    The flow's own weights move as well, see `PlaquetteCoupling.use_nearest_images`; its map stays but for rounding.
    """
    for part in flow.modules():
        if isinstance(part, PlaquetteCoupling):
            part.use_nearest_images()
    weights, there = flow.state_dict(), dict(larger.named_modules())
    for name, part in flow.named_modules():
        other = there.get(name)
        if all(isinstance(one, PlaquetteCoupling) and one.sees_all for one in (part, other)):
            layer = f"{name}.network.layers.0.linear.weight"
            weights[layer] = part.spread(weights[layer], other.mask.shape)
    return weights
