"""Which parts of a flow learn at which step, each by an optimizer and at a learning rate of its own."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from latticeflow.samplers import PartwiseSampler, Sampler

SCHEDULES = ("end_to_end", "sequential", "alternate", "simultaneous")
END_TO_END, SIMULTANEOUS = SCHEDULES[0], SCHEDULES[-1]


class Rates(Protocol):
    """Settings with the largest learning rate, and that of a step of so many."""

    @property
    def learning_rate(self) -> float: ...

    def rate(self, step: int, steps: int) -> float: ...


@dataclass(frozen=True)
class Schedule:
    """The order in which K parts learn; the last `fine_tuning` of the steps, a fraction, are end to end.

    "sequential" trains each to its end, in equal shares of the steps and the order in which the parts are gone through,
    from the last to the first `on_data`; "alternate" one in every step, in turn; "simultaneous" all in every step, each
    on its own objective. With `fine_tuning_rate`, their largest learning rate, the last steps have a warm-up and decay
    of their own; without, those of all steps go on. With `stages` an end-to-end training has them as well, to be of
    another kind. Raises ValueError for another kind, a fraction outside of 0 to 1, and parts that cannot take turns
    because there is one.
    """

    kind: str = END_TO_END
    parts: int = 1
    steps: int = 0
    fine_tuning: float = 1 / 3
    fine_tuning_rate: float | None = None
    on_data: bool = False
    stages: bool = False

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.kind!r}")
        if not 0 <= self.fine_tuning <= 1:
            raise ValueError(f"fine_tuning must be a fraction of the steps, from 0 to 1, got {self.fine_tuning!r}")
        if self.kind != END_TO_END and self.parts < 2:
            raise ValueError(f"schedule {self.kind!r} needs a flow with two parts or more, got {self.parts}")

    @property
    def first_steps(self) -> int:
        """The steps before the fine tuning."""
        return self.steps - round(self.fine_tuning * self.steps) if self.stages or self.kind != END_TO_END else 0

    @property
    def local_steps(self) -> int:
        """The steps that are not end to end."""
        return 0 if self.kind == END_TO_END else self.first_steps

    def rate(self, settings: Rates, step: int) -> float:
        """Return the learning rate of a step by the warm-up and decay of `settings`."""
        first = self.first_steps
        if self.fine_tuning_rate is None or not first:
            return settings.rate(step, self.steps)
        if step < first:
            return settings.rate(step, first)
        return self.fine_tuning_rate / settings.learning_rate * settings.rate(step - first, self.steps - first)

    def learning(self, step: int) -> tuple[int, ...] | None:
        """Return the parts that learn by themselves at a step, both counted from 0; None where all learn together."""
        if step >= self.local_steps:
            return None
        if self.kind == SIMULTANEOUS:
            return tuple(range(self.parts))
        turn = step % self.parts if self.kind == "alternate" else step * self.parts // self.local_steps
        return (self.parts - 1 - turn if self.on_data else turn,)


class Optimizers:
    """Adam for each part of a sampler, one for all of another sampler.

    `rates` are the largest learning rates of the parts, where they have their own; `learning_rate` is that of the
    others, and what `step` is given. Raises ValueError for a number of rates that is not that of the parts.
    """

    def __init__(
        self, sampler: Sampler, learning_rate: float, rates: Sequence[float] | None = None, **adam: object
    ) -> None:
        parts = len(sampler.parts) if isinstance(sampler, PartwiseSampler) else 1
        own = [sampler.own_parameters(k) for k in range(parts)] if parts > 1 else [list(sampler.parameters())]
        if rates is not None and len(rates) != parts:
            raise ValueError(f"there are {len(rates)} learning_rates for {parts} part{'s' * (parts > 1)}")
        self.factors = [1.0] * parts if rates is None else [rate / learning_rate for rate in rates]
        self.parameters = own
        self.parts = [torch.optim.Adam(parameters, **adam) for parameters in own]

    @property
    def everything(self) -> tuple[int, ...]:
        """All parts."""
        return tuple(range(len(self.parts)))

    def zero_grad(self) -> None:
        for optimizer in self.parts:
            optimizer.zero_grad()

    def clip(self, parts: Sequence[int], limit: float | None) -> float:
        """Return the norm of these parts' gradient, all together, and scale it down to `limit` where that is set."""
        parameters = [parameter for k in parts for parameter in self.parameters[k]]
        return float(nn.utils.clip_grad_norm_(parameters, limit or math.inf))

    def step(self, parts: Sequence[int], rate: float) -> None:
        """Step these parts at `rate` times their factors."""
        for k in parts:
            for group in self.parts[k].param_groups:
                group["lr"] = rate * self.factors[k]
            self.parts[k].step()

    def state_dict(self) -> list[dict[str, Any]]:
        return [copy.deepcopy(optimizer.state_dict()) for optimizer in self.parts]

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        for optimizer, state in zip(self.parts, states, strict=True):
            optimizer.load_state_dict(state)
