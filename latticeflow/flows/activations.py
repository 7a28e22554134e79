"""Smooth increasing functions of each variable, from data to latent, with an inverse that is exact to rounding."""

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from latticeflow.actions.positive import softplus, softplus_inverse
from latticeflow.flows.bijection import Bijection

MOST_STEPS = 100
"""Halvings alone come down from any bracket to neighbouring numbers of double precision in fewer."""


class Activation(Bijection):
    """`z = s(x)` for each variable by itself, s increasing: `log|det dz/dx| = sum log s'(x)`.

    Fields `(batch, *shape)` of any shape. The inverse has no closed form in general: Newton steps inside a bracket,
    halved where they would leave it. It carries first derivatives.
    """

    @abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """Return s(x), elementwise."""

    @abstractmethod
    def log_slope(self, x: Tensor) -> Tensor:
        """Return log s'(x), elementwise."""

    @abstractmethod
    def bracket(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return a lower and an upper bound of the x with `s(x) = z`, elementwise."""

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.value(x), self.log_slope(x).flatten(1).sum(1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            root = self._root(z)
            slope = self.log_slope(root).exp()
        x = root - (self.value(root) - z) / slope  # one more Newton step, which carries the gradients
        return x, -self.log_slope(x).flatten(1).sum(1)

    def _root(self, z: Tensor) -> Tensor:
        low, high = self.bracket(z)
        x = high.clone()
        for _ in range(MOST_STEPS):
            excess = self.value(x) - z
            low, high = torch.where(excess < 0, x, low), torch.where(excess > 0, x, high)
            step = x - excess / self.log_slope(x).exp()
            moved = torch.where((step >= low) & (step <= high), step, 0.5 * (low + high))
            if bool(((moved - x).abs() <= torch.finfo(z.dtype).eps ** (2 / 3) * (1 + x.abs())).all()):
                return moved  # a Newton step from here on squares what is left
            x = moved
        return x


class SmoothLeakyReLU(Activation):
    r"""`z = a x + (1 - a) log(1 + e^x)`, with slope a far on the left and 1 far on the right.

    Raises ValueError unless a, `slope`, is between 0 and 1. Source: arXiv:2006.15090, section 5 (Gresele et al.); used
    by 2305.15267.
    """

    def __init__(self, slope: float = 0.3) -> None:
        super().__init__()
        if not 0 < slope < 1:
            raise ValueError(f"slope must be between 0 and 1, got {slope!r}")
        self.slope = float(slope)

    def value(self, x: Tensor) -> Tensor:
        return self.slope * x - (1 - self.slope) * logsigmoid(-x)

    def log_slope(self, x: Tensor) -> Tensor:
        return torch.log(self.slope + (1 - self.slope) * torch.sigmoid(x))

    def bracket(self, z: Tensor) -> tuple[Tensor, Tensor]:
        def sharp(value: Tensor) -> Tensor:
            return torch.where(value > 0, value, value / self.slope)

        return sharp(z - (1 - self.slope) * math.log(2)), sharp(z)


class Cubic(Activation):
    """`z = x + c x^3`, odd, with one trainable strength c > 0 for all variables; it starts at `strength`.

    A normal z then has in x the tails of `exp(-c^2 x^6 / 2)` and, near the origin, the quartic well of phi^4. Raises
    ValueError unless strength is positive and finite.
    """

    def __init__(self, strength: float = 0.1) -> None:
        super().__init__()
        if not 0 < strength < math.inf:
            raise ValueError(f"strength must be positive and finite, got {strength!r}")
        self.raw_strength = nn.Parameter(softplus_inverse(torch.tensor(strength)))

    @property
    def strength(self) -> Tensor:
        """c, a scalar."""
        return softplus(self.raw_strength)[0]

    def value(self, x: Tensor) -> Tensor:
        return x + self.strength * x**3

    def log_slope(self, x: Tensor) -> Tensor:
        return torch.log1p(3 * self.strength * x**2)

    def bracket(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z.clamp(max=0), z.clamp(min=0)
