"""What every Markov kernel is: `step(state, generator) -> (state, info)`, on many replica at once."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Generator, Tensor

from latticeflow.actions import Action
from latticeflow.samplers import Sampler

CANDIDATES, CHUNK = 8, 256


@dataclass(frozen=True)
class ChainState:
    """The current configuration of every replica; all a kernel needs to go on.

    `field (replica, ...)` float64; `orbit (replica, *group)` the actions along its orbit (Action.orbit), whose first
    element is `action (replica,)`; `log_q`, `log_weight (replica,)` of the sampler that proposes, None where a kernel
    that knows no sampler moved the field.
    """

    field: Tensor
    orbit: Tensor
    log_q: Tensor | None = None
    log_weight: Tensor | None = None

    @property
    def action(self) -> Tensor:
        return self.orbit.flatten(1)[:, 0]


@dataclass(frozen=True)
class StepInfo:
    """What one step did.

    `history` holds what is stored with every draw, `(replica,)` each, with `accepted` if it is of a single kernel;
    `proposals` the log weights `(replica,)` of all that was proposed. A proposal whose action, log q or energy is not
    finite is rejected, counts in `bad`, and has the weight `-inf`.
    """

    history: Mapping[str, Tensor]
    proposals: Mapping[str, Tensor] = field(default_factory=dict)
    bad: int = 0

    @property
    def accepted(self) -> Tensor:
        return self.history["accepted"]


class Draws(Protocol):
    """What chains can start from: a prior, or anything else with independent fields and their log density."""

    def sample(self, n: int, generator: Generator | None = None) -> Tensor: ...

    def log_prob(self, x: Tensor) -> Tensor: ...


class SamplerDraws:
    """The draws of a sampler, to start from where it has no single prior."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler.double()

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        return self.sampler.sample(n, generator)[0].detach()

    def log_prob(self, x: Tensor) -> Tensor:
        return self.sampler.log_prob(x).detach()


class Kernel(ABC):
    """A Markov kernel that leaves `exp(-S)` invariant.

    `name` names it in configurations; `history` and `proposals` are the columns that its steps fill, with their types.
    `parameters` are the numbers that `tune` changes, while the chains thermalise and never later.
    """

    name: ClassVar[str]
    history: Mapping[str, torch.dtype] = {"accepted": torch.bool}
    proposals: tuple[str, ...] = ()
    action: Action

    @abstractmethod
    def start(self, replica: int, generator: Generator) -> ChainState:
        """Return the states that the chains start from."""

    @abstractmethod
    def step(self, state: ChainState, generator: Generator) -> tuple[ChainState, StepInfo]:
        """Move every replica once. Pure: the same state and generator give the same step."""

    def tune(self, info: StepInfo) -> None:  # noqa: B027, most kernels have nothing to learn
        """Learn from a step of the thermalisation."""

    @property
    def parameters(self) -> dict[str, float]:
        return {}

    @parameters.setter
    def parameters(self, values: Mapping[str, float]) -> None:
        if values:
            raise ValueError(f"kernel {self.name} has no parameters, got {sorted(values)}")


def spread_start(action: Action, draws: Draws, replica: int, generator: Generator) -> ChainState:
    """Return states at different draws, chosen out of eight times as many with probability proportional to weight.

    No draw is chosen twice, so that the replica start apart, and none that the target hardly has: such a one can be a
    place that trajectories do not leave. Raises ValueError where too few of them have a finite weight.
    """
    sizes = [min(CHUNK, CANDIDATES * replica - done) for done in range(0, CANDIDATES * replica, CHUNK)]
    chunks = [draws.sample(size, generator).double() for size in sizes]
    log_weight = torch.cat([-action(chunk) - draws.log_prob(chunk) for chunk in chunks])
    fields = torch.cat(chunks)
    uniform = torch.rand(len(fields), generator=generator, dtype=torch.float64, device=fields.device)
    log_weight = torch.nan_to_num(log_weight, nan=-math.inf, posinf=-math.inf)
    finite = int(torch.isfinite(log_weight).sum())
    if finite < replica:
        raise ValueError(f"{finite} of {len(log_weight)} draws to start from have a finite weight, {replica} must")
    score = log_weight - torch.log(-torch.log(uniform))
    return state_at(action, fields[torch.topk(score, replica).indices], generator)


def state_at(action: Action, fields: Tensor, generator: Generator) -> ChainState:
    """Return the state at given fields, the element of each orbit drawn afresh."""
    return ChainState(*action.draw(fields, action.orbit(fields), generator))


def metropolis(log_ratio: Tensor, generator: Generator) -> Tensor:
    """Return which proposals are accepted, with probability `min(1, exp(log_ratio))`; NaN is rejected."""
    uniform = torch.rand(len(log_ratio), generator=generator, dtype=torch.float64, device=log_ratio.device)
    return torch.log(uniform) < log_ratio


def choose(accepted: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Return `new` where accepted and `old` elsewhere; `accepted (replica,)`, the others `(replica, ...)`."""
    return torch.where(accepted.reshape(-1, *[1] * (new.dim() - 1)), new, old)
