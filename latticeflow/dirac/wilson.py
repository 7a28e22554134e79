"""The Wilson-Dirac operator in two dimensions, as a dense matrix and applied to spinors.

`M = 1 - kappa sum_mu [(1 - g_mu) U_mu(x) delta_{x+mu,y} + (1 + g_mu) U_mu(x-mu)^* delta_{x-mu,y}]` with
`g_0 = sigma_1`, `g_1 = sigma_2`, `g_5 = sigma_3`, antiperiodic in direction 0 (PHYSICS conventions of this package).
"""

import torch
from torch import Tensor

from latticeflow.lattice import shift, site_index, volume

SIGMA = torch.tensor([[[0, 1], [1, 0]], [[0, -1j], [1j, 0]], [[1, 0], [0, -1]]], dtype=torch.complex128)
GAMMA = SIGMA[:2]
GAMMA5 = SIGMA[2]


def hops(links: Tensor) -> Tensor:
    """Return `U_mu(x) = exp(i theta_mu(x))` with the antiperiodic sign on the last time slice, complex, shape kept."""
    sign = torch.ones(links.shape[-3:], dtype=links.dtype, device=links.device)
    sign[0, -1] = -1
    return torch.polar(sign.abs().expand_as(links), links) * sign


def per_configuration(value: float | Tensor, dimensions: int) -> float | Tensor:
    """Return a number as it is, and one for each configuration, `(batch,)`, with axes of length 1 added."""
    return value.reshape(-1, *[1] * (dimensions - 1)) if isinstance(value, Tensor) and value.dim() else value


def apply_wilson(links: Tensor, kappa: float | Tensor, spinor: Tensor) -> Tensor:
    """Return `M psi` without building M.

    `links (batch, 2, L0, L1)`, `spinor (batch, L0, L1, 2)` complex, the last axis being spin; `kappa` is a number or
    `(batch,)`.
    """
    phases = hops(links)
    gamma = GAMMA.to(spinor)
    components = spinor.movedim(-1, 1)
    hopped = torch.zeros_like(components)
    for mu in (0, 1):
        u = phases[:, mu, None]
        forward = u * shift(components, mu)
        backward = shift(u.conj() * components, mu, -1)
        hopped = hopped + forward + backward + torch.einsum("st,btxy->bsxy", gamma[mu], backward - forward)
    return (components - per_configuration(kappa, 4) * hopped).movedim(1, -1)


def wilson_matrix(links: Tensor, kappa: float | Tensor) -> Tensor:
    """Return M as a dense matrix `(batch, 2V, 2V)`; rows and columns count site first, spin last: `2 * site + spin`.

    `kappa` is a number or `(batch,)`.
    """
    batch, _, *shape = links.shape
    size = volume(shape)
    phases = hops(links).reshape(batch, 2, size)
    gamma, one = GAMMA.to(phases), torch.eye(2, dtype=phases.dtype, device=links.device)
    sites = site_index(shape)
    hopped = torch.zeros(batch, size, 2, size, 2, dtype=phases.dtype, device=links.device)
    for mu in (0, 1):
        neighbour = shift(sites, mu).flatten().to(links.device)
        forward = phases[:, mu, :, None] * torch.eye(size, dtype=phases.dtype, device=links.device)[neighbour]
        hopped = hopped + torch.einsum("st,bxy->bxsyt", one - gamma[mu], forward)
        hopped = hopped + torch.einsum("st,byx->bxsyt", one + gamma[mu], forward.conj())
    identity = torch.eye(2 * size, dtype=phases.dtype, device=links.device)
    return identity - per_configuration(kappa, 3) * hopped.reshape(batch, 2 * size, 2 * size)
