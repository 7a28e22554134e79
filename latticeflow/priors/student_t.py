"""Independent student-t variables with trainable tails."""

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from latticeflow.lattice import check_shape
from latticeflow.priors.base import Prior
from latticeflow.streams import draw_options

_SHIFT = 16
_STIRLING = (-1 / 8, 1 / 192, -1 / 640, 17 / 14336, -31 / 18432)
"""Coefficients of 1/b, 1/b^3, ... in `log Gamma(b + 1/2) - log Gamma(b) - log(b) / 2`."""


class StudentT(nn.Module, Prior):
    """Independent standard student-t variables at every site, with trainable numbers nu of degrees of freedom:

        q(x) = prod_i Gamma((nu_i + 1) / 2) / (Gamma(nu_i / 2) sqrt(pi nu_i)) (1 + x_i^2 / nu_i)^(-(nu_i + 1) / 2).

    Fields are `(n, *shape)`, densities with respect to Lebesgue measure and always in float64. There is one nu per site
    or, with `per_site=False`, a single one, whose weights then fit any volume. The parameter is `log nu`, of shape
    `shape` or `()`. Draws are `x = normal sqrt(nu / (2 g))`, `g ~ Gamma(nu / 2)`, and carry gradients to nu.

    The root is kept below 1/16 of the square root of the largest number in the parameter's precision, so that fields
    and their squares are finite. Without that it would be larger with a probability of about `10^(-153 nu)` in double,
    `10^(-18 nu)` in single precision, so the density is not that of the draws for nu below 0.1 and 1.

    Raises ValueError unless degrees_of_freedom is positive and finite. Source: arXiv:2402.16408 (this base);
    arXiv:1805.08498 (implicit reparametrisation of the Gamma law).
    """

    def __init__(self, shape: Sequence[int], *, degrees_of_freedom: float = 30.0, per_site: bool = True) -> None:
        super().__init__()
        if not 0 < degrees_of_freedom < math.inf:
            raise ValueError(f"degrees_of_freedom must be positive and finite, got {degrees_of_freedom!r}")
        self.shape = check_shape(shape)
        size = self.shape if per_site else ()
        self.log_degrees_of_freedom = nn.Parameter(torch.full(size, math.log(degrees_of_freedom), dtype=torch.float64))

    @property
    def degrees_of_freedom(self) -> Tensor:
        """The numbers nu, of shape `shape` or `()`, in float64."""
        return self.log_degrees_of_freedom.double().exp()

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        normal = torch.randn(n, *self.shape, **draw_options(generator))
        half = (self.degrees_of_freedom / 2).to(normal.device).expand(n, *self.shape)
        log_width = 0.5 * (half.log() - _log_gamma_draw(half, generator))
        bound = 0.5 * math.log(torch.finfo(self.log_degrees_of_freedom.dtype).max) - math.log(16)
        return normal * log_width.clamp(max=bound).exp()

    def log_prob(self, x: Tensor) -> Tensor:
        nu = self.degrees_of_freedom.to(x.device)
        log_density = _log_peak(nu) - 0.5 * (nu + 1) * _log1p_square(x.double() / nu.sqrt())
        return log_density.flatten(1).sum(1)


def _log_gamma_draw(alpha: Tensor, generator: Generator | None) -> Tensor:
    """Return `log g`, `g ~ Gamma(alpha)`, from `g = g' u^(1 / alpha)`, `g' ~ Gamma(alpha + 1)`, u uniform.

    For small alpha `g` itself underflows, and its gradient is lost in `dg / g`.
    """
    uniform = torch.rand(alpha.shape, **draw_options(generator))
    return torch._standard_gamma(alpha + 1, generator=generator).log() + torch.log1p(-uniform) / alpha


def _log_peak(nu: Tensor) -> Tensor:
    """Return `log q(0)` of one variable.

    The argument `a = nu / 2` of `log Gamma(a + 1/2) - log Gamma(a)` is raised to `b = a + 16`, where the Stirling
    series is exact to rounding: the difference of two large logarithms never appears.
    """
    a = nu / 2
    b = a + _SHIFT
    series = sum(c / b ** (2 * i + 1) for i, c in enumerate(_STIRLING))
    steps = torch.log1p(0.5 / (a.unsqueeze(-1) + torch.arange(_SHIFT, device=a.device))).sum(-1)
    return series - steps + 0.5 * torch.log1p(_SHIFT / a) - 0.5 * math.log(2 * math.pi)


def _log1p_square(r: Tensor) -> Tensor:
    """Return `log(1 + r^2)` without forming the square of a large number."""
    is_large = r.abs() >= 1
    large = torch.where(is_large, r, 1.0)
    return torch.log1p(torch.where(is_large, 1 / large, r) ** 2) + 2 * large.abs().log()
