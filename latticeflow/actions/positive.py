"""Positive parameters on the whole real line: the softplus, its inverse, its slope and its logarithm."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

FAR = -37.0
"""Below it `log(softplus(u)) = u - e^u / 2 + ...` is u to the last digit of double precision."""


def softplus(u: Tensor) -> tuple[Tensor, Tensor]:
    """Return `log(1 + e^u)` and the logarithm of its slope, `log(1 / (1 + e^-u))`, elementwise.

    A density of the value becomes one of u by adding `log_slope` to its logarithm. Accurate to rounding for every u;
    the value is 0 where it underflows, see `log_softplus`.
    """
    return -logsigmoid(-u), logsigmoid(u)


def softplus_inverse(value: Tensor) -> Tensor:
    """Return `u = log(e^value - 1)`, elementwise: -inf at 0, NaN where the value is negative."""
    return value + torch.log(-torch.expm1(-value))


def log_softplus(u: Tensor) -> Tensor:
    """Return `log(log(1 + e^u))`, elementwise: it tends to u for u -> -inf, where the softplus itself underflows."""
    near = torch.log(softplus(u.clamp(min=FAR))[0])  # finite also where it is not chosen, or the gradient would be NaN
    return torch.where(u < FAR, u, near)
