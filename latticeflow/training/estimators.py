r"""Gradient estimators of the reverse and forward Kullback-Leibler divergence.

Each is a function `estimator(sampler, action, batch, generator) -> (surrogate, log_weight)`: backward through the
scalar surrogate leaves the estimate in the parameters' gradients, and `log_weight = -S(x) - log q(x)`, `(batch,)`
float64, tells the loss bound and the ESS. With `signal = log q(x) + S(x)`:

* reinforce        `mean( d log q(x) (signal - baseline) )`, x held fixed, leave-one-out baseline; needs S alone, and
                   has zero variance at q = p (arXiv:2308.13294, section 2).
* reparametrisation `mean( d signal(f(z)) )`; needs dS/dx.
* path             the same less the score term, `mean( d signal / dx  dx/dtheta )`; needs dS/dx, zero variance at q = p
                   (arXiv:1703.09194, 2207.08219).
* forward_kl       `-mean( d log q(x) )` on samples of the target.
* explicit         `mean( d |score(x) - F(x)|^2 / 2 )`, F the force, on draws of the sampler that are held fixed, or on
                   given configurations; needs dS/dx, and no log-determinant of a linear layer.
* sliced, denoising, finite_difference   score matching on samples of the target, without its action
                   (`latticeflow.training.score`).
"""

import math
from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Generator, Tensor

from latticeflow.actions import Action
from latticeflow.samplers import FlowSampler, Sampler
from latticeflow.training.score import SCORE_LOSSES, WIDTHS, ScoreLoss, make_score_loss
from latticeflow.training.score import explicit as explicit_score

Estimate = tuple[Tensor, Tensor]
Target = Callable[[int, Generator | None], Tensor]


class Estimator(Protocol):
    """Returns a surrogate loss and the log weights of its batch."""

    def __call__(self, sampler: Sampler, action: Action, batch: int, generator: Generator | None) -> Estimate: ...


def reinforce(
    sampler: Sampler,
    action: Action,
    batch: int,
    generator: Generator | None,
    *,
    signal_clip: float = math.inf,
    advantage: Callable[[Tensor], Tensor] | None = None,
) -> Estimate:
    """Score-function estimator with the leave-one-out baseline.

    `signal_clip` limits |signal - baseline|: a small bias against the rare huge weights of early training. `advantage`
    is `leave_one_out` unless other processes have more rows of the batch.
    """
    x, log_q = sampler.sample_held(batch, generator)
    log_weight = _log_weight(action, x, log_q)
    clipped = (advantage or leave_one_out)(-log_weight).clamp(-signal_clip, signal_clip)
    return (log_q * clipped).mean(), log_weight


def leave_one_out(signal: Tensor) -> Tensor:
    """Return `signal_i - mean_{j != i} signal_j`."""
    n = len(signal)
    return (signal - signal.mean()) * (n / (n - 1))


def reparametrisation(sampler: Sampler, action: Action, batch: int, generator: Generator | None) -> Estimate:
    """Pathwise estimator of the whole signal."""
    x, log_q = sampler.sample(batch, generator)
    signal = log_q + action(x).double()
    return signal.mean(), -signal.detach()


def path(sampler: Sampler, action: Action, batch: int, generator: Generator | None) -> Estimate:
    """Pathwise estimator without the score term.

    A flow finds `d log q / dx` on its way (arXiv:2403.15881), other samplers evaluate their density at what they drew.
    """
    x, log_q, *score = (
        sampler.sample_with_score(batch, generator)
        if isinstance(sampler, FlowSampler)
        else sampler.sample(batch, generator)
    )
    leaf = x.detach().requires_grad_()
    action_value = action(leaf).double()
    signal = action_value if score else sampler.log_prob(leaf) + action_value
    gradient = torch.autograd.grad(signal.sum(), leaf)[0] if signal.requires_grad else torch.zeros_like(leaf)
    return (x * sum(score, gradient)).sum() / batch, -(action_value + log_q).detach()


