"""The training loop: any estimator, Adam with a schedule, bad steps skipped and counted, best weights kept."""

import copy
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from latticeflow.actions import Action
from latticeflow.samplers import Sampler
from latticeflow.stats import ess
from latticeflow.streams import stream
from latticeflow.training.estimators import Estimator, make_estimator

MAX_SKIPPED_IN_A_ROW = 20
REFINE_EVERY, LAST_DRAWS = 100, 2048


class TrainingError(RuntimeError):
    """Training cannot go on, for the reason in the message."""


@dataclass(frozen=True)
class TrainingSettings:
    """How to train; `window` batches are pooled into the running ESS, which also selects the best weights.

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

    def __post_init__(self) -> None:
        counts = {"batch": 2, "accumulate": 1, "window": 1, "steps": 0, "warmup": 0}
        wrong = [f"{name} >= {low}" for name, low in counts.items() if getattr(self, name) < low]
        wrong += ["learning_rate > 0"] if not self.learning_rate > 0 else []
        wrong += ["gradient_clip > 0"] if self.gradient_clip is not None and not self.gradient_clip > 0 else []
        wrong += ["decay 'cosine' or 'none'"] if self.decay not in ("cosine", "none") else []
        if wrong:
            raise ValueError(f"TrainingSettings needs {', '.join(wrong)}; got {self}")

    def rate(self, step: int) -> float:
        """Return the learning rate of a step: linear warm-up, then constant or half a cosine down to 0."""
        ramp = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        fall = 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.decay == "cosine" else 1.0
        return self.learning_rate * ramp * fall


@dataclass(frozen=True)
class StepRecord:
    """What one training step did.

    `loss = -mean(log w)`, for reverse KL an upper bound of `-log Z`, for forward KL, whose samples are the target's, a
    lower one; `ess` of the running window; `seconds` since the start.
    """

    step: int
    loss: float
    ess: float
    gradient_norm: float
    learning_rate: float
    seconds: float
    skipped: bool


@dataclass
class Trainer:
    """The state of a training run: everything `state_dict` holds is needed to go on bit for bit."""

    sampler: Sampler
    action: Action
    estimator: Estimator
    settings: TrainingSettings
    step: int = 0
    records: list[StepRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.sampler.parameters(), betas=self.settings.betas)
        self.recent: deque[Tensor] = deque(maxlen=self.settings.window)
        self.best_ess, self.best_weights = 0.0, self._weights()
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

    def run(self, on_step: Callable[["Trainer", StepRecord], None] | None = None) -> None:
        """Take the remaining steps, then restore the best weights; `on_step` sees each record.

        Raises TrainingError when the last 20 steps, those of an earlier life included, were all skipped.
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
        settings, rate = self.settings, self.settings.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        generator = stream(settings.seed, "training", self.step, device=self.device)
        if self.step % REFINE_EVERY == 0:
            self._refine()
        self.optimizer.zero_grad()
        log_weight = torch.cat([self._accumulate(generator) for _ in range(settings.accumulate)])
        limit = settings.gradient_clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.sampler.parameters(), limit))
        skipped = not (math.isfinite(norm) and bool(torch.isfinite(log_weight).all()))
        if not skipped:
            self.optimizer.step()
            self.recent.append(log_weight)
        running = ess(torch.cat(tuple(self.recent)).cpu().numpy()) if self.recent else 0.0
        self.step += 1
        if not skipped:
            self._keep_best(running)
        if self.step == settings.steps:
            self._refine_best()
        seconds = time.perf_counter() - self.started
        return StepRecord(self.step, -float(log_weight.mean()), running, norm, rate, seconds, skipped)

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
        self._accumulate(stream(self.settings.seed, "trial", device=self.device))
        self.optimizer.zero_grad()

    @property
    def device(self) -> torch.device:
        return next(self.sampler.parameters()).device

    def _accumulate(self, generator: torch.Generator) -> Tensor:
        surrogate, log_weight = self.estimator(self.sampler, self.action, self.settings.batch, generator)
        (surrogate / self.settings.accumulate).backward()
        return log_weight

    def _keep_best(self, running: float) -> None:
        last = self.step == self.settings.steps
        whole = self.step % self.settings.window == 0 and len(self.recent) == self.settings.window
        if (whole or last) and running >= self.best_ess:
            self.best_ess, self.best_weights = running, self._weights()

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
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "recent": list(self.recent),
            "best_ess": self.best_ess,
            "best_weights": self.best_weights,
            "records": [asdict(record) for record in self.records],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.step = state["step"]
        self.sampler.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.recent = deque(state["recent"], maxlen=self.settings.window)
        self.best_ess, self.best_weights = state["best_ess"], state["best_weights"]
        self.records = [StepRecord(**record) for record in state["records"]]
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
    target: Callable[[int, torch.Generator | None], Tensor] | None = None,
    on_step: Callable[[Trainer, StepRecord], None] | None = None,
    **settings: Any,
) -> list[StepRecord]:
    """Train the sampler's flow towards `exp(-S)` in place and return one record per step.

    `estimator`, `signal_clip` and `target` as in `make_estimator`; `settings` are the fields of TrainingSettings. The
    weights of the best window (running ESS) are kept. Raises TrainingError when steps keep failing, ValueError for
    unknown or contradictory arguments.
    """
    chosen = make_estimator(estimator, signal_clip=signal_clip, target=target)
    trainer = Trainer(sampler, action, chosen, TrainingSettings(**settings))
    trainer.run(on_step)
    return trainer.records
