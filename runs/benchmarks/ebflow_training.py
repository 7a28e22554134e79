"""What the parts of ebflow.py share: the flow, the losses by name, a loop that counts CPU seconds of steps alone."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latticeflow.actions import Action
from latticeflow.flows import Sequential, SmoothLeakyReLU, linear_flow
from latticeflow.samplers import Sampler
from latticeflow.streams import stream
from latticeflow.training import SCORE_LOSSES, WeightAverage, make_score_loss
from latticeflow.training.score import ScoreLoss, explicit

LOSSES = ("likelihood", *SCORE_LOSSES, "explicit")
SLOPE, EMA = 0.3, 0.999
Row = dict[str, Any]


def fully_connected(shape: Sequence[int], *, linear: str = "dense") -> Sequential:
    """Return `x -> W, s, W, s`, s a smooth leaky ReLU of slope 0.3, the fully connected flow of arXiv:2305.15267."""
    return Sequential([SmoothLeakyReLU(SLOPE), *linear_flow(shape, layers=2, linear=linear, slope=SLOPE).layers])


def make_loss(name: str, *, action: Action | None = None, **widths: float | None) -> ScoreLoss:
    """Return `loss(sampler, x, generator)`, `(batch,)`; "explicit" is against the force of an action."""
    if name == "likelihood":
        return lambda sampler, x, generator: -sampler.log_prob(x)
    if name == "explicit":
        return lambda sampler, x, generator: explicit(sampler, x, action)
    return make_score_loss(name, **widths)


@dataclass(frozen=True)
class Learning:
    """How to learn: Adam, its rate falling to 0 by half a cosine or not; `budget` are CPU seconds that end it too."""

    steps: int
    rate: float
    decay: str = "cosine"
    clip: float = 100.0
    points: int = 20
    budget: float = math.inf


def learn(
    sampler: Sampler,
    draw: Callable[[int], Tensor],
    loss: ScoreLoss,
    judge: Callable[[Sampler], float],
    how: Learning,
    *,
    seed: int = 0,
) -> Row:
    """Train in place; return the curve of the last weights and of their averages, which the sampler has at the end.

    `draw(step)` gives a batch. It and `judge`, whose values the curve has, are not counted in the CPU seconds.
    """
    weights = [weight for weight in sampler.parameters() if weight.requires_grad]
    adam, average = torch.optim.Adam(weights, lr=how.rate), WeightAverage(sampler, EMA)
    curve: dict[str, list[float]] = {"step": [], "seconds": [], "last": [], "average": []}
    seconds, skipped = 0.0, 0
    marks = {round(k * how.steps / how.points) for k in range(how.points + 1)}
    paced = math.isfinite(how.budget)
    for step in range(how.steps + 1):
        over = seconds >= how.budget
        due = seconds >= how.budget * len(curve["step"]) / how.points if paced else step in marks
        if due or over or step == how.steps:
            _judge(curve, sampler, average, judge, step, seconds)
        if over or step == how.steps:
            break
        x, generator = draw(step), stream(seed, "directions", step)
        started = time.process_time()
        if how.decay == "cosine":
            adam.param_groups[0]["lr"] = how.rate * 0.5 * (1 + math.cos(math.pi * step / how.steps))
        adam.zero_grad()
        value = loss(sampler, x, generator).mean()
        value.backward(inputs=weights)
        norm = torch.nn.utils.clip_grad_norm_(weights, how.clip)
        if bool(torch.isfinite(value)) and bool(torch.isfinite(norm)):
            adam.step()
            average.update(sampler)
        else:
            skipped += 1
        seconds += time.process_time() - started
    sampler.load_state_dict(average.weights)
    return {"steps": curve["step"][-1], "seconds": round(seconds, 2), "skipped": skipped, "curve": curve}


def _judge(
    curve: dict[str, list[float]],
    sampler: Sampler,
    average: WeightAverage,
    judge: Callable[[Sampler], float],
    step: int,
    seconds: float,
) -> None:
    """Put a point on the curve."""
    last = judge(sampler)
    with averaged(sampler, average):
        point = step, round(seconds, 3), _rounded(last), _rounded(judge(sampler))
    for values, value in zip(curve.values(), point, strict=True):
        values.append(value)


@contextmanager
def averaged(sampler: Sampler, average: WeightAverage) -> Iterator[None]:
    """Give a sampler the averages of its weights for a while."""
    last = {name: tensor.detach().clone() for name, tensor in sampler.state_dict().items()}
    sampler.load_state_dict(average.weights)
    try:
        yield
    finally:
        sampler.load_state_dict(last)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def epochs(data: Tensor, batch: int, seed: int) -> Callable[[int], Tensor]:
    """Return batches without replacement by the number of the step."""
    per_epoch = len(data) // batch

    def draw(step: int) -> Tensor:
        epoch, part = divmod(step, per_epoch)
        order = torch.randperm(len(data), generator=stream(seed, "epoch", epoch))
        return data[order[part * batch : (part + 1) * batch]]

    return draw


@torch.no_grad()
def negative_log_likelihood(sampler: Sampler, held_out: Tensor) -> float:
    return -float(sampler.log_prob(held_out).mean())
