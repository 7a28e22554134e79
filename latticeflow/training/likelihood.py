"""Fits to samples by likelihood or score: Adam, early stopping on held-out samples, best weights kept."""

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from latticeflow.flows import SingularWeightsError
from latticeflow.samplers import Sampler
from latticeflow.streams import stream
from latticeflow.training.averaging import WeightAverage
from latticeflow.training.samples import check_samples, held_out_split
from latticeflow.training.schedule import END_TO_END, Optimizers, Schedule
from latticeflow.training.score import WIDTHS, ScoreLoss, make_score_loss
from latticeflow.training.trainer import MAX_SKIPPED_IN_A_ROW, TrainingError

CHUNK = 4096
LIKELIHOOD = "likelihood"


@dataclass(frozen=True)
class LikelihoodSettings:
    """How to fit: `validation` is the fraction of samples that is held out to choose the best weights.

    Training ends after `steps`, or after `patience` evaluations, `evaluate_every` steps apart, that found nothing
    better. `decay` is that of the learning rate, half a cosine down to 0 at `steps` or none. `schedule`,
    `fine_tuning` and its rate are those of `Schedule`, for a `PartwiseSampler`; nothing ends before all parts have
    learned. `loss` is "likelihood" or a score loss (`latticeflow.training.score`), with `noise` or `difference`; what
    is held out is judged by its likelihood in any case. With `ema`, a decay, moving averages of the weights are
    evaluated and kept. Raises ValueError naming the settings that are out of range.
    """

    steps: int = 2000
    batch: int = 256
    learning_rate: float = 1e-3
    validation: float = 0.2
    evaluate_every: int = 50
    patience: int = 10
    weight_decay: float = 0.0
    decay: str = "cosine"
    gradient_clip: float | None = None
    seed: int = 0
    schedule: str = END_TO_END
    fine_tuning: float = 1 / 3
    fine_tuning_rate: float | None = None
    learning_rates: tuple[float, ...] | None = None
    loss: str = LIKELIHOOD
    noise: float | None = None
    difference: float | None = None
    ema: float | None = None

    def __post_init__(self) -> None:
        counts = {"steps": 0, "batch": 1, "evaluate_every": 1, "patience": 1, "seed": 0}
        wrong = [f"{name} >= {low}" for name, low in counts.items() if getattr(self, name) < low]
        wrong += ["0 < learning_rate < inf"] if not 0 < self.learning_rate < math.inf else []
        wrong += ["0 < validation < 1"] if not 0 < self.validation < 1 else []
        wrong += ["0 <= weight_decay < inf"] if not 0 <= self.weight_decay < math.inf else []
        wrong += ["gradient_clip > 0"] if self.gradient_clip is not None and not self.gradient_clip > 0 else []
        wrong += ["decay 'cosine' or 'none'"] if self.decay not in ("cosine", "none") else []
        own = self.fine_tuning_rate
        wrong += ["0 < fine_tuning_rate < inf"] if own is not None and not 0 < own < math.inf else []
        wrong += (
            ["0 < learning_rates < inf"] if any(not 0 < rate < math.inf for rate in self.learning_rates or ()) else []
        )
        wrong += ["0 <= ema < 1"] if self.ema is not None and not 0 <= self.ema < 1 else []
        if wrong:
            raise ValueError(f"LikelihoodSettings needs {', '.join(wrong)}; got {self}")

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step, counted from 0, of `steps`."""
        fall = 0.5 * (1 + math.cos(math.pi * step / steps)) if self.decay == "cosine" else 1.0
        return self.learning_rate * fall


@dataclass(frozen=True)
class FitRecord:
    """What one evaluation found after `step` steps: `held_out` is the mean of `-log q` over the held-out samples.

    `loss` is that of the training batches since the record before, NaN where there was none, `skipped` the number of
    those that were not finite, `learning_rate` that of the next step, `seconds` since the start.
    """

    step: int
    loss: float
    held_out: float
    learning_rate: float
    seconds: float
    skipped: int


def fit(
    sampler: Sampler,
    data: Tensor,
    *,
    weights: Tensor | None = None,
    settings: LikelihoodSettings | None = None,
) -> list[FitRecord]:
    """Minimise the mean of `-log q` over samples `(n, *shape)` in place; return the records, the first before training.

    With `weights` `(n,)` it is `sum w (-log q) / sum w`, as if a sample came w times. A random part of the samples,
    which `held_out_split` tells, is held out: it gives no gradients, and the weights with its smallest loss are those
    at the end. Batches are drawn without replacement, epoch by epoch, a remainder that fills none being left out. All
    random numbers come from the seed. A step whose loss or gradient is not finite is skipped.

    Raises ValueError for data that are not finite or do not fit the sampler, weights that are not `(n,)`, negative, not
    finite or all zero, fewer than two samples of positive weight in either part and a sampler without parameters;
    TrainingError, the best weights being restored, for 20 skipped steps in a row, singular weights of a layer, which it
    names, and if no held-out loss was finite.
    """
    fitting = _Fit(sampler, data, weights, settings or LikelihoodSettings())
    try:
        fitting.run()
    except SingularWeightsError as error:
        rate = fitting.settings.learning_rate
        raise TrainingError(f"step {fitting.step}: {error}; lower learning_rate ({rate:g})") from error
    finally:
        sampler.load_state_dict(fitting.best_weights)
        sampler.train(fitting.was_training)
    return fitting.records


class _Fit:
    """The state of a fit while it runs."""

    def __init__(
        self,
        sampler: Sampler,
        data: Tensor,
        weights: Tensor | None,
        settings: LikelihoodSettings,
    ) -> None:
        self.sampler, self.settings, self.was_training = sampler, settings, sampler.training
        if not list(sampler.parameters()):
            raise ValueError("the sampler has no parameters to fit")
        samples = check_samples(sampler, data, weights)
        chosen = held_out_split(len(samples.fields), validation=settings.validation, seed=settings.seed)
        if min(map(len, chosen)) < 2:
            raise ValueError(
                f"validation = {settings.validation:g} splits {len(samples.fields)} samples of positive weight into "
                f"{len(chosen[0])} to train on and {len(chosen[1])} held out, expected at least 2 of each"
            )
        self.device = next(sampler.parameters()).device
        self.training, self.held_out = (samples[part.to(self.device)].normalised() for part in chosen)
        rates = settings.learning_rate, settings.learning_rates
        self.optimizers = Optimizers(sampler, *rates, weight_decay=settings.weight_decay)
        parts = len(self.optimizers.parts)
        turns = settings.schedule, parts, settings.steps, settings.fine_tuning, settings.fine_tuning_rate
        self.schedule = Schedule(*turns, on_data=True)
        self.loss = self._make_loss()
        self.average = None if settings.ema is None else WeightAverage(sampler, settings.ema)
        self.step = 0
        self.records: list[FitRecord] = []
        self.best, self.best_weights = math.inf, self._weights()
        self.started = time.perf_counter()

    def _make_loss(self) -> ScoreLoss:
        settings, widths = self.settings, {width: getattr(self.settings, width) for width in WIDTHS}
        if settings.loss != LIKELIHOOD:
            if self.schedule.local_steps:
                raise ValueError("parts of a flow cannot match scores by themselves; choose schedule 'end_to_end'")
            return make_score_loss(settings.loss, **widths)
        for width, value in widths.items():
            if value is not None:
                raise ValueError(f"{width} belongs to {WIDTHS[width]} score matching, got it with the likelihood")
        return lambda sampler, fields, generator=None: -sampler.log_prob(fields)

    def run(self) -> None:
        settings, batches = self.settings, self._batches()
        self._evaluate(0, [])
        losses, skipped_in_a_row, waited = [], 0, 0
        for step in range(1, settings.steps + 1):
            self.step = step
            losses.append(self._take_step(step - 1, next(batches)))
            skipped_in_a_row = 0 if math.isfinite(losses[-1]) else skipped_in_a_row + 1
            if skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                raise TrainingError(
                    f"step {step}: {MAX_SKIPPED_IN_A_ROW} steps in a row had a non-finite loss or gradient; "
                    f"lower learning_rate ({settings.learning_rate:g}) or set gradient_clip"
                )
            if step % settings.evaluate_every == 0 or step == settings.steps:
                waited = 0 if self._evaluate(step, losses) or step < self.schedule.local_steps else waited + 1
                losses = []
                if waited == settings.patience:
                    break
        if self.best == math.inf:
            raise TrainingError("the loss of the held-out samples was never finite")

    def _take_step(self, step: int, indices: Tensor) -> float:
        """Return the loss, of the part that learned last if not of all, NaN if the step was skipped."""
        learning, sampler = self.schedule.learning(step), self.sampler.train()
        self.optimizers.zero_grad()
        groups = [self.optimizers.everything] if learning is None else [(k,) for k in learning]
        learners = [sampler] if learning is None else map(sampler.on_data, learning)
        for parts, learner in zip(groups, learners, strict=True):
            generator = stream(self.settings.seed, "score", step, device=self.device)
            loss = self.training[indices].mean(partial(self.loss, learner, generator=generator))
            loss.backward()
            norm = self.optimizers.clip(parts, self.settings.gradient_clip)
            if not (bool(torch.isfinite(loss)) and math.isfinite(norm)):
                return math.nan
        for parts in groups:
            self.optimizers.step(parts, self.schedule.rate(self.settings, step))
        if self.average is not None:
            self.average.update(self.sampler)
        return float(loss.detach())

    def _evaluate(self, step: int, losses: list[float]) -> bool:
        """Record the held-out loss and return whether it is the smallest so far."""
        last = None if self.average is None else self._weights()
        if self.average is not None:
            self.sampler.load_state_dict(self.average.weights)
        held_out = self._held_out_loss()
        finite = [loss for loss in losses if math.isfinite(loss)]
        mean = math.fsum(finite) / len(finite) if finite else math.nan
        rate = self.schedule.rate(self.settings, step) if step < self.settings.steps else 0.0
        seconds = time.perf_counter() - self.started
        self.records.append(FitRecord(step, mean, held_out, rate, seconds, len(losses) - len(finite)))
        better = held_out < self.best
        if better:
            self.best, self.best_weights = held_out, self._weights()
        if last is not None:
            self.sampler.load_state_dict(last)
        return better

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        sampler, count = self.sampler.eval(), len(self.held_out.fields)
        pieces = (self.held_out[part] for part in torch.arange(count).split(CHUNK))
        return -math.fsum(len(piece.fields) * float(piece.mean(sampler.log_prob)) for piece in pieces) / count

    def _batches(self) -> Iterator[Tensor]:
        count = len(self.training.fields)
        size = min(self.settings.batch, count)
        for epoch in itertools.count():
            order = torch.randperm(count, generator=stream(self.settings.seed, "epoch", epoch))
            yield from order[: count - count % size].split(size)

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.sampler.state_dict().items()}
