"""Rational-quadratic splines: smooth monotone maps of the circle, or of the line, with exact inverses.

Between knots the map is a ratio of quadratics (Gregory and Delbourgo 1982; Durkan et al., arXiv:1906.04032, eqs. 4-8).
On a circle the first and last derivatives are one number (Rezende et al., arXiv:2002.02428); `spline_forward` and
`spline_inverse` wrap angles to `(-pi, pi]`, so they are 2 pi periodic. On the line the map is the identity beyond the
outermost knots, where its derivative is 1: `tailed_forward` and `tailed_inverse`.

A map and its logarithmic slope depend on one bin of the spline. Gradients are written out here rather than recorded:
with `t = (x - x0) / width`, `s = height / width`, `y = y(t; y0, height, s, d0, d1)` and `l = log dy/dx`, those of the
inverse are implicit, `dt = (dy - sum_p y_p dp) / y_t`, so that both directions need the same few partial derivatives.
Second derivatives, which scores need, go through the formula itself.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from latticeflow.flows.asked import Asked
from latticeflow.u1 import wrap

MIN_BIN = 1e-2
MIN_DERIVATIVE = 1e-3
LOGIT_BOUND = 6.0
Pull = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
UNIT_SLOPE = math.log(math.expm1(1 - MIN_DERIVATIVE))


@dataclass(frozen=True)
class Spline:
    """Splines of `[-bound, bound]`, of a circle or, with the derivative 1 at both ends, of an interval of the line.

    `parameters (..., 3 * bins)`, on the line `(..., 3 * bins - 1)`, are unconstrained: logits of the bins' widths and
    of their heights, and what gives the derivatives at the knots. Zeros give the identity. They are bounded softly
    (`b tanh(l / b)`), which keeps float32 round trips accurate. `compiled` ones run through torch.compile.
    """

    parameters: Tensor
    bound: float
    circular: bool
    compiled: bool = False

    @property
    def bins(self) -> int:
        return (self.parameters.shape[-1] + 1) // 3

    @property
    def x(self) -> Tensor:
        """The knots `(..., bins + 1)` from `-bound` to `bound`."""
        return self._knots(0)

    @property
    def y(self) -> Tensor:
        """Where the knots go, `(..., bins + 1)`."""
        return self._knots(1)

    @property
    def derivative(self) -> Tensor:
        """The derivatives at the knots, `(..., bins + 1)`."""
        inner = _derivative(_bounded(self.parameters[..., 2 * self.bins :]))
        return torch.cat([inner, inner[..., :1]], -1) if self.circular else F.pad(inner, (1, 1), value=1.0)

    def _knots(self, axis: int) -> Tensor:
        return _knots(_fractions(torch.tanh(self.parameters[..., : 2 * self.bins] / LOGIT_BOUND)), self.bound)[
            ..., axis, :
        ]


def circular_spline(parameters: Tensor, *, compiled: bool = False) -> Spline:
    """Build splines of the circle from unconstrained parameters `(..., 3 * bins)`; zeros give the identity."""
    return Spline(parameters, math.pi, circular=True, compiled=compiled)


def tailed_spline(parameters: Tensor, bound: float, *, compiled: bool = False) -> Spline:
    """Build splines of `[-bound, bound]` from unconstrained parameters `(..., 3 * bins - 1)`; zeros give the identity.

    The derivative at both ends is 1, that of the tails.
    """
    return Spline(parameters, bound, circular=False, compiled=compiled)


def spline_forward(spline: Spline, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Return `y(angle)` and `log dy/dx` elementwise; `angle` has the spline's leading shape."""
    return _apply(spline, wrap(angle), inverse=False)


def spline_forward_held(spline: Spline, angle: Tensor) -> tuple[Tensor, Tensor, Tensor, Pull]:
    """Return y, `log dy/dx`, how that changes with the angle, and what turns gradients of the two into those of inputs.

    `pull(of_y, of_log_slope) -> (of_parameters, of_angle)`. For sweeps without autograd.
    """
    settings = spline.bound, spline.circular, False
    y, log_slope, saved = _through(spline.parameters, wrap(angle), *settings)
    one = torch.ones_like(y)
    _, own_slope = _back_to_position(spline.parameters, saved, torch.zeros_like(y), one, *settings)
    return y, log_slope, own_slope, lambda of_y, of_log: _back(spline.parameters, saved, of_y, of_log, *settings)


