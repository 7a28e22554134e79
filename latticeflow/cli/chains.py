"""The steps of the chains, by one process or by several, each of which has an equal number of chains.

The chains of a process follow each other and have their own streams of random numbers. While they thermalise, kernels
learn from all chains alike, so that all processes have the same parameters.
"""

from contextlib import suppress
from typing import Any, Self

import numpy as np
import torch
from torch import Generator, Tensor

from latticeflow.config import Config
from latticeflow.mcmc import ChainState, Kernel, StepInfo
from latticeflow.mcmc.kernel import state_at
from latticeflow.streams import stream
from latticeflow.training import Team

MAX_BAD_FRACTION, FEW = 0.01, 1000
MAX_BAD_WHILE_TUNED, WHILE_TUNED = 0.05, 4

Rows = dict[str, dict[str, np.ndarray]]


class SamplingError(RuntimeError):
    """Sampling cannot go on, for the reason in the message."""


class Chains:
    """The chains of this process, `state`; on the first one its methods move all chains and return what is of all.

    With `team` the others `follow` until the first one leaves the `with` block.
    """

    def __init__(self, config: Config, kernel: Kernel, team: Team | None = None) -> None:
        self.config, self.kernel, self.team = config, kernel, team
        self.state: ChainState | None = None
        self.bad = self.taken = 0
        self.under_way = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.team is not None and not self.under_way:
            self.team.spread(None)
            self.team.waiting = True

    def start(self) -> ChainState:
        """Return the states that the chains start from. Raises SamplingError where there are none."""
        return self._do("start")

    def go_on(self, state: ChainState, parameters: dict[str, float]) -> ChainState:
        """Take up the chains at this state of all, the kernel with its parameters."""
        return self._do("go_on", vars(state), parameters)

    def thermalise(self, first: int, steps: int) -> ChainState:
        """Take steps from which the kernel learns. Raises SamplingError where too many proposals are bad."""
        return self._do("thermalise", first, steps)

    def draw(self, first: int, draws: int) -> tuple[ChainState, Rows, int]:
        """Take steps; return the state, the rows `(chain, draws, ...)` to append, and the number of bad proposals."""
        return self._do("draw", first, draws)

    def follow(self) -> None:
        """Move the chains of this process with those of the first one, until that ends it."""
        while (order := self.team.spread(None)) is not None:
            name, *arguments = order
            with suppress(SamplingError):  # which the first process raises as well
                self._steps[name](*arguments)

    @property
    def processes(self) -> int:
        return 1 if self.team is None else self.team.processes

    def taken_elsewhere(self) -> float:
        """Return the CPU seconds of other processes since the last call."""
        return 0.0 if self.team is None else self.team.taken_elsewhere()

    @property
    def others_stop(self) -> bool:
        """Whether somebody asked another process to stop."""
        return self.team is not None and self.team.stop_wanted

    @property
    def _steps(self) -> dict[str, Any]:
        return {"start": self._start, "go_on": self._go_on, "thermalise": self._thermalise, "draw": self._draw}

    def _do(self, name: str, *arguments: Any) -> Any:
        if self.team is None:
            return self._steps[name](*arguments)
        self.under_way = True
        self.team.spread([name, *arguments])
        try:
            done = self._steps[name](*arguments)
        except SamplingError:  # found by all alike
            self.under_way = False
            raise
        self.under_way = False
        return done

    def _start(self) -> ChainState:
        generator, failure = self._stream("start"), ""
        try:
            self.state = start(self.config, self.kernel, self._share(self.config.chain.replica), generator)
        except SamplingError as error:
            failure = str(error)
        if self.team is not None:
            failure = self.team.spread(next(filter(None, self.team.collect(failure)), ""))
        if failure:
            raise SamplingError(failure)
        return self._whole()

    def _go_on(self, state: dict[str, Tensor | None], parameters: dict[str, float]) -> ChainState:
        self.kernel.parameters = parameters
        rows = slice(None) if self.team is None else self.team.rows(self.config.chain.replica)
        self.state = ChainState(**{name: value[rows] for name, value in state.items() if value is not None})
        return ChainState(**state)

    def _thermalise(self, first: int, steps: int) -> ChainState:
        generator, of_all = self._stream("thermalisation", first), proposals(self.config)
        least = round(WHILE_TUNED * of_all / MAX_BAD_WHILE_TUNED)  # a step that is far too large
        for _ in range(steps):
            self.state, own = self.kernel.step(self.state, generator)
            info = own if self.team is None else _joined(self.team, own)
            self.kernel.tune(info)
            self.bad, self.taken = self.bad + info.bad, self.taken + of_all
            check_bad(self.bad, self.taken, limit=MAX_BAD_WHILE_TUNED, least=least)
        return self._whole()

    def _draw(self, first: int, draws: int) -> tuple[ChainState, Rows, int]:
        self.state, rows, bad = run_block(self.kernel, self.state, draws, self._stream("chain", first))
        if self.team is None:
            return self.state, rows, bad
        (counts,) = self.team.joined_rows([torch.tensor([float(bad)], dtype=torch.float64)])
        return self._whole(), _of_all(self.team, rows), round(float(counts.sum()))

    def _whole(self) -> ChainState:
        """Return the state of all chains, on the first process."""
        if self.team is None:
            return self.state
        states = self.team.collect(vars(self.state))
        if not self.team.is_first:
            return self.state
        names = [name for name, value in states[0].items() if value is not None]
        return ChainState(**{name: torch.cat([state[name] for state in states]) for name in names})

    def _share(self, chains: int) -> int:
        return chains if self.team is None else self.team.share(chains)

    def _stream(self, purpose: str, block: int = 0) -> Generator:
        process = None if self.team is None else self.team.rank
        return stream(self.config.run.seed, purpose, block, process=process, device=self.config.run.device)


