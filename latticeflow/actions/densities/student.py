"""The multivariate student-t density: tails that fall like a power."""

import math
from dataclasses import dataclass

import torch
from scipy.special import betaln
from torch import Generator, Tensor

from latticeflow.actions.densities.base import Density, check_positive
from latticeflow.lattice import check_integer
from latticeflow.streams import draw_options


@dataclass(frozen=True)
class MultivariateStudentT(Density):
    r"""The standard multivariate t, normalised, for fields `(batch, D)`; nu is `degrees_of_freedom`:

        S = (nu + D)/2 log(1 + |x|^2 / nu) - log Gamma((nu + D)/2) + log Gamma(nu/2) + D/2 log(nu pi)

    The squares do not overflow, however large x is. Raises ValueError for a dimension below 1 and degrees of freedom
    that are not positive and finite. Source: Kotz and Nadarajah, Multivariate t distributions (2004), equation (1.1).
    """

    dimension: int
    degrees_of_freedom: float = 1.0

    theory = "student_t"
    log_z = 0.0

    def __post_init__(self) -> None:
        check_integer("dimension", self.dimension, low=1)
        check_positive("degrees_of_freedom", self.degrees_of_freedom)

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """Return n independent draws, `(n, D)`, float64: a normal over `sqrt(2 g / nu)`, `g ~ Gamma(nu / 2)`.

        `g = g' u^(2 / nu)` with `g' ~ Gamma(1 + nu / 2)` and u uniform, by its logarithm, which does not underflow.
        """
        half, options = 0.5 * self.degrees_of_freedom, draw_options(generator)
        normal, uniform = torch.randn(n, self.dimension, **options), torch.rand(n, 1, **options)
        larger = torch._standard_gamma(torch.full_like(uniform, half + 1), generator=generator)
        log_gamma = torch.log(larger) + torch.log1p(-uniform) / half
        return normal * torch.exp(0.5 * (math.log(half) - log_gamma))

    def _action(self, x: Tensor) -> Tensor:
        power = 0.5 * (self.degrees_of_freedom + self.dimension)
        return power * log1p_square(x / math.sqrt(self.degrees_of_freedom)) - self._log_normalisation()

    def _log_normalisation(self) -> float:
        half_dimension, half = 0.5 * self.dimension, 0.5 * self.degrees_of_freedom
        # the beta function, because the difference of two large log Gammas would lose digits
        gammas = math.lgamma(half_dimension) - float(betaln(half, half_dimension))
        return gammas - half_dimension * math.log(self.degrees_of_freedom * math.pi)


def log1p_square(x: Tensor) -> Tensor:
    """Return `log(1 + |x|^2)`, `(batch, D) -> (batch,)`, without overflow, accurate where |x| is small.

    `2 log m + log(1/m^2 + |x/m|^2)` for `m = max(1, max_i |x_i|)`. This does not depend on m, so the gradient takes it
    as constant.
    """
    largest = x.detach().abs().amax(dim=1, keepdim=True).clamp(min=1.0)
    squares = ((x / largest) ** 2).sum(1)
    largest = largest[:, 0]
    return 2 * torch.log(largest) + torch.log1p(squares + ((1 / largest) ** 2 - 1))
