"""Observables of gauge configurations: the links `(batch, 2, L0, L1)` alone decide."""

import torch
from torch import Tensor

from latticeflow import u1
from latticeflow.lattice import site_mean


def plaquette(links: Tensor) -> Tensor:
    """Return the mean of `cos P` over the lattice, `(batch,)`."""
    return site_mean(torch.cos(u1.plaquette(links)))


def charge(links: Tensor) -> Tensor:
    """Return the topological charge Q, `(batch,)`."""
    return u1.topological_charge(links)


def charge_squared(links: Tensor) -> Tensor:
    """Return `Q^2`, `(batch,)`."""
    return u1.topological_charge(links) ** 2


def susceptibility(links: Tensor) -> Tensor:
    """Return `Q^2 / V`, whose mean is the topological susceptibility chi_t (`<Q> = 0` by charge conjugation)."""
    volume = links.shape[-2] * links.shape[-1]
    return charge_squared(links) / volume
