"""Rational-quadratic splines: smooth monotone maps of the circle, or of the line, with exact inverses.

Between knots the map is a ratio of quadratics (Gregory and Delbourgo 1982; Durkan et al., arXiv:1906.04032, eqs. 4-8).
On a circle the first and last derivatives are one number (Rezende et al., arXiv:2002.02428); `spline_forward` and
`spline_inverse` wrap angles to `(-pi, pi]`, so they are 2 pi periodic. On the line the map is the identity beyond the
outermost knots, where its derivative is 1: `tailed_forward` and `tailed_inverse`.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from latticeflow.u1 import wrap

MIN_BIN = 1e-2
MIN_DERIVATIVE = 1e-3
LOGIT_BOUND = 6.0


class Spline(NamedTuple):
    """Knots `x`, `y`, `(..., bins + 1)` from `-b` to `b`, pi on a circle, and the derivative at each."""

    x: Tensor
    y: Tensor
    derivative: Tensor


def circular_spline(parameters: Tensor) -> Spline:
    """Build splines of the circle from unconstrained parameters `(..., 3 * bins)`; zeros give the identity.

    Logits are bounded softly (`b tanh(l / b)`), which keeps float32 round trips accurate.
    """
    widths, heights, slopes = _bounded(parameters).chunk(3, dim=-1)
    derivative = _derivative(slopes)
    ends = torch.cat([derivative, derivative[..., :1]], dim=-1)
    return Spline(_knots(widths, math.pi), _knots(heights, math.pi), ends)


def tailed_spline(parameters: Tensor, bound: float) -> Spline:
    """Build splines of `[-bound, bound]` from unconstrained parameters `(..., 3 * bins - 1)`; zeros give the identity.

    The derivative at both ends is 1, that of the tails.
    """
    bins = (parameters.shape[-1] + 1) // 3
    widths, heights, slopes = _bounded(parameters).split([bins, bins, bins - 1], dim=-1)
    return Spline(_knots(widths, bound), _knots(heights, bound), F.pad(_derivative(slopes), (1, 1), value=1.0))


def spline_forward(spline: Spline, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Return `y(angle)` and `log dy/dx` elementwise; `angle` has the spline's leading shape."""
    return _forward(spline, wrap(angle))


def spline_inverse(spline: Spline, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Return `x` with `y(x) = angle` and `log dx/dy` elementwise."""
    return _inverse(spline, wrap(angle))


def tailed_forward(spline: Spline, x: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Return `y(x)` and `log dy/dx` elementwise on the line; `x` has the spline's leading shape."""
    return _with_tails(x, bound, *_forward(spline, x.clamp(-bound, bound)))


def tailed_inverse(spline: Spline, y: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Return `x` with `y(x) = y` and `log dx/dy` elementwise on the line."""
    return _with_tails(y, bound, *_inverse(spline, y.clamp(-bound, bound)))


def _with_tails(x: Tensor, bound: float, inside: Tensor, log_slope: Tensor) -> tuple[Tensor, Tensor]:
    beyond = x.abs() >= bound
    return torch.where(beyond, x, inside), torch.where(beyond, 0.0, log_slope)


def _bounded(parameters: Tensor) -> Tensor:
    return LOGIT_BOUND * torch.tanh(parameters / LOGIT_BOUND)


def _derivative(slopes: Tensor) -> Tensor:
    offset = math.log(math.expm1(1 - MIN_DERIVATIVE))
    return MIN_DERIVATIVE + F.softplus(slopes + offset)


def _knots(logits: Tensor, bound: float) -> Tensor:
    bins = logits.shape[-1]
    weights = torch.exp(logits)  # the logits are bounded: no need for a softmax, which is slow over few bins
    lengths = MIN_BIN + (1 - MIN_BIN * bins) * weights / weights.sum(dim=-1, keepdim=True)
    inner = torch.cumsum(lengths[..., :-1], dim=-1)
    return bound * (2 * F.pad(F.pad(inner, (1, 0)), (0, 1), value=1.0) - 1)


def _forward(spline: Spline, x: Tensor) -> tuple[Tensor, Tensor]:
    x0, y0, width, height, d0, d1 = _bin(spline, spline.x, x)
    slope = height / width
    t = ((x - x0) / width).clamp(0, 1)
    denominator = slope + (d0 + d1 - 2 * slope) * t * (1 - t)
    y = y0 + height * (slope * t**2 + d0 * t * (1 - t)) / denominator
    return y, _log_derivative(slope, d0, d1, t, denominator)


def _inverse(spline: Spline, y: Tensor) -> tuple[Tensor, Tensor]:
    x0, y0, width, height, d0, d1 = _bin(spline, spline.y, y)
    slope = height / width
    u = (y - y0).clamp(min=0)
    u = torch.minimum(u, height)
    bend = u * (d0 + d1 - 2 * slope)
    a = height * (slope - d0) + bend
    b = height * d0 - bend
    c = -slope * u
    discriminant = (b**2 - 4 * a * c).clamp(min=torch.finfo(y.dtype).tiny)
    t = (2 * c / (-b - torch.sqrt(discriminant))).clamp(0, 1)
    denominator = slope + (d0 + d1 - 2 * slope) * t * (1 - t)
    return x0 + t * width, -_log_derivative(slope, d0, d1, t, denominator)


def _bin(spline: Spline, knots: Tensor, position: Tensor) -> tuple[Tensor, ...]:
    """Return left x and y, width, height and the two derivatives of the bin that holds each position."""
    index = (position[..., None] >= knots[..., 1:-1]).sum(dim=-1, keepdim=True)
    ends = torch.cat([index, index + 1], dim=-1)
    x0, x1 = spline.x.gather(-1, ends).unbind(-1)
    y0, y1 = spline.y.gather(-1, ends).unbind(-1)
    d0, d1 = spline.derivative.gather(-1, ends).unbind(-1)
    return x0, y0, x1 - x0, y1 - y0, d0, d1


def _log_derivative(slope: Tensor, d0: Tensor, d1: Tensor, t: Tensor, denominator: Tensor) -> Tensor:
    numerator = slope**2 * (d1 * t**2 + 2 * slope * t * (1 - t) + d0 * (1 - t) ** 2)
    return torch.log(numerator) - 2 * torch.log(denominator)
