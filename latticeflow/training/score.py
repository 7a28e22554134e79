r"""Score matching: a flow learns `s(x) = d log q / dx = -dE/dx`, which needs no log-determinant of linear layers.

Each loss is a number for every field, `(batch,)`; its mean over samples of p is, up to a constant, a Fisher divergence
`1/2 E |s - d log p / dx|^2`. With v of independent normal components and n likewise:

* explicit            `1/2 |s(x) - F(x)|^2`, F the force of an action; on any configurations, and without a constant
* sliced              `1/2 |s(x)|^2 + v . (ds/dx) v` (arXiv:1905.07088, eq. 8, with the first term exact)
* denoising           `1/2 |s(x + sigma n) + n / sigma|^2`: of p after a convolution with a normal of width sigma
                      (Vincent 2011)
* finite_difference   `(2 E(x) - E(x + eps v) - E(x - eps v)) / eps^2 + (E(x + eps v) - E(x - eps v))^2 / (8 eps^2)`,
                      which tends to `v . (ds/dx) v + 1/2 (v . s)^2` and needs no second derivative (arXiv:2007.03317)

None of them sees the relative weight of modes that are far apart.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Generator, Tensor

from latticeflow.actions import Action
from latticeflow.samplers import EBFlowSampler, FlowSampler
from latticeflow.streams import SharedStream, own_rows

ScoreLoss = Callable[[FlowSampler, Tensor, Generator | None], Tensor]
NOISE, DIFFERENCE = 0.1, 0.1
"""Where sigma and eps are not given."""


def score(sampler: FlowSampler, x: Tensor) -> Tensor:
    """Return `-dE/dx` with all its derivatives."""
    with torch.enable_grad():
        leaf = x if x.requires_grad else x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(sampler.energy(leaf).sum(), leaf, create_graph=True)
        return -gradient


def explicit(sampler: FlowSampler, x: Tensor, action: Action) -> Tensor:
    """Return the loss for fields that are constants."""
    return 0.5 * _square(score(sampler, x) - action.force(x.detach()).to(x))


def sliced(sampler: FlowSampler, x: Tensor, generator: Generator | None) -> Tensor:
    """Return the loss with one direction v for each field."""
    leaf = x.detach().requires_grad_()
    s, v = score(sampler, leaf), _normal(x, generator)
    with torch.enable_grad():
        (curvature,) = torch.autograd.grad((s * v).sum(), leaf, create_graph=True)
    return 0.5 * _square(s) + (curvature * v).flatten(1).sum(1)


def denoising(sampler: FlowSampler, x: Tensor, generator: Generator | None, *, noise: float = NOISE) -> Tensor:
    """Return the loss with sigma = `noise`, in units of the field. Raises ValueError unless it is positive."""
    _check("noise", noise)
    n = _normal(x, generator)
    return 0.5 * _square(score(sampler, x + noise * n) + n / noise)


def finite_difference(
    sampler: FlowSampler, x: Tensor, generator: Generator | None, *, difference: float = DIFFERENCE
) -> Tensor:
    """Return the loss with eps = `difference`, in units of the field; energies differ by its square.

    Raises ValueError unless it is positive.
    """
    _check("difference", difference)
    step = difference * _normal(x, generator)
    middle, plus, minus = sampler.energy(torch.cat([x, x + step, x - step])).chunk(3)
    return (2 * middle - plus - minus) / difference**2 + (plus - minus) ** 2 / (8 * difference**2)


SCORE_LOSSES: Mapping[str, ScoreLoss] = {
    "sliced": sliced,
    "denoising": denoising,
    "finite_difference": finite_difference,
}
"""Those that learn from samples."""
WIDTHS = {"noise": "denoising", "difference": "finite_difference"}
"""What some of them need, and which."""


def make_score_loss(name: str, **widths: float | None) -> ScoreLoss:
    """Return the loss of that name with those of `noise` and `difference` that are given.

    Of an `EBFlowSampler` with preprocessing it matches the score of the preprocessed variable. Raises ValueError for an
    unknown name, a width that is not positive, and one that belongs to another loss.
    """
    if name not in SCORE_LOSSES:
        raise ValueError(f"a score loss must be one of {', '.join(SCORE_LOSSES)}, got {name!r}")
    given = {width: value for width, value in widths.items() if value is not None}
    for width, value in given.items():
        if WIDTHS[width] != name:
            raise ValueError(f"{width} belongs to {WIDTHS[width]} score matching, got it with {name!r}")
        _check(width, value)
    loss = partial(SCORE_LOSSES[name], **given)

    def matched(sampler: FlowSampler, x: Tensor, generator: Generator | None) -> Tensor:
        inner, data = sampler.matched(x) if isinstance(sampler, EBFlowSampler) else (sampler, x)
        return loss(inner, data, generator)

    return matched


def _normal(x: Tensor, generator: Generator | SharedStream | None) -> Tensor:
    def draw(n: int, generator: Generator | None) -> Tensor:
        return torch.randn((n, *x.shape[1:]), generator=generator, dtype=x.dtype, device=x.device)

    return own_rows(draw, len(x), generator)


def _square(v: Tensor) -> Tensor:
    return (v**2).flatten(1).sum(1)


def _check(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
