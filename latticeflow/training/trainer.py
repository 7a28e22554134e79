"""The training loop: any estimator, Adam with a schedule, bad steps skipped and counted, best weights kept."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latticeflow.actions import Action
from latticeflow.flows import SingularWeightsError
from latticeflow.samplers import FlowSampler, Sampler
from latticeflow.stats import ess, ess_error
from latticeflow.streams import SharedStream, stream
from latticeflow.training.averaging import WeightAverage
from latticeflow.training.estimators import (
    Estimator,
    ExplicitScore,
    OnSamples,
    ScoreMatching,
    Target,
    make_estimator,
)
from latticeflow.training.schedule import END_TO_END, SIMULTANEOUS, Optimizers, Schedule
from latticeflow.training.team import ALONE, Alone

MAX_SKIPPED_IN_A_ROW = 20
REFINE_EVERY, LAST_DRAWS = 100, 2048
Stream = torch.Generator | SharedStream
Learners = Callable[[Stream], Iterable[Sampler]]


class TrainingError(RuntimeError):
    """Training cannot go on, for the reason in the message."""


@dataclass(frozen=True)
class TrainingSettings:
    """How to train; `window` batches are pooled into the running ESS, which also selects the best weights.

    These are the last ones whose window is not below the highest by more than two errors; with `ema` the moving
    averages of that decay at its end.

    Raises ValueError naming the settings that are out of range.
    """

    steps: int = 1000
    batch: int = 128
    accumulate: int = 1
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: int = 50
    decay: str = "cosine"
    gradient_clip: float | None = 1.0
    window: int = 50
    seed: int = 0
    schedule: str = END_TO_END
    fine_tuning: float = 1 / 3
    fine_tuning_rate: float | None = None
    learning_rates: tuple[float, ...] | None = None
    ema: float | None = None

    def __post_init__(self) -> None:
        counts = {"batch": 2, "accumulate": 1, "window": 1, "steps": 0, "warmup": 0}
        wrong = [f"{name} >= {low}" for name, low in counts.items() if getattr(self, name) < low]
        wrong += ["learning_rate > 0"] if not self.learning_rate > 0 else []
        wrong += ["gradient_clip > 0"] if self.gradient_clip is not None and not self.gradient_clip > 0 else []
        wrong += ["decay 'cosine' or 'none'"] if self.decay not in ("cosine", "none") else []
        wrong += ["fine_tuning_rate > 0"] if self.fine_tuning_rate is not None and not self.fine_tuning_rate > 0 else []
        wrong += ["learning_rates > 0"] if any(not rate > 0 for rate in self.learning_rates or ()) else []
        wrong += ["0 <= ema < 1"] if self.ema is not None and not 0 <= self.ema < 1 else []
        if wrong:
            raise ValueError(f"TrainingSettings needs {', '.join(wrong)}; got {self}")

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step: linear warm-up, then constant or half a cosine, 0 after `steps`."""
        ramp = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        fall = 0.5 * (1 + math.cos(math.pi * step / steps)) if self.decay == "cosine" else 1.0
        return self.learning_rate * ramp * fall


@dataclass(frozen=True)
class StepRecord:
    """What one training step did.

    `loss = -mean(log w)`, for reverse KL an upper bound of `-log Z`, for forward KL, whose samples are the target's, a
    lower one; `ess` of the running window; `seconds` since the start. In a step by parts, `part` is the one that
    learned, counted from 1, and loss and ESS are those of the sampler that ends with it, for forward KL of the prior
    with this part and those behind it; of several, it is the one whose sampler is the whole, and `part_ess` has the
    running ESS of all of them. 0 is end to end.
    """

    step: int
    loss: float
    ess: float
    gradient_norm: float
    learning_rate: float
    seconds: float
    skipped: bool
    part: int = 0
    part_ess: list[float] = field(default_factory=list)


