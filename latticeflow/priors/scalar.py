"""Gaussian priors of scalar fields: independent sites, and the free theory with all its correlations."""

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from latticeflow.exact import khat_squared, scalar_free_log_z
from latticeflow.lattice import check_shape, shift, site_sum, volume
from latticeflow.priors.base import Prior
from latticeflow.streams import draw_options


class Normal(Prior):
    """Independent normals of mean 0 and width `scale` at every site; density with respect to Lebesgue measure.

    Raises ValueError unless scale is positive and finite.
    """

    def __init__(self, shape: Sequence[int], *, scale: float = 1.0) -> None:
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {scale!r}")
        self.shape = check_shape(shape)
        self.scale = scale

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        return self.scale * torch.randn(n, *self.shape, **draw_options(generator))

    def log_prob(self, x: Tensor) -> Tensor:
        constant = volume(self.shape) * (0.5 * math.log(2 * math.pi) + math.log(self.scale))
        return -0.5 * ((x / self.scale) ** 2).flatten(1).sum(1) - constant


class FreeField(Prior):
    """The free scalar field, `log q = -S - log Z` with respect to Lebesgue measure:

        S = sum_x [ m2 phi^2 + sum_mu (phi(x+mu) - phi(x))^2 ],   <|phi(k)|^2> = 1 / (2 (m2 + khat^2)).

    `phi(k)` being the unitary Fourier transform. Fields are `(n, *shape)`, in one to four dimensions. White noise is
    multiplied by the root of that variance in momentum space, real and even, so draws are real, exact and independent.

    Raises ValueError unless m2 is positive and finite and the shape has one to four positive extents. Source: plane
    waves on the torus.
    """

    def __init__(self, shape: Sequence[int], m2: float) -> None:
        self.shape = check_shape(shape)
        self.m2 = float(m2)
        self.log_normalisation = scalar_free_log_z(m2, self.shape)
        half = khat_squared(self.shape)[..., : self.shape[-1] // 2 + 1]
        self._width = torch.as_tensor(0.5 / (self.m2 + half)).sqrt()

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        noise = torch.randn(n, *self.shape, **draw_options(generator))
        if n == 0:  # which the transform refuses
            return noise
        axes = tuple(range(1, noise.dim()))
        modes = torch.fft.rfftn(noise, dim=axes) * self._width.to(noise.device)
        return torch.fft.irfftn(modes, s=self.shape, dim=axes)

    def log_prob(self, x: Tensor) -> Tensor:
        dimensions = len(self.shape)
        density = self.m2 * x**2
        for mu in range(dimensions):
            density = density + (shift(x, mu, dimensions=dimensions) - x) ** 2
        return -site_sum(density, dimensions) - self.log_normalisation
