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
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Generator, Tensor

from latticeflow.actions import Action
from latticeflow.samplers import Sampler

Estimate = tuple[Tensor, Tensor]


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
) -> Estimate:
    """Score-function estimator with the leave-one-out baseline.

    `signal_clip` limits |signal - baseline|: a small bias against the rare huge weights of early training.
    """
    with torch.no_grad():
        x, log_q = sampler.sample(batch, generator)
        log_weight = -action(x).double() - log_q
    advantage = _leave_one_out(-log_weight).clamp(-signal_clip, signal_clip)
    return (sampler.log_prob(x) * advantage).mean(), log_weight


def _leave_one_out(signal: Tensor) -> Tensor:
    """Return `signal_i - mean_{j != i} signal_j`."""
    n = len(signal)
    return (signal - signal.mean()) * (n / (n - 1))


def reparametrisation(sampler: Sampler, action: Action, batch: int, generator: Generator | None) -> Estimate:
    """Pathwise estimator of the whole signal."""
    x, log_q = sampler.sample(batch, generator)
    signal = log_q + action(x).double()
    return signal.mean(), -signal.detach()


def path(sampler: Sampler, action: Action, batch: int, generator: Generator | None) -> Estimate:
    """Pathwise estimator without the score term."""
    x, log_q = sampler.sample(batch, generator)
    leaf = x.detach().requires_grad_()
    action_value = action(leaf).double()
    (gradient,) = torch.autograd.grad((sampler.log_prob(leaf) + action_value).sum(), leaf)
    return (x * gradient).sum() / batch, -(action_value + log_q).detach()


@dataclass(frozen=True)
class ForwardKL:
    """The maximum-likelihood estimator on fields drawn by `target(n, generator)`."""

    target: Callable[[int, Generator | None], Tensor]

    def __call__(self, sampler: Sampler, action: Action, batch: int, generator: Generator | None) -> Estimate:
        parameter = next(sampler.parameters())
        x = self.target(batch, generator).to(parameter)
        log_q = sampler.log_prob(x)
        with torch.no_grad():
            log_weight = -action(x).double() - log_q
        return -log_q.mean(), log_weight


def make_estimator(
    name: str,
    *,
    signal_clip: float | None = None,
    target: Callable[[int, Generator | None], Tensor] | None = None,
) -> Estimator:
    """Return the estimator of that name.

    `signal_clip` belongs to reinforce, `target(n, generator)`, which draws fields of the target, to forward_kl. Raises
    ValueError for an unknown name, a clip with another estimator, or forward_kl without a target.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {name!r}")
    if signal_clip is not None and name != "reinforce":
        raise ValueError(f"signal_clip belongs to the reinforce estimator, got it with {name!r}")
    if signal_clip is not None and not signal_clip > 0:
        raise ValueError(f"signal_clip must be positive, got {signal_clip!r}")
    if target is not None and name != "forward_kl":
        raise ValueError(f"target belongs to the forward_kl estimator, got it with {name!r}")
    if name == "forward_kl":
        if target is None:
            raise ValueError("forward_kl needs target, a function that draws fields of the target distribution")
        return ForwardKL(target)
    if signal_clip is not None:
        return partial(reinforce, signal_clip=signal_clip)
    return _REVERSE[name]


_REVERSE: dict[str, Estimator] = {"reinforce": reinforce, "reparametrisation": reparametrisation, "path": path}
ESTIMATORS = (*_REVERSE, "forward_kl")
