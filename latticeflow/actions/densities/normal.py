"""The normal density of a variable whose width is itself a variable, given by its logarithm."""

import math

import torch
from torch import Tensor

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def normal_action(x: Tensor, log_width: Tensor) -> Tensor:
    """Return `-log N(x; 0, width^2) = (x / width)^2 / 2 + log(width) + log(2 pi) / 2`, elementwise.

    It is +inf where the square overflows, never NaN: at x = 0 the square is 0, however small the width is.
    """
    lost = (x == 0) & torch.isinf(torch.exp(-0.5 * log_width))  # 0 * inf; elsewhere the curvature at 0 must stay
    root = torch.exp(-0.5 * torch.where(lost, 0.0, log_width))  # its square may overflow where the quotient does not
    return 0.5 * (x * root * root) ** 2 + log_width + HALF_LOG_TWO_PI
