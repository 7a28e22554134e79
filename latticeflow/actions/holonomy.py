"""The holonomy marginal: a gauge action averaged exactly over a grid of holonomy shifts (PHYSICS, section 4)."""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from latticeflow.actions.base import Action, ModifiedAction
from latticeflow.actions.schwinger import SchwingerAction
from latticeflow.actions.u1 import U1Action
from latticeflow.u1 import shift_holonomies


@dataclass(frozen=True)
class HolonomyMarginal(ModifiedAction):
    r"""`S_bar(x) = -log( (1/|G|) sum_g exp(-S(g x)) )`, g running over the shifts `2 pi (i / G0, j / G1)`.

    The shifts leave every contractible loop unchanged, so a flow that sees only such loops can reach `exp(-S_bar)`
    though it is blind to the holonomies. A sample of `exp(-S_bar)` becomes one of `exp(-S)` by `draw`, a Gibbs step.
    Exact for any grid; `grid = (1, 1)` is the action itself. Raises ValueError for a grid that does not hold two
    positive integers, TypeError for an action without `at_holonomies`.
    """

    action: U1Action | SchwingerAction
    grid: tuple[int, int] = (12, 6)

    def __post_init__(self) -> None:
        if not hasattr(self.action, "at_holonomies"):
            raise TypeError(f"HolonomyMarginal needs a gauge action with at_holonomies, got {self.action!r}")
        if len(self.grid) != 2 or any(not isinstance(g, int) or g < 1 for g in self.grid):
            raise ValueError(f"grid must hold two positive integers, got {self.grid!r}")

    @property
    def bare(self) -> Action:
        return self.action

    def __call__(self, field: Tensor) -> Tensor:
        return self.marginal(self.orbit(field))

    def orbit(self, field: Tensor) -> Tensor:
        """Return `S(g x)` for every g, `(batch, G0, G1)`."""
        return self.action.at_holonomies(field, self.grid)

    def marginal(self, orbit: Tensor) -> Tensor:
        """Return `S_bar` from the actions along the orbits, `(batch,)`."""
        return math.log(math.prod(self.grid)) - torch.logsumexp(-orbit.flatten(1), dim=1)

    def draw(self, field: Tensor, orbit: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw g with probability proportional to `exp(-S(g x))`; return `g x` and its orbit.

        Elements whose action is not finite are not drawn, other than g = 1 where there is no finite one.
        """
        batch, (g0, g1) = torch.arange(len(field), device=field.device)[:, None, None], self.grid
        actions = orbit.flatten(1)
        log_weight = torch.where(torch.isfinite(actions), -actions, -math.inf)
        log_weight[:, 0] = torch.where(torch.isfinite(log_weight).any(dim=1), log_weight[:, 0], 0.0)
        choice = torch.multinomial(torch.softmax(log_weight, dim=1), 1, generator=generator)[:, 0]
        i, j = torch.div(choice, g1, rounding_mode="floor"), choice % g1
        angles = 2 * math.pi * torch.stack([i.to(field) / g0, j.to(field) / g1], dim=-1)
        rows = (torch.arange(g0, device=field.device) + i[:, None]) % g0
        columns = (torch.arange(g1, device=field.device) + j[:, None]) % g1
        moved = self.wrap(shift_holonomies(field, angles))
        return moved, orbit[batch, rows[:, :, None], columns[:, None, :]]
