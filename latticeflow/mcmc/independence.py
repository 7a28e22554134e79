"""Independence Metropolis: proposals from a sampler, accepted with probability `min(1, w(x') / w(x))`."""

import math

import torch
from torch import Generator, Tensor

from latticeflow.actions import Action
from latticeflow.mcmc.kernel import ChainState, StepInfo
from latticeflow.samplers import FlowSampler
from latticeflow.u1 import shift_holonomies

CHECKED_SHIFTS = ((1.0, 0.0), (0.0, 1.0), (2.5, 2.5))
BLIND_TOLERANCE = 1e-2


class IndependenceMetropolis:
    """Accept/reject chain with independent proposals of a sampler, exact for any sampler of full support.

    `w = exp(-S) / q` in float64. For a marginal action (holonomies) `S` is the marginal, and every step ends with a
    draw of the orbit's element, a Gibbs step; the sampler's density must then be the same along orbits. The starting
    states are resampled from `candidates` proposals with probability proportional to their weights. Raises ValueError
    from `start` if the sampler's density varies along orbits or no candidate has a finite weight.
    """

    def __init__(self, sampler: FlowSampler, action: Action, *, candidates: int = 1024) -> None:
        self.sampler = sampler
        self.action = action
        self.candidates = candidates

    @torch.no_grad()
    def start(self, replica: int, generator: Generator) -> ChainState:
        """Return replica states resampled by weight from the candidates."""
        batches = [self._propose(n, generator)[0] for n in _chunks(max(self.candidates, replica), 256)]
        fields, orbits, log_q, log_weight = (torch.cat(parts) for parts in zip(*map(_parts, batches), strict=True))
        if not torch.isfinite(log_weight).any():
            raise ValueError(
                f"none of {len(log_weight)} proposals has a finite weight: sampler and action do not match"
            )
        chosen = torch.multinomial(torch.softmax(log_weight, dim=0), replica, replacement=True, generator=generator)
        state = ChainState(fields[chosen], orbits[chosen], log_q[chosen], log_weight[chosen])
        self._check_blind(state)
        return self._draw(state, generator)

    @torch.no_grad()
    def step(self, state: ChainState, generator: Generator) -> tuple[ChainState, StepInfo]:
        """Propose to every replica, accept or reject, draw the orbit's element."""
        proposal, bad = self._propose(len(state.field), generator)
        log_ratio = proposal.log_weight - state.log_weight
        uniform = torch.rand(len(log_ratio), generator=generator, dtype=torch.float64, device=log_ratio.device)
        accepted = torch.log(uniform) < log_ratio
        merged = ChainState(
            *(
                torch.where(accepted.reshape(-1, *[1] * (new.dim() - 1)), new, old)
                for new, old in zip(_parts(proposal), _parts(state), strict=True)
            )
        )
        return self._draw(merged, generator), StepInfo(accepted, proposal.log_weight, bad)

    def _propose(self, n: int, generator: Generator) -> tuple[ChainState, int]:
        x, log_q = self.sampler.sample(n, generator)
        x = x.double()
        orbit = self.action.orbit(x)
        log_weight = -self.action.marginal(orbit) - log_q
        finite = torch.isfinite(log_weight)
        log_weight = torch.where(finite, log_weight, -math.inf)
        return ChainState(x, orbit, log_q, log_weight), int((~finite).sum())

    def _draw(self, state: ChainState, generator: Generator) -> ChainState:
        field, orbit = self.action.draw(state.field, state.orbit, generator)
        return ChainState(field, orbit, state.log_q, state.log_weight)

    def _check_blind(self, state: ChainState) -> None:
        """Compare `log q` along the orbits of the starting states, where the group has more than one element."""
        if state.orbit[0].numel() == 1:
            return
        parameter = next(self.sampler.parameters(), state.field)
        fields = state.field[:8]
        for angles in CHECKED_SHIFTS:
            shifted = shift_holonomies(fields, fields.new_tensor(angles))
            change = self.sampler.log_prob(shifted.to(parameter)) - self.sampler.log_prob(fields.to(parameter))
            worst = float(change.abs().max())
            if not worst < BLIND_TOLERANCE:
                raise ValueError(
                    f"log q changes by up to {worst:.3g} along holonomy orbits; use a sampler blind to holonomies, "
                    "or holonomies = [1, 1]"
                )


def _parts(state: ChainState) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return state.field, state.orbit, state.log_q, state.log_weight


def _chunks(total: int, size: int) -> list[int]:
    return [min(size, total - done) for done in range(0, total, size)]
