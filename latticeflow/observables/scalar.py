"""Observables of scalar configurations `(batch, *lattice)`."""

import math

import torch
from torch import Tensor

from latticeflow.lattice import shift, site_mean
from latticeflow.observables.correlation import autocorrelation


def magnetisation(phi: Tensor) -> Tensor:
    """Return `M`, the mean of phi over the lattice, `(batch,)`."""
    return site_mean(phi, phi.dim() - 1)


def abs_magnetisation(phi: Tensor) -> Tensor:
    """Return `|M|`, `(batch,)`."""
    return magnetisation(phi).abs()


def magnetisation_squared(phi: Tensor) -> Tensor:
    """Return `V M^2`, `(batch,)`."""
    return magnetisation(phi) ** 2 * phi[0].numel()


def phi_squared(phi: Tensor) -> Tensor:
    """Return the mean of `phi^2`, `(batch,)`."""
    return site_mean(phi**2, phi.dim() - 1)


def phi_fourth(phi: Tensor) -> Tensor:
    """Return the mean of `phi^4`, `(batch,)`."""
    return site_mean(phi**4, phi.dim() - 1)


def phi_neighbour(phi: Tensor) -> Tensor:
    """Return the mean of `phi(x) phi(x+mu)` over sites and directions, `(batch,)`."""
    dimensions = phi.dim() - 1
    products = [site_mean(phi * shift(phi, mu, dimensions=dimensions), dimensions) for mu in range(dimensions)]
    return sum(products) / dimensions


def two_point(phi: Tensor) -> Tensor:
    r"""Return the correlator of time slices at zero spatial momentum, `(batch, L0//2 + 1)`.

    `C(t) = (V_s/L0) sum_t0 Phi(t0+t) Phi(t0)`, Phi being the mean over a time slice of V_s sites: the mean over x of
    `sum_y phi(x) phi(y)`, y running over the slice at distance t. The square of the magnetisation is not subtracted.
    """
    slices = phi.flatten(2) if phi.dim() > 2 else phi[..., None]
    sums = slices.sum(-1)
    return autocorrelation(sums) / slices[0].numel()


def momentum_zero(phi: Tensor) -> Tensor:
    r"""Return `|sum_x phi(x)|^2 / V = V M^2`, the propagator at zero momentum, `(batch,)`."""
    return magnetisation_squared(phi)


def momentum_min(phi: Tensor) -> Tensor:
    r"""Return the propagator at the smallest momentum, `|sum_x exp(-i k x_mu) phi(x)|^2 / V`, `(batch,)`.

    `k = 2 pi / L_mu`, averaged over the directions mu; a direction of one site has zero momentum.
    """
    directions = range(phi.dim() - 1)
    return sum(_along(phi, mu) for mu in directions) / (len(directions) * phi[0].numel())


def _along(phi: Tensor, mu: int) -> Tensor:
    extent = phi.shape[mu + 1]
    line = phi.movedim(mu + 1, 1).reshape(len(phi), extent, -1).sum(-1)
    angle = 2 * math.pi / extent * torch.arange(extent, dtype=phi.dtype, device=phi.device)
    return (line @ torch.cos(angle)) ** 2 + (line @ torch.sin(angle)) ** 2
