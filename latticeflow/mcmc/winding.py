"""A proposal that changes the topological charge: the field of one flux quantum, added or taken away."""

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from latticeflow.actions import Action
from latticeflow.mcmc.kernel import ChainState, Draws, Kernel, StepInfo, choose, metropolis, spread_start
from latticeflow.u1 import shift_holonomies


class Winding(Kernel):
    """Add the links of uniform flux `-+ 2 pi` and random holonomies, accept with `min(1, exp(S - S'))`.

    Every plaquette angle moves by `-+ 2 pi / V`, so Q changes by -+1 unless a plaquette passes pi. Both signs are
    equally likely and the shift of the holonomies is uniform, hence the proposal is symmetric and the step exact,
    whatever Q does. In pure gauge theory `delta S = beta <cos P> (2 pi)^2 / (2 V)` on average: of order one where
    local updates no longer tunnel. It moves nothing else, so it belongs in a composite kernel. Compare the instanton
    updates of Fucito and Solomon, Phys. Lett. B 134 (1984) 235, and Albandea et al., arXiv:2106.14234.
    Raises ValueError for an action whose field is not links.
    """

    name = "winding"

    def __init__(self, action: Action, start: Draws) -> None:
        if action.field_name != "links":
            raise ValueError(f"winding needs a gauge theory, got {action!r}")
        self.action = action
        self.draws = start

    @torch.no_grad()
    def start(self, replica: int, generator: Generator) -> ChainState:
        return spread_start(self.action, self.draws, replica, generator)

    @torch.no_grad()
    def step(self, state: ChainState, generator: Generator) -> tuple[ChainState, StepInfo]:
        """Propose one quantum of flux to every replica, accept or reject, draw the orbit's element."""
        links, orbit = state.field, state.orbit
        random = torch.rand(len(links), 3, generator=generator, dtype=links.dtype, device=links.device)
        sign = torch.where(random[:, 0] < 0.5, -1.0, 1.0).to(links).reshape(-1, 1, 1, 1)
        flux = unit_flux(links.shape[-2:]).to(links)
        proposed = self.action.wrap(shift_holonomies(links + sign * flux, 2 * math.pi * random[:, 1:]))
        proposed_orbit = self.action.orbit(proposed)
        log_ratio = self.action.marginal(orbit) - self.action.marginal(proposed_orbit)
        finite = torch.isfinite(log_ratio)
        accepted = metropolis(torch.where(finite, log_ratio, -math.inf), generator)
        merged = choose(accepted, proposed, links), choose(accepted, proposed_orbit, orbit)
        after = ChainState(*self.action.draw(*merged, generator))
        return after, StepInfo({"accepted": accepted}, bad=int((~finite).sum()))


def unit_flux(shape: Sequence[int]) -> Tensor:
    """Return links `(2, L0, L1)` whose plaquettes are all `2 pi / V` (one of them less 2 pi): charge 1, action least.

    `theta_1(t, x) = 2 pi t / V`, and `theta_0(L0 - 1, x) = -2 pi x / L1` makes up for the jump at the boundary.
    """
    time, space = shape
    links = torch.zeros(2, time, space, dtype=torch.float64)
    links[1] = 2 * math.pi / (time * space) * torch.arange(time, dtype=torch.float64)[:, None]
    links[0, -1] = -2 * math.pi / space * torch.arange(space, dtype=torch.float64)
    return links