def spline_inverse(spline: Spline, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Return `x` with `y(x) = angle` and `log dx/dy` elementwise."""
    return _apply(spline, wrap(angle), inverse=True)


def tailed_forward(spline: Spline, x: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Return `y(x)` and `log dy/dx` elementwise on the line; `x` has the spline's leading shape."""
    return _with_tails(x, bound, *_apply(spline, x.clamp(-bound, bound), inverse=False))


def tailed_inverse(spline: Spline, y: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Return `x` with `y(x) = y` and `log dx/dy` elementwise on the line."""
    return _with_tails(y, bound, *_apply(spline, y.clamp(-bound, bound), inverse=True))


def _with_tails(x: Tensor, bound: float, inside: Tensor, log_slope: Tensor) -> tuple[Tensor, Tensor]:
    beyond = x.abs() >= bound
    return torch.where(beyond, x, inside), torch.where(beyond, 0.0, log_slope)


def _bounded(parameters: Tensor) -> Tensor:
    return LOGIT_BOUND * torch.tanh(parameters / LOGIT_BOUND)


def _derivative(slopes: Tensor) -> Tensor:
    return MIN_DERIVATIVE + F.softplus(slopes + UNIT_SLOPE)


def _fractions(squashed: Tensor) -> Tensor:
    """Return what is shared out among the bins, of widths and of heights, `(..., 2 * bins) -> (..., 2, bins)`."""
    weights = torch.exp(LOGIT_BOUND * squashed).unflatten(-1, (2, -1))  # bounded: no need for a softmax
    return weights / weights.sum(dim=-1, keepdim=True)


def _knots(fractions: Tensor, bound: float) -> Tensor:
    """Return the knots `(..., 2, bins + 1)` from `-bound` to `bound`; no bin is narrower than MIN_BIN of all."""
    bins = fractions.shape[-1]
    ends = torch.cumsum(MIN_BIN + (1 - MIN_BIN * bins) * fractions[..., :-1], dim=-1)
    return bound * (2 * F.pad(F.pad(ends, (1, 0)), (0, 1), value=1.0) - 1)


class _Bin(NamedTuple):
    """The bin that holds each position: its lower corner, its size and the derivatives at its two ends."""

    x0: Tensor
    y0: Tensor
    width: Tensor
    height: Tensor
    d0: Tensor
    d1: Tensor


class _Found(NamedTuple):
    """What `_find` went through: squashed logits, fractions, and the places of the bin and of its two derivatives."""

    squashed: Tensor
    fractions: Tensor
    index: Tensor
    slopes: Tensor


def _apply(spline: Spline, position: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
    return _SplineMap.apply(spline.parameters, position, spline, inverse)


class _SplineMap(torch.autograd.Function):
    """`(parameters, position) -> (image, log slope)` of the map or of its inverse, with gradients written out."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, parameters: Tensor, position: Tensor, spline: Spline, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.map = spline.bound, spline.circular, inverse
        ctx.run = compiled if spline.compiled else _as_it_is
        image, log_slope, saved = ctx.run(_through)(parameters, position, *ctx.map)
        ctx.save_for_backward(parameters, position, *saved)
        return image, log_slope

    @staticmethod
    def backward(ctx: FunctionCtx, image: Tensor, log_slope: Tensor) -> tuple[Tensor | None, ...]:
        parameters, position, *saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_recorded(parameters, position, image, log_slope, *ctx.map), None, None
        back = ctx.run(_back if Asked.parameters else _back_to_position)
        return *back(parameters, saved, image, log_slope, *ctx.map), None, None


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function, at its first use, for every shape that it meets."""
    return torch.compile(function, dynamic=False)


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _through(
    parameters: Tensor, position: Tensor, bound: float, circular: bool, inverse: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Return image, log slope and all that the gradients need again."""
    at, found = _find(Spline(parameters, bound, circular), position, inverse)
    image, log_slope, place = (_inverse if inverse else _forward)(at, position)
    return image, log_slope, (*at, *found, *place)


def _back(
    parameters: Tensor,
    saved: Sequence[Tensor],
    image: Tensor,
    log_slope: Tensor,
    bound: float,
    circular: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the parameters and of the position, given those of image and log slope."""
    at, found, place = _Bin(*saved[:6]), _Found(*saved[6:10]), _Place(*saved[10:])
    of_position = _position_gradient(at, place, image, log_slope, inverse)
    gradient = _bin_gradient(at, place, of_position, image, log_slope, inverse)
    return _parameter_gradient(Spline(parameters, bound, circular), gradient, found), of_position


def _back_to_position(
    _parameters: Tensor,
    saved: Sequence[Tensor],
    image: Tensor,
    log_slope: Tensor,
    _bound: float,
    _circular: bool,
    inverse: bool,
) -> tuple[None, Tensor]:
    return None, _position_gradient(_Bin(*saved[:6]), _Place(*saved[10:]), image, log_slope, inverse)


def _recorded(
    parameters: Tensor,
    position: Tensor,
    image: Tensor,
    log_slope: Tensor,
    bound: float,
    circular: bool,
    inverse: bool,
) -> tuple[Tensor, ...]:
    """Return the gradients in a form that can be differentiated again."""
    with torch.enable_grad():
        outputs = _through(parameters, position, bound, circular, inverse)[:2]
        inputs = parameters, position
        return torch.autograd.grad(outputs, inputs, (image, log_slope), create_graph=True, allow_unused=True)


def _find(spline: Spline, position: Tensor, inverse: bool) -> tuple[_Bin, _Found]:
    """Return the bin in which each position, an x or for the inverse a y, lies."""
    squashed = torch.tanh(spline.parameters[..., : 2 * spline.bins] / LOGIT_BOUND)
    fractions = _fractions(squashed)
    knots = _knots(fractions, spline.bound)
    index = (position[..., None] >= knots[..., int(inverse), 1:-1]).sum(-1, keepdim=True)
    ends = torch.cat([index, index + 1], dim=-1)
    lower, upper = knots.gather(-1, ends[..., None, :].expand(*knots.shape[:-1], 2)).unbind(-1)
    derivatives, slopes = _end_derivatives(spline, ends)
    at = _Bin(*lower.unbind(-1), *(upper - lower).unbind(-1), *derivatives.unbind(-1))
    return at, _Found(squashed, fractions, index, slopes)


def _end_derivatives(spline: Spline, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Return the derivatives at both ends of a bin and the places of their parameters, -1 for a fixed one."""
    if spline.circular:
        slopes = 2 * spline.bins + ends % spline.bins
        return _derivative(_bounded(spline.parameters.gather(-1, slopes))), slopes
    slopes = torch.where((ends > 0) & (ends < spline.bins), 2 * spline.bins - 1 + ends, -1)
    free = _derivative(_bounded(spline.parameters.gather(-1, slopes.clamp(min=0))))
    return torch.where(slopes < 0, 1.0, free), slopes


class _Place(NamedTuple):
    """Where in its bin a point is, and what is needed again: `y = y0 + height n / d`, `dy/dx = m (s / d)^2`."""

    t: Tensor
    s: Tensor
    q: Tensor
    bend: Tensor
    n: Tensor
    d: Tensor
    m: Tensor


def _place(at: _Bin, s: Tensor, bend: Tensor, t: Tensor) -> _Place:
    rest = 1 - t
    q, square = t * rest, t * t
    n, d = torch.addcmul(at.d0 * q, s, square), torch.addcmul(s, bend, q)
    m = torch.addcmul(torch.addcmul(at.d1 * square, s, q, value=2), at.d0, rest * rest)
    return _Place(t, s, q, bend, n, d, m)


def _shape(at: _Bin) -> tuple[Tensor, Tensor]:
    """Return the mean slope of a bin, and how much the slopes at its ends exceed it, `d0 + d1 - 2 s`."""
    s = at.height / at.width
    return s, torch.sub(at.d0 + at.d1, s, alpha=2)


def _forward(at: _Bin, x: Tensor) -> tuple[Tensor, Tensor, _Place]:
    """Return y, its log derivative and where in its bin x is."""
    place = _place(at, *_shape(at), ((x - at.x0) / at.width).clamp(0, 1))
    return torch.addcdiv(at.y0, at.height * place.n, place.d), _log_derivative(place), place


def _inverse(at: _Bin, y: Tensor) -> tuple[Tensor, Tensor, _Place]:
    """Return x, its log derivative and where in its bin it is."""
    s, bend = _shape(at)
    u = (y - at.y0).clamp(min=0)
    u = torch.minimum(u, at.height)
    bent = u * bend
    a = torch.addcmul(bent, at.height, s - at.d0)
    b = at.height * at.d0 - bent
    c = -s * u
    discriminant = (b**2 - 4 * a * c).clamp(min=torch.finfo(y.dtype).tiny)
    place = _place(at, s, bend, (2 * c / (-b - torch.sqrt(discriminant))).clamp(0, 1))
    return torch.addcmul(at.x0, place.t, at.width), -_log_derivative(place), place


def _log_derivative(place: _Place) -> Tensor:
    ratio = place.s / place.d
    return torch.log(place.m * ratio * ratio)


def _position_gradient(at: _Bin, place: _Place, of_image: Tensor, of_log: Tensor, inverse: bool) -> Tensor:
    """Return the gradient of the position, by `dy/dt` and `dl/dt` and, for the inverse, implicitly."""
    t, s, _, bend, _, d, m = place
    turn, over_d = 1 - 2 * t, 1 / d
    y_t = at.height * s * m * over_d * over_d
    l_t = 2 * ((at.d1 * t + s * turn - at.d0 * (1 - t)) / m - bend * turn * over_d)
    return (of_image * at.width - of_log * l_t) / y_t if inverse else (of_image * y_t + of_log * l_t) / at.width


def _bin_gradient(
    at: _Bin, place: _Place, of_position: Tensor, of_image: Tensor, of_log: Tensor, inverse: bool
) -> _Bin:
    """Return the gradients of the bin's six numbers.

    With `y = y0 + height n / d` and `l = log(s^2 m) - 2 log d`, s and height taken as independent.
    """
    t, s, q, _, n, d, m = place
    rest, square = 1 - t, t * t
    over_d, over_m = 1 / d, 1 / m
    scale = at.height * over_d * over_d
    if inverse:
        of_l, of_y = -of_log, -of_position
        of_x0, of_width = of_image, of_image * t
    else:
        of_l, of_y = of_log, of_image
        of_x0, of_width = -of_position, -of_position * t
    scaled, common = of_y * scale, 2 * q * over_d
    fall = 1 - 2 * q
    of_s = scaled * (square * d - n * fall) + 2 * of_l * (1 / s + q * over_m - fall * over_d)
    return _Bin(
        x0=of_x0,
        y0=of_y,
        width=torch.addcdiv(of_width, of_s * s, at.width, value=-1),
        height=torch.addcdiv(of_y * n * over_d, of_s, at.width),
        d0=torch.addcmul(scaled * q * (d - n), of_l, rest * rest * over_m - common),
        d1=torch.addcmul(of_l * (square * over_m - common), scaled * q, n, value=-1),
    )


def _parameter_gradient(spline: Spline, gradient: _Bin, found: _Found) -> Tensor:
    """Pass the gradients of a bin on to the parameters: all bins up to it, by the sum of fractions, and two slopes."""
    bins, bound = spline.bins, spline.bound
    before = torch.stack([gradient.x0, gradient.y0], dim=-1)[..., None]
    own = torch.stack([gradient.width, gradient.height], dim=-1)[..., None]
    place, numbers = found.index[..., None], torch.arange(bins, device=found.index.device)
    of_fractions = torch.where(numbers < place, before, torch.where(numbers == place, own, 0.0))
    weighted = found.fractions * of_fractions
    of_logits = weighted - found.fractions * weighted.sum(dim=-1, keepdim=True)
    result = torch.zeros_like(spline.parameters)
    scale = 2 * bound * (1 - MIN_BIN * bins)
    result[..., : 2 * bins] = scale * of_logits.flatten(-2) * (1 - found.squashed**2)
    free, slopes = found.slopes >= 0, found.slopes.clamp(min=0)
    squashed = torch.tanh(spline.parameters.gather(-1, slopes) / LOGIT_BOUND)
    of_ends = torch.stack([gradient.d0, gradient.d1], dim=-1) * (1 - squashed**2)
    of_ends = of_ends * torch.sigmoid(LOGIT_BOUND * squashed + UNIT_SLOPE)
    return result.scatter_add_(-1, slopes, torch.where(free, of_ends, 0.0))
