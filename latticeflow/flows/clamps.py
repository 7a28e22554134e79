"""Soft clamps of a coupling's log scale: without one, the scales of a deep flow multiply without bound."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CLAMPS = ("asymmetric", "symmetric", "tanh", "none")


@dataclass(frozen=True)
class Clamp:
    r"""A smooth increasing map of log scales into `(-negative, positive)`.

        asymmetric   c(s) = (2/pi) a atan(s/a),  a = positive for s >= 0 and negative for s < 0
        symmetric    the same with a = negative on both sides
        tanh         c(s) = a tanh(s/a),  a = negative
        none         c(s) = s

    The slope at 0 is 2/pi on both sides, or 1 for the last two. An expansion is held much tighter than a contraction,
    because only expansions explode. Raises ValueError for another kind, and for bounds that are not positive and
    finite. Source: arXiv:2402.16408, section 4.
    """

    kind: str = "asymmetric"
    positive: float = 0.1
    negative: float = 2.0

    def __post_init__(self) -> None:
        if self.kind not in CLAMPS:
            raise ValueError(f"clamp must be one of {', '.join(CLAMPS)}, got {self.kind!r}")
        for name in ("positive", "negative"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"the clamp's {name} bound must be positive and finite, got {getattr(self, name)!r}")

    def __call__(self, log_scale: Tensor) -> Tensor:
        if self.kind == "none":
            return log_scale
        if self.kind == "tanh":
            return self.negative * torch.tanh(log_scale / self.negative)
        bound = self.negative
        if self.kind == "asymmetric":
            bound = torch.where(log_scale >= 0, log_scale.new_tensor(self.positive), self.negative)
        return (2 / math.pi) * bound * torch.atan(log_scale / bound)
