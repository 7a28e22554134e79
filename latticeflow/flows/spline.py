"""Circular rational-quadratic splines: smooth monotone maps of the circle with exact inverses.

Between knots the map is a ratio of quadratics (Gregory and Delbourgo 1982; Durkan et al., arXiv:1906.04032, eqs. 4-8);
on a circle the first and last derivatives are one number (Rezende et al., arXiv:2002.02428). Angles are wrapped to
`(-pi, pi]` before they are binned, so every function here is 2 pi periodic.
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
    """Knots `x`, `y`, `(..., bins + 1)` from -pi to pi, and the derivative at each, the last equal to the first."""

    x: Tensor
    y: Tensor
    derivative: Tensor


def circular_spline(parameters: Tensor) -> Spline:
    """Build splines from unconstrained parameters `(..., 3 * bins)`; zeros give the identity.

    Logits are bounded softly (`b tanh(l / b)`), which keeps float32 round trips accurate.
    """
    bounded = LOGIT_BOUND * torch.tanh(parameters / LOGIT_BOUND)
    widths, heights, slopes = bounded.chunk(3, dim=-1)
    offset = math.log(math.expm1(1 - MIN_DERIVATIVE))
    derivative = MIN_DERIVATIVE + F.softplus(slopes + offset)
    return Spline(_knots(widths), _knots(heights), torch.cat([derivative, derivative[..., :1]], dim=-1))


def _knots(logits: Tensor) -> Tensor:
    bins = logits.shape[-1]
    weights = torch.exp(logits)  # the logits are bounded: no need for a softmax, which is slow over few bins
    lengths = MIN_BIN + (1 - MIN_BIN * bins) * weights / weights.sum(dim=-1, keepdim=True)
    inner = torch.cumsum(lengths[..., :-1], dim=-1)
    return math.pi * (2 * F.pad(F.pad(inner, (1, 0)), (0, 1), value=1.0) - 1)


def spline_forward(spline: Spline, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Return `y(angle)` and `log dy/dx` elementwise; `angle` has the spline's leading shape."""
    angle = wrap(angle)
    x0, y0, width, height, d0, d1 = _bin(spline, spline.x, angle)
    slope = height / width
    t = ((angle - x0) / width).clamp(0, 1)
    denominator = slope + (d0 + d1 - 2 * slope) * t * (1 - t)
    y = y0 + height * (slope * t**2 + d0 * t * (1 - t)) / denominator
    return y, _log_derivative(slope, d0, d1, t, denominator)


def spline_inverse(spline: Spline, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Return `x` with `y(x) = angle` and `log dx/dy` elementwise."""
    angle = wrap(angle)
    x0, y0, width, height, d0, d1 = _bin(spline, spline.y, angle)
    slope = height / width
    u = (angle - y0).clamp(min=0)
    u = torch.minimum(u, height)
    bend = u * (d0 + d1 - 2 * slope)
    a = height * (slope - d0) + bend
    b = height * d0 - bend
    c = -slope * u
    discriminant = (b**2 - 4 * a * c).clamp(min=torch.finfo(angle.dtype).tiny)
    t = (2 * c / (-b - torch.sqrt(discriminant))).clamp(0, 1)
    denominator = slope + (d0 + d1 - 2 * slope) * t * (1 - t)
    return x0 + t * width, -_log_derivative(slope, d0, d1, t, denominator)


def _bin(spline: Spline, knots: Tensor, angle: Tensor) -> tuple[Tensor, ...]:
    """Return left x and y, width, height and the two derivatives of the bin that holds each angle."""
    index = (angle[..., None] >= knots[..., 1:-1]).sum(dim=-1, keepdim=True)
    ends = torch.cat([index, index + 1], dim=-1)
    x0, x1 = spline.x.gather(-1, ends).unbind(-1)
    y0, y1 = spline.y.gather(-1, ends).unbind(-1)
    d0, d1 = spline.derivative.gather(-1, ends).unbind(-1)
    return x0, y0, x1 - x0, y1 - y0, d0, d1


def _log_derivative(slope: Tensor, d0: Tensor, d1: Tensor, t: Tensor, denominator: Tensor) -> Tensor:
    numerator = slope**2 * (d1 * t**2 + 2 * slope * t * (1 - t) + d0 * (1 - t) ** 2)
    return torch.log(numerator) - 2 * torch.log(denominator)