def run_block(kernel: Kernel, state: ChainState, draws: int, generator: Generator) -> tuple[ChainState, Rows, int]:
    """Take `draws` steps; return the state, the rows `(chain, draws, ...)` to append, and the number of bad ones."""
    steps: list[tuple[ChainState, StepInfo]] = []
    for _ in range(draws):
        state, info = kernel.step(state, generator)
        steps.append((state, info))
    history = {name: _rows([info.history[name] for _, info in steps]) for name in kernel.history}
    rows = {
        "fields": {kernel.action.field_name: _rows([s.field for s, _ in steps])},
        "history": {"action": _rows([s.action for s, _ in steps])} | history,
        "proposals": {name: _rows([info.proposals[name] for _, info in steps]) for name in kernel.proposals},
    }
    return state, rows, sum(info.bad for _, info in steps)


def start(config: Config, kernel: Kernel, replica: int, generator: Generator) -> ChainState:
    """Return the states that so many chains start from; raises SamplingError where there are none."""
    try:
        state = kernel.start(replica, generator)
    except ValueError as error:
        raise SamplingError(str(error)) from error
    return state_at(kernel.action, torch.zeros_like(state.field), generator) if config.chain.start == "cold" else state


def proposals(config: Config) -> int:
    """Return how many proposals all chains see in a step."""
    return config.chain.replica * len(config.chain.kernels)


def check_bad(bad: int, total: int, *, limit: float = MAX_BAD_FRACTION, least: int = FEW) -> None:
    """Raise SamplingError when more than a fraction of the proposals is bad, or of `least` where they are fewer."""
    if bad > limit * max(total, least):
        raise SamplingError(f"{bad} of {total} proposals had a non-finite action or log q (limit {limit:.0%})")


def _joined(team: Team, own: StepInfo) -> StepInfo:
    """Return what a step did to the chains of all processes."""
    names = list(own.history)
    bad = own.history[names[0]].new_tensor([own.bad], dtype=torch.float64)
    counts, *columns = team.joined_rows([bad, *(own.history[name].double() for name in names)])
    history = {name: column.to(own.history[name].dtype) for name, column in zip(names, columns, strict=True)}
    return StepInfo(history, bad=round(float(counts.sum())))


def _of_all(team: Team, own: Rows) -> Rows:
    """Return the rows of all chains, on the first process."""
    shares = team.collect({group: {name: torch.from_numpy(of) for name, of in own[group].items()} for group in own})
    return {
        group: {name: torch.cat([share[group][name] for share in shares]).numpy() for name in own[group]}
        for group in (own if shares else ())
    }


def _rows(tensors: list[Tensor]) -> np.ndarray:
    return torch.stack(tensors, dim=1).cpu().numpy()