@dataclass
class Trainer:
    """The state of a training run: everything `state_dict` holds is needed to go on bit for bit.

    A `PartwiseSampler` trains by the schedule of the settings; any other one end to end. With `fine_tuner`, the last
    `fine_tuning` of the steps are by that estimator, and the best weights are chosen among theirs. `team` are the
    processes that share every batch (`latticeflow.training.data_parallel`). Raises ValueError
    for parts that are to match scores, as what is before a part has no score that a part could carry, and for samplers
    that are no flow.
    """

    sampler: Sampler
    action: Action
    estimator: Estimator
    settings: TrainingSettings
    step: int = 0
    records: list[StepRecord] = field(default_factory=list)
    cpu_elsewhere: float = 0.0  # the CPU seconds of other processes in this life
    fine_tuner: Estimator | None = None
    team: Alone = ALONE

    def __post_init__(self) -> None:
        settings, learning = self.settings, isinstance(self.estimator, OnSamples)
        rates = settings.learning_rate, settings.learning_rates
        self.optimizers = Optimizers(self.sampler, *rates, betas=settings.betas)
        parts = len(self.optimizers.parts)
        turns = settings.schedule, parts, settings.steps, settings.fine_tuning, settings.fine_tuning_rate
        self.schedule = Schedule(*turns, on_data=learning, stages=self.fine_tuner is not None)
        matching = isinstance(self.estimator, ExplicitScore | ScoreMatching)
        if matching and not isinstance(self.sampler, FlowSampler):
            raise ValueError(f"scores are those of one flow, got a {type(self.sampler).__name__}")
        if matching and self.schedule.local_steps:
            raise ValueError("parts of a flow cannot match scores by themselves; choose schedule 'end_to_end'")
        self.whole = 0 if learning else -1  # the place of the part whose objective is that of the whole sampler
        self.recent: list[deque[Tensor]] = [deque(maxlen=settings.window) for _ in range(parts)]
        self.best_ess, self.best_weights = 0.0, self._weights()
        self.average = None if settings.ema is None else WeightAverage(self.sampler, settings.ema)
        self.started = time.perf_counter()

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Begin with the weights of another sampler, of another lattice for instance.

        Raises ValueError, naming them and their shapes, for weights that are missing, too many or of another shape.
        """
        own = self.sampler.state_dict()
        wrong = [
            f"{name} is {_shape(weights.get(name))}, expected {_shape(own.get(name))}"
            for name in sorted({*own, *weights})
            if _shape(weights.get(name)) != _shape(own.get(name))
        ]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError(f"the weights to start from do not fit: {'; '.join(wrong[:3])}{more}")
        self.sampler.load_state_dict(weights)
        self.best_weights = self._weights()
        if self.average is not None:
            self.average = WeightAverage(self.sampler, self.average.decay)

    def run(self, on_step: Callable[["Trainer", StepRecord], None] | None = None) -> None:
        """Take the remaining steps, then restore the best weights; `on_step` sees each record.

        Raises TrainingError when the last 20 steps, those of an earlier life included, were all skipped, and, naming
        the layer, when weights have become singular.
        """
        while self.step < self.settings.steps:
            record = self._take_step()
            self.records.append(record)
            if on_step is not None:
                on_step(self, record)
            self._stop_if_hopeless()
        self._stop_if_hopeless()  # an earlier life may have come to its last step
        self.sampler.load_state_dict(self.best_weights)

    def _take_step(self) -> StepRecord:
        learning = self.schedule.learning(self.step)
        if self.fine_tuner is not None and self.step == self.schedule.first_steps:
            self._begin_fine_tuning()
        try:
            if self.step % REFINE_EVERY == 0:
                self._refine()
            record = self.learn(learning, partial(self._learners, learning))
        except SingularWeightsError as error:
            raise TrainingError(
                f"step {self.step + 1}: {error}; lower learning_rate ({self.settings.learning_rate:g})"
            ) from error
        self.settle(record)
        return record

    def _begin_fine_tuning(self) -> None:
        """Forget windows whose fields another estimator drew, and which weights were the best of them."""
        self.best_ess = 0.0
        for recent in self.recent:
            recent.clear()

    def learn(self, learning: Sequence[int] | None, learners: Learners) -> StepRecord:
        """Let these parts learn for a step, None for all together; the record is of them alone.

        `learners(generator)` are the samplers that their objectives are computed with, in their order; it is called
        once for each batch that is accumulated.
        """
        settings, rate = self.settings, self.schedule.rate(self.settings, self.step)
        generator = stream(settings.seed, "training", self.step, device=self.device)
        generator = self.team.stream(generator, settings.batch)
        self.optimizers.zero_grad()
        drawn = [self._accumulate(learners(generator), generator) for _ in range(settings.accumulate)]
        log_weights = self.team.joined_rows([torch.cat(each) for each in zip(*drawn, strict=True)])
        groups = [self.optimizers.everything] if learning is None else [(k,) for k in learning]
        self.team.average(p for parts in groups for k in parts for p in self.optimizers.parameters[k])
        norms, taken = zip(*(self._step(*each, rate) for each in zip(groups, log_weights, strict=True)), strict=True)
        self.step += 1
        place = groups[self.whole][self.whole]
        several = learning is not None and self.schedule.kind == SIMULTANEOUS
        return StepRecord(
            step=self.step,
            loss=-float(log_weights[self.whole].mean()),
            ess=self.running_ess(place),
            gradient_norm=norms[self.whole],
            learning_rate=rate if learning is None else rate * self.optimizers.factors[place],
            seconds=time.perf_counter() - self.started,
            skipped=not all(taken),
            part=0 if learning is None else place + 1,
            part_ess=[self.running_ess(k) for k in learning] if several else [],
        )

    def settle(self, record: StepRecord) -> None:
        """Keep the weights where they are the best, and make the most of those after the last step."""
        if not record.skipped:
            if self.average is not None:
                self.average.update(self.sampler)
            self._keep_best()
        if self.step == self.settings.steps:
            self._refine_best()

    def _accumulate(self, learners: Iterable[Sampler], generator: Stream) -> list[Tensor]:
        """Add one batch to the gradients of all that learns; return its log weights, of one part after the other."""
        return [self._estimate(learner, generator) for learner in learners]

    def _learners(self, learning: tuple[int, ...] | None, generator: Stream) -> Iterable[Sampler]:
        if learning is None:
            return [self.sampler]
        if self.schedule.on_data:
            return map(self.sampler.on_data, learning)
        if len(learning) > 1:
            return self.sampler.chain()
        return [self.sampler.part(learning[0], self.team.share(self.settings.batch), generator)]

    def _estimate(self, learner: Sampler, generator: Stream) -> Tensor:
        tuning = self.fine_tuner is not None and self.step >= self.schedule.first_steps
        estimator = self.fine_tuner if tuning else self.estimator
        surrogate, log_weight = estimator(learner, self.action, self.team.share(self.settings.batch), generator)
        (surrogate / self.settings.accumulate).backward()
        return log_weight

    def _step(self, parts: tuple[int, ...], log_weight: Tensor, rate: float) -> tuple[float, bool]:
        """Step these parts, unless something is not finite; return the norm of their gradient, and whether."""
        norm = self.optimizers.clip(parts, self.settings.gradient_clip)
        finite = math.isfinite(norm) and bool(torch.isfinite(log_weight).all())
        if finite:
            self.optimizers.step(parts, rate)
            self.recent[parts[self.whole]].append(log_weight)
        return norm, finite

    def running_ess(self, part: int | None = None) -> float:
        """Return the ESS/N in the window of the sampler of a part, counted from 0; by default of the whole one."""
        recent = self.recent[self.whole if part is None else part]
        return ess(torch.cat(tuple(recent)).cpu().numpy()) if recent else 0.0

    def _refine(self, **draws: int) -> bool:
        """Let the sampler adapt what gradients do not."""
        return self.sampler.refine(
            self.action, stream(self.settings.seed, "refining", self.step, device=self.device), **draws
        )

    def _refine_best(self) -> None:
        """Do so once more for the best weights, which a run ends with, on more draws."""
        last = self._weights()
        self.sampler.load_state_dict(self.best_weights)
        if self._refine(draws=LAST_DRAWS):
            self.best_weights = self._weights()
        self.sampler.load_state_dict(last)

    def trial_step(self) -> None:
        """Compute one gradient and throw it away: for timing."""
        self._accumulate([self.sampler], stream(self.settings.seed, "trial", device=self.device))
        self.optimizers.zero_grad()

    @property
    def device(self) -> torch.device:
        return next(self.sampler.parameters()).device

    def _keep_best(self) -> None:
        """Keep the weights, unless the ESS of their window is below the highest by more than two of its errors.

        The highest of many is high by luck as well, the more so the heavier the weights' tail.
        """
        last, window, recent = self.step == self.settings.steps, self.settings.window, self.recent[self.whole]
        if not last and (self.step % window or len(recent) < window):
            return
        running, error = self.running_ess(), float(np.nan_to_num(ess_error(torch.cat(tuple(recent)).cpu().numpy())))
        if running + 2 * error >= self.best_ess:
            self.best_weights = self._weights() if self.average is None else self.average.copy()
        self.best_ess = max(self.best_ess, running)

    def _stop_if_hopeless(self) -> None:
        if hopeless([record.skipped for record in self.records[-MAX_SKIPPED_IN_A_ROW:]]):
            raise TrainingError(
                f"step {self.step}: {MAX_SKIPPED_IN_A_ROW} steps in a row had a non-finite loss or gradient; "
                f"lower learning_rate ({self.settings.learning_rate:g}) or set gradient_clip"
            )

    def state_dict(self) -> dict[str, object]:
        """Return tensors, numbers, lists and dicts from which `load_state_dict` continues bit for bit."""
        return {
            "step": self.step,
            "weights": self._weights(),
            "optimizers": self.optimizers.state_dict(),
            "recent": [list(recent) for recent in self.recent],
            "best_ess": self.best_ess,
            "best_weights": self.best_weights,
            "records": [asdict(record) for record in self.records],
            "average": None if self.average is None else self.average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.step = state["step"]
        self.sampler.load_state_dict(state["weights"])
        self.optimizers.load_state_dict(state["optimizers"])
        self.recent = [deque(recent, maxlen=self.settings.window) for recent in state["recent"]]
        self.best_ess, self.best_weights = state["best_ess"], state["best_weights"]
        self.records = [StepRecord(**record) for record in state["records"]]
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.started = time.perf_counter() - (self.records[-1].seconds if self.records else 0.0)

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.sampler.state_dict().items()}


def hopeless(skipped: Sequence[bool]) -> bool:
    """Return whether a training ended in 20 skipped steps: it cannot go on."""
    return len(skipped) >= MAX_SKIPPED_IN_A_ROW and all(skipped[-MAX_SKIPPED_IN_A_ROW:])


def _shape(weight: Tensor | None) -> str:
    return "absent" if weight is None else str(list(weight.shape))


def train(
    sampler: Sampler,
    action: Action,
    estimator: str = "path",
    *,
    signal_clip: float | None = None,
    target: Target | None = None,
    noise: float | None = None,
    difference: float | None = None,
    fine_tuning_estimator: str | None = None,
    on_step: Callable[[Trainer, StepRecord], None] | None = None,
    **settings: Any,
) -> list[StepRecord]:
    """Train the sampler's flow towards `exp(-S)` in place and return one record per step.

    `estimator`, `signal_clip`, `target`, `noise` and `difference` as in `make_estimator`; `settings` are the fields of
    TrainingSettings. With `fine_tuning_estimator`, one of reverse KL, the last `fine_tuning` of the steps are by that.
    The best weights (running ESS) are kept. Raises TrainingError when steps keep failing, ValueError for
    unknown or contradictory arguments.
    """
    widths = {"noise": noise, "difference": difference}
    chosen = make_estimator(estimator, signal_clip=signal_clip, target=target, **widths)
    tuner = None if fine_tuning_estimator is None else make_estimator(fine_tuning_estimator)
    trainer = Trainer(sampler, action, chosen, TrainingSettings(**settings), fine_tuner=tuner)
    trainer.run(on_step)
    return trainer.records
