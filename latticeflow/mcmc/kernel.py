"""What every Markov kernel is: `step(state, generator) -> (state, info)`, on many replica at once."""

from dataclasses import dataclass
from typing import Protocol

from torch import Generator, Tensor


@dataclass(frozen=True)
class ChainState:
    """The current configuration of every replica; all a kernel needs to go on.

    `field (replica, ...)` float64; `orbit (replica, *group)` the actions along its orbit (Action.orbit), whose first
    element is `action (replica,)`; `log_q`, `log_weight (replica,)` of the sampler that proposes.
    """

    field: Tensor
    orbit: Tensor
    log_q: Tensor
    log_weight: Tensor

    @property
    def action(self) -> Tensor:
        return self.orbit.flatten(1)[:, 0]


@dataclass(frozen=True)
class StepInfo:
    """What one step did: which replica accepted, and the log weights `(replica,)` of all that was proposed.

    A proposal with a non-finite weight has `-inf`, is rejected, and counts in `bad`.
    """

    accepted: Tensor
    proposal_log_weight: Tensor
    bad: int


class Kernel(Protocol):
    """A Markov kernel that leaves `exp(-S)` invariant."""

    def start(self, replica: int, generator: Generator) -> ChainState: ...

    def step(self, state: ChainState, generator: Generator) -> tuple[ChainState, StepInfo]: ...
