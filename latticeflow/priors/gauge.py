"""Priors of U(1) links: Haar-uniform ones and the exact quenched sampler; densities refer to Haar measure."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Generator, Tensor

from latticeflow.exact import u1_charge_log_z, u1_gaussian_log_mean, u1_log_z
from latticeflow.lattice import check_shape, site_sum, volume
from latticeflow.priors.base import Prior
from latticeflow.streams import device_options, draw_options
from latticeflow.u1 import plaquette, random_gauge_transform, sawtooth, wrap


class HaarUniform(Prior):
    """Independent uniform links `(n, 2, L0, L1)`: `log_prob = 0` with respect to Haar measure."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = check_shape(shape, dimensions=2)

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        return math.pi * (2 * torch.rand(n, 2, *self.shape, **draw_options(generator)) - 1)

    def log_prob(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x))


class QuenchedU1(Prior):
    r"""Independent draws of pure U(1) gauge theory, exactly, with topological sectors suppressed:

        q = exp(beta sum_x cos P(x)) g / Z_g,   g = exp(-c Q^2) sum_i a_i exp(-c_i R^2).

    `Q` is the topological charge, c being `sector`, and `R` the smooth charge, `smooth_sector` holding the pairs
    `(a_i, c_i)`, the weights a_i adding up to 1. The first factor jumps where Q does, which biases pathwise gradients;
    the second does not. `V - 1` plaquettes are drawn from the von Mises law and the last is minus their sum; that is
    accepted with probability `exp(beta (cos P_last - 1)) g`. Two uniform holonomies and a uniform gauge transformation
    make links of it. `Z_g` is exact: a sum over the distribution of Q, or a Fourier integral over that of R.

    Links are `(n, 2, L0, L1)`, densities with respect to Haar measure. Raises ValueError for a negative or non-finite
    number, weights that do not add up to 1, or both factors at once.
    """

    def __init__(
        self,
        beta: float,
        shape: Sequence[int],
        *,
        sector: float = 0.0,
        smooth_sector: Sequence[tuple[float, float]] = (),
    ) -> None:
        for name, value in (
            ("beta", beta),
            ("sector", sector),
            *(("smooth_sector", v) for p in smooth_sector for v in p),
        ):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {value!r}")
        if smooth_sector and (sector or not math.isclose(sum(a for a, _ in smooth_sector), 1.0, abs_tol=1e-9)):
            raise ValueError(f"smooth_sector needs weights that add up to 1 and sector = 0, got {smooth_sector!r}")
        self.beta, self.sector = float(beta), float(sector)
        self.smooth_sector = tuple((float(a), float(c)) for a, c in smooth_sector)
        self.shape = check_shape(shape, dimensions=2)
        self.log_normalisation = u1_log_z(self.beta, self.shape) + self._log_suppressed()

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        plaquettes = self._plaquettes(n, generator)
        holonomies = 2 * math.pi * torch.rand(n, 2, **draw_options(generator))
        return wrap(random_gauge_transform(links_from_plaquettes(plaquettes, holonomies), generator))

    def log_prob(self, x: Tensor) -> Tensor:
        angle = plaquette(x)
        return self.beta * site_sum(torch.cos(angle)) + self._log_factor(angle) - self.log_normalisation

    def _log_factor(self, angle: Tensor) -> Tensor:
        """Return `log g` of plaquette angles `(n, L0, L1)`."""
        if not self.smooth_sector:
            charge = (
                torch.round(site_sum(wrap(angle)) / (2 * math.pi)) if self.sector else torch.zeros_like(angle[:, 0, 0])
            )
            return -self.sector * charge**2
        smooth = site_sum(sawtooth(torch.cos(angle), torch.sin(angle))) / (2 * math.pi)
        return torch.log(sum(a * torch.exp(-c * smooth**2) for a, c in self.smooth_sector))

    def _log_suppressed(self) -> float:
        """Return `log <g>` in the pure gauge theory."""
        if not self.smooth_sector:
            return u1_charge_log_z(self.beta, self.shape, self.sector)

        def density(angle: np.ndarray) -> np.ndarray:
            return sawtooth(np.cos(angle), np.sin(angle)) / (2 * math.pi)

        means = [
            a * math.exp(u1_gaussian_log_mean(self.beta, self.shape, c, function=density))
            for a, c in self.smooth_sector
        ]
        return math.log(sum(means))

    def _plaquettes(self, n: int, generator: Generator | None) -> Tensor:
        """Return plaquette angles `(n, L0, L1)` whose sum is a multiple of 2 pi."""
        size = volume(self.shape)
        accepted: list[Tensor] = [torch.zeros(0, *self.shape, **device_options(generator))]
        missing = n
        while missing > 0:
            drawn = von_mises(self.beta, (2 * missing + 16, size - 1), generator)
            last = wrap(-drawn.sum(1, keepdim=True))
            angle = torch.cat([drawn, last], dim=1).reshape(-1, *self.shape)
            log_accept = self.beta * (torch.cos(last[:, 0]) - 1) + self._log_factor(angle)
            keep = torch.rand(len(angle), **draw_options(generator)).log() < log_accept
            accepted.append(angle[keep])
            missing -= int(keep.sum())
        return torch.cat(accepted)[:n]


def links_from_plaquettes(plaquettes: Tensor, holonomies: Tensor) -> Tensor:
    """Return links in a maximal-tree gauge with these plaquettes and Polyakov loops.

    `plaquettes (n, L0, L1)` must sum to a multiple of 2 pi; `holonomies (n, 2)` are the angles of the loops through the
    origin in the two directions. Result `(n, 2, L0, L1)`, on any branch.
    """
    columns = plaquettes.sum(1)
    time = torch.zeros_like(plaquettes)
    time[:, -1] = holonomies[:, :1] + columns - torch.cumsum(columns, dim=1)
    space = torch.cumsum(plaquettes, dim=1) - plaquettes
    space[:, :, -1] += holonomies[:, 1:]
    return torch.stack([time, space], dim=1)


def von_mises(concentration: float, size: Sequence[int], generator: Generator | None = None) -> Tensor:
    """Return angles with density `exp(kappa cos x) / (2 pi I_0(kappa))`, by rejection from a wrapped Cauchy law.

    Source: Best and Fisher, Applied Statistics 28 (1979) 152. Float64, any shape, concentration >= 0.
    """
    total = math.prod(size)
    if total == 0:
        return torch.zeros(*size, **device_options(generator))
    tau = 1 + math.sqrt(1 + 4 * concentration**2)
    ratio = 2 * concentration / tau
    accepted: list[Tensor] = []
    missing = total
    while missing > 0:
        u1, u2, u3 = torch.rand(3, missing + missing // 2 + 16, **draw_options(generator))
        z = torch.cos(math.pi * u1)
        cosine = ((ratio + z) / (1 + ratio * z)).clamp(-1, 1)
        c = tau / 2 - concentration * cosine
        keep = torch.log(c / u2) + 1 - c >= 0
        accepted.append((torch.sign(u3 - 0.5) * torch.acos(cosine))[keep])
        missing -= int(keep.sum())
    return torch.cat(accepted)[:total].reshape(*size)