@dataclass(frozen=True)
class OnSamples(ABC):
    """An estimator on fields drawn by `target(n, generator)`."""

    target: Target

    def _draw(self, sampler: Sampler, batch: int, generator: Generator | None) -> Tensor:
        return self.target(batch, generator).to(next(sampler.parameters()))


@dataclass(frozen=True)
class ForwardKL(OnSamples):
    """The maximum-likelihood estimator."""

    def __call__(self, sampler: Sampler, action: Action, batch: int, generator: Generator | None) -> Estimate:
        x = self._draw(sampler, batch, generator)
        log_q = sampler.log_prob(x)
        return -log_q.mean(), _log_weight(action, x, log_q)


@dataclass(frozen=True)
class ScoreMatching(OnSamples):
    """A score loss of samples."""

    loss: ScoreLoss

    def __call__(self, sampler: Sampler, action: Action, batch: int, generator: Generator | None) -> Estimate:
        x = self._draw(sampler, batch, generator)
        surrogate = self.loss(sampler, x, generator).mean()
        with torch.no_grad():
            return surrogate, _log_weight(action, x, sampler.log_prob(x))


@dataclass(frozen=True)
class ExplicitScore:
    """Explicit score matching, on draws of the sampler or, where it is given, of `target(n, generator)`."""

    target: Target | None = None

    def __call__(self, sampler: Sampler, action: Action, batch: int, generator: Generator | None) -> Estimate:
        with torch.no_grad():
            if self.target is None:
                x, log_q = sampler.sample(batch, generator)
            else:
                x = self.target(batch, generator).to(next(sampler.parameters()))
                log_q = sampler.log_prob(x)
        return explicit_score(sampler, x, action).mean(), _log_weight(action, x, log_q)


@torch.no_grad()
def _log_weight(action: Action, x: Tensor, log_q: Tensor) -> Tensor:
    return -action(x).double() - log_q.detach()


def make_estimator(
    name: str,
    *,
    signal_clip: float | None = None,
    target: Target | None = None,
    noise: float | None = None,
    difference: float | None = None,
) -> Estimator:
    """Return the estimator of that name.

    `signal_clip` belongs to reinforce, `noise` to denoising and `difference` to finite_difference. `target(n,
    generator)` draws fields: of the target, for forward_kl and the score losses of samples, which need it; for explicit
    any. Raises ValueError for an unknown name, a setting of another estimator or out of range, and a missing target.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {name!r}")
    if signal_clip is not None and name != "reinforce":
        raise ValueError(f"signal_clip belongs to the reinforce estimator, got it with {name!r}")
    if signal_clip is not None and not signal_clip > 0:
        raise ValueError(f"signal_clip must be positive, got {signal_clip!r}")
    if target is not None and name in REVERSE:
        raise ValueError(f"target belongs to estimators that learn from samples, got it with {name!r}")
    if target is None and name in ON_SAMPLES:
        raise ValueError(f"{name} needs target, a function that draws fields of the target distribution")
    if name in SCORE_LOSSES:
        return ScoreMatching(target, make_score_loss(name, noise=noise, difference=difference))
    for width, belongs in WIDTHS.items():
        if {"noise": noise, "difference": difference}[width] is not None:
            raise ValueError(f"{width} belongs to the {belongs} estimator, got it with {name!r}")
    if name == "forward_kl":
        return ForwardKL(target)
    if name == "explicit":
        return ExplicitScore(target)
    return partial(reinforce, signal_clip=signal_clip) if signal_clip is not None else REVERSE[name]


REVERSE: dict[str, Estimator] = {"reinforce": reinforce, "reparametrisation": reparametrisation, "path": path}
ON_SAMPLES = ("forward_kl", *SCORE_LOSSES)
"""Those that need samples of the target."""
ESTIMATORS = (*REVERSE, "explicit", *ON_SAMPLES)
SCORE_ESTIMATORS = ("explicit", *SCORE_LOSSES)
