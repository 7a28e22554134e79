"""Independence Metropolis: proposals from a sampler, accepted with probability `min(1, w(x') / w(x))`."""

import math

import torch
from torch import Generator, Tensor

from latticeflow.actions import Action
from latticeflow.mcmc.kernel import ChainState, Kernel, StepInfo, choose, metropolis
from latticeflow.samplers import Sampler
from latticeflow.u1 import shift_holonomies

HISTORY = {"accepted": torch.bool, "log_q": torch.float64, "log_weight": torch.float64}
CHECKED_SHIFTS = ((1.0, 0.0), (0.0, 1.0), (2.5, 2.5))
BLIND_TOLERANCE = 1e-2


class IndependenceMetropolis(Kernel):
    """Accept/reject chain with independent proposals of a sampler, exact for any sampler of full support.

    `w = exp(-S) / q` in float64, the sampler being cast to it. For a marginal action (holonomies) `S` is the marginal,
    and every step ends with a draw of the orbit's element, a Gibbs step; the sampler's density must then be the same
    along orbits. The starting states are resampled from `candidates` proposals with probability proportional to their
    weights. Raises ValueError from `start` if the sampler's density varies along orbits or no candidate has a finite
    weight.
    """

    name = "independence"
    history = HISTORY
    proposals = ("log_weight",)

    def __init__(self, sampler: Sampler, action: Action, *, candidates: int = 1024) -> None:
        self.sampler = sampler.double()
        self.action = action
        self.candidates = candidates

    @torch.no_grad()
    def start(self, replica: int, generator: Generator) -> ChainState:
        """Return replica states resampled by weight from the candidates."""
        batches = [self._propose(n, generator) for n in _chunks(max(self.candidates, replica), 256)]
        fields, orbits, log_q, log_weight = (torch.cat(parts) for parts in zip(*batches, strict=True))
        if not torch.isfinite(log_weight).any():
            raise ValueError(
                f"none of {len(log_weight)} proposals has a finite weight: sampler and action do not match"
            )
        chosen = torch.multinomial(torch.softmax(log_weight, dim=0), replica, replacement=True, generator=generator)
        self._check_blind(fields[chosen], orbits[chosen])
        return self._draw(fields[chosen], orbits[chosen], log_q[chosen], log_weight[chosen], generator)

    @torch.no_grad()
    def step(self, state: ChainState, generator: Generator) -> tuple[ChainState, StepInfo]:
        """Propose to every replica, accept or reject, draw the orbit's element."""
        log_q, log_weight = self._weigh(state)
        unknown = int((~torch.isfinite(log_q)).sum())
        new = self._propose(len(state.field), generator)
        accepted = metropolis(new[3] - log_weight, generator)
        old = (state.field, state.orbit, log_q, log_weight)
        after = self._draw(*(choose(accepted, *pair) for pair in zip(new, old, strict=True)), generator)
        history = {"accepted": accepted, "log_q": after.log_q, "log_weight": after.log_weight}
        return after, StepInfo(history, {"log_weight": new[3]}, unknown + int(torch.isneginf(new[3]).sum()))

    def _weigh(self, state: ChainState) -> tuple[Tensor, Tensor]:
        """Return `log q` and the log weight of the state, evaluated where another kernel moved it.

        A state whose density is not finite has density 0: it is not left by proposals.
        """
        if state.log_q is not None and state.log_weight is not None:
            return state.log_q, state.log_weight
        log_q = self.sampler.log_prob(state.field)
        log_q = torch.where(torch.isfinite(log_q), log_q, -math.inf)
        return log_q, -self.action.marginal(state.orbit) - log_q

    def _propose(self, n: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return n proposals: fields, orbits, log q, log weights."""
        x, log_q = self.sampler.sample(n, generator)
        orbit = self.action.orbit(x)
        log_weight = -self.action.marginal(orbit) - log_q
        return x, orbit, log_q, torch.where(torch.isfinite(log_weight), log_weight, -math.inf)

    def _draw(
        self, field: Tensor, orbit: Tensor, log_q: Tensor, log_weight: Tensor, generator: Generator
    ) -> ChainState:
        return ChainState(*self.action.draw(field, orbit, generator), log_q, log_weight)

    def _check_blind(self, fields: Tensor, orbit: Tensor) -> None:
        """Compare `log q` along the orbits of the starting states, where the group has more than one element."""
        if orbit[0].numel() == 1:
            return
        fields = fields[:8]
        for angles in CHECKED_SHIFTS:
            shifted = shift_holonomies(fields, fields.new_tensor(angles))
            worst = float((self.sampler.log_prob(shifted) - self.sampler.log_prob(fields)).abs().max())
            if not worst < BLIND_TOLERANCE:
                raise ValueError(
                    f"log q changes by up to {worst:.3g} along holonomy orbits; use a sampler blind to holonomies, "
                    "or holonomies = [1, 1]"
                )


def _chunks(total: int, size: int) -> list[int]:
    return [min(size, total - done) for done in range(0, total, size)]
