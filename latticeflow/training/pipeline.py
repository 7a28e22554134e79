"""Parts that learn all at once on several processes: a pipeline in which only forward activations travel.

Every process of torch.distributed's default group owns some parts that follow each other. It draws from what the
process before it passed on, lets its parts learn, and passes on the draws, their log q and, for estimators that ask for
it, d log q / dx; then it takes its next step while those behind still work on this one. No gradient and no weight
travels in a step. The numbers are those of one process bit for bit, given the same threads and devices.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch.distributed as dist
from torch import Generator

from latticeflow.samplers import PartwiseSampler
from latticeflow.samplers.partwise import GivenDraws, Part
from latticeflow.training.estimators import OnSamples, reparametrisation
from latticeflow.training.exchange import Exchange
from latticeflow.training.schedule import SIMULTANEOUS
from latticeflow.training.trainer import MAX_SKIPPED_IN_A_ROW, StepRecord, Trainer, hopeless

OnStep = Callable[[Trainer, StepRecord], None]


def run_pipeline(trainer: Trainer, on_step: OnStep | None = None, *, sync_every: int | None = None) -> None:
    """Do what `Trainer.run` does, on every process of the default group, each with a trainer of the same settings.

    The state is that of the first process (rank 0), also at the end: the steps end to end are its own, and the others
    return before them. It has all of the state, and `on_step` is called there for the records that came in, at every
    multiple of `window` and of `sync_every` and at the end of the steps by parts. Raises ValueError for a training that
    cannot be shared, LostProcessError where a process does not answer, TrainingError as `Trainer.run`.
    """
    share = shares(trainer, dist.get_world_size())[dist.get_rank()]
    pipeline = _Pipeline(trainer, share, sync_every or trainer.settings.window)
    pipeline.begin()
    while trainer.step < trainer.schedule.local_steps and pipeline.advance(on_step):
        pass
    if pipeline.exchange.is_first:
        trainer.run(on_step)


def shares(trainer: Trainer, processes: int) -> list[range]:
    """Return the parts of each process. Raises ValueError for a training that they cannot share."""
    kind = trainer.settings.schedule
    if not isinstance(trainer.sampler, PartwiseSampler) or kind != SIMULTANEOUS:
        raise ValueError(f"several processes need parts and schedule {SIMULTANEOUS!r}, got schedule {kind!r}")
    if isinstance(trainer.estimator, OnSamples):
        raise ValueError(
            "an estimator on samples, as forward_kl, starts at the last part; several processes cannot share it"
        )
    if trainer.average is not None:
        raise ValueError("ema needs all weights in every step; several processes cannot share it")
    return split(len(trainer.sampler.parts), processes)


def split(parts: int, processes: int) -> list[range]:
    """Return parts that follow each other for each process. Raises ValueError where there are too few."""
    if processes > parts:
        raise ValueError(f"{parts} parts cannot be shared by {processes} processes; start {parts} at most")
    ends = [rank * parts // processes for rank in range(processes + 1)]
    return [range(*each) for each in pairwise(ends)]


@dataclass
class _Pipeline:
    """One process and its share of the parts; `records` are of the steps since all states were brought together."""

    trainer: Trainer
    share: range
    sync_every: int
    records: list[StepRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.exchange = Exchange(self.trainer.device)
        self.cpu = time.process_time()

    def begin(self) -> None:
        """Take over the state of the first process."""
        trainer = self.trainer
        self.together = trainer.state_dict()
        state, elapsed = self.exchange.spread((self.together, time.perf_counter() - trainer.started))
        if not self.exchange.is_first:
            trainer.load_state_dict(state)
            trainer.started = time.perf_counter() - elapsed

    def advance(self, on_step: OnStep | None) -> bool:
        """Take steps up to the next one at which states come together; return whether to go on."""
        trainer = self.trainer
        while True:
            self.records.append(trainer.learn(self.share, self._learners))
            if self._is_due(trainer.step):
                break
        states, self.records = self.exchange.collect(self._own_state()), []
        go_on = False
        try:
            go_on = not self.exchange.is_first or self._take_over(states, on_step)
        finally:  # the others leave, and do not wait, where the first process fails
            go_on = self.exchange.spread(go_on)
        return go_on

    def _is_due(self, step: int) -> bool:
        multiples = self.trainer.settings.window, self.sync_every
        return step == self.trainer.schedule.local_steps or any(step % each == 0 for each in multiples)

    def _learners(self, _generator: Generator) -> Iterator[Part]:
        """Yield the parts of this process on what came in, then pass on what they drew."""
        sampler, part = self.trainer.sampler, None
        given = None if self.exchange.is_first else self._received()
        for part in sampler.chain(self.share, given=given):
            yield part
        if not self.exchange.is_last:
            drawn = part.passed_on()
            self.exchange.pass_on([*drawn.draws, *([drawn.score] if self._needs_score else [])])

    def _received(self) -> GivenDraws:
        x, log_q, *score = self.exchange.receive()
        return GivenDraws((x, log_q), lambda: score[0])

    @property
    def _needs_score(self) -> bool:
        return self.trainer.estimator is not reparametrisation

    def _own_state(self) -> dict[str, Any]:
        trainer, cpu = self.trainer, time.process_time()
        spent, self.cpu = cpu - self.cpu, cpu
        parts = {
            k: {
                "weights": trainer.sampler.parts[k].state_dict(),
                "optimizer": trainer.optimizers.parts[k].state_dict(),
                "recent": list(trainer.recent[k]),
            }
            for k in self.share
        }
        return {"parts": parts, "records": [asdict(record) for record in self.records], "cpu": spent}

    def _take_over(self, states: list[dict[str, Any]], on_step: OnStep | None) -> bool:
        """Take over the states of all; return False, back in the last one of all, where the steps must not go on.

        They are then taken again by one process, which fails where it has to.
        """
        trainer = self.trainer
        records = _joined([state["records"] for state in states])
        if _fail(records, after=trainer.records[-MAX_SKIPPED_IN_A_ROW:]):
            trainer.load_state_dict(self.together)
            return False
        for state in states[1:]:
            trainer.cpu_elsewhere += state["cpu"]
            for k, part in state["parts"].items():
                self._load(k, **part)
        trainer.records.extend(records)
        trainer.settle(records[-1])
        self.together = trainer.state_dict()
        for record in records if on_step is not None else ():
            on_step(trainer, record)
        return True

    def _load(self, k: int, *, weights: dict[str, Any], optimizer: dict[str, Any], recent: list[Any]) -> None:
        trainer = self.trainer
        trainer.sampler.parts[k].load_state_dict(weights)
        trainer.optimizers.parts[k].load_state_dict(optimizer)
        trainer.recent[k] = deque((each.to(trainer.device) for each in recent), trainer.settings.window)


def _joined(records: list[list[dict[str, Any]]]) -> list[StepRecord]:
    """Return the records of the last process, whose last part is the whole; a step is skipped where any part was."""
    return [
        replace(
            StepRecord(**step[-1]),
            skipped=any(each["skipped"] for each in step),
            part_ess=[value for each in step for value in each["part_ess"]],
        )
        for step in zip(*records, strict=True)
    ]


def _fail(records: list[StepRecord], *, after: list[StepRecord]) -> bool:
    """Return whether a training by one process would have ended at one of these steps."""
    skipped = [record.skipped for record in [*after, *records]]
    return any(hopeless(skipped[: end + 1]) for end in range(len(after), len(skipped)))
