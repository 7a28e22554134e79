r"""Cyclic reduction of the Wilson-Dirac operator over time slices, in O(L0 L1^3).

In the spin basis where `g_0` is diagonal, forward hops in time carry one spin component (b) and backward hops the other
(a). With the links in temporal gauge a time slice then scatters what enters it into what leaves it,

    (a_t, b_t) = S_t (a_{t-1}, b_{t+1}),    S_t = [[A, B], [C, A^+]],    B^+ = -B,  C^+ = -C,

the last relations being `g_5`-hermiticity. Two neighbouring slabs of slices combine into one of the same form:

    K = 1 - B_1 C_2,   A = A_2 K^-1 A_1,   B = B_2 + A_2 K^-1 B_1 A_2^+,   C = C_1 + A_1^+ C_2 K^-1 A_1,

so log2(L0) batched steps with `L1 x L1` matrices leave one slab, and

    det M = prod_t |1 - (2 kappa)^L1 exp(i Phi_t)|^2  *  prod det K  *  det(1 + S diag(w^*, w)),

where `Phi_t` is the spatial holonomy of slice t and `w(x)` the temporal Polyakov phases (antiperiodic boundary). The
single slice needs no solver: in the basis where `g_1` is diagonal its inverse is a geometric series. A further constant
temporal holonomy enters `w` alone, so many of them cost one reduction (PHYSICS, section 4).

Everything here is differentiable by autograd.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from latticeflow.dirac.wilson import per_configuration


class Slab(NamedTuple):
    """Blocks A, B, C of S for slabs of time slices, each `(slabs, batch, L1, L1)`."""

    a: Tensor
    b: Tensor
    c: Tensor


class Slices(NamedTuple):
    """Single time slices, stored in the order of `reduction_order`.

    `slab` holds their S; `hop` is `kappa (1 - 2 kappa H)^-1`, `(L0, batch, L1, L1)`, with H the hop along the slice;
    `winding` is `(2 kappa)^L1 exp(i Phi) / (1 - (2 kappa)^L1 exp(i Phi))`, `(L0, batch)`; `polyakov` are the phases w,
    `(batch, L1)`; `log_abs` is the slices' part of `log|det M|`, `(batch,)`.
    """

    slab: Slab
    hop: Tensor
    winding: Tensor
    polyakov: Tensor
    log_abs: Tensor


class Merge(NamedTuple):
    """What lies between neighbouring slabs, flat in pairs and batch.

    The LU of K, `right = K^-1 [A_1, B_1 A_2^+]` and `reflected = C_2 K^-1 A_1`.
    """

    lu: Tensor
    pivots: Tensor
    right: Tensor
    reflected: Tensor


def plain_log_abs_det(links: Tensor, kappa: float | Tensor, twists: Tensor) -> tuple[Tensor, Tensor]:
    """Return `log|det M|` and its sign, `(batch, n)`, for autograd to differentiate any number of times."""
    slices = time_slices(links, kappa)
    slab, log_abs, sign = slices.slab, slices.log_abs, torch.ones_like(slices.log_abs)
    while len(slab.a) > 1:
        slab, _, log_det, sign_k = merge_neighbours(slab)
        log_abs, sign = log_abs + log_det, sign * sign_k
    closing = closing_matrix(slab, boundary_phases(slices.polyakov, twists))
    log_det, sign_closed = lu_determinant(*torch.linalg.lu_factor_ex(closing)[:2])
    return log_abs[:, None] + log_det, sign[:, None] * sign_closed


def reduction_order(slices: int) -> list[int]:
    """Return the order in which slices are stored so that left and right partners are halves at every level.

    An unpaired last slab stays last.
    """
    if slices == 1:
        return [0]
    pairs = slices // 2
    order = [j for j in reduction_order(slices - pairs) if j < pairs]
    return [2 * j for j in order] + [2 * j + 1 for j in order] + [slices - 1] * (slices % 2)


def time_slices(links: Tensor, kappa: float | Tensor) -> Slices:
    """Return the slices in temporal gauge.

    The hop H along a slice is unitary with `H^L1 = exp(i Phi)`, so `(1 - 2 kappa H)^-1` is the sum of
    `(2 kappa H)^n`, n = 0..L1-1, over `1 - (2 kappa)^L1 exp(i Phi)`.
    """
    time, space = links.double().unbind(-3)
    extent_time, extent = space.shape[-2:]
    gauge = torch.cumsum(time, dim=-2)
    polyakov = gauge[..., -1, :]
    gauge = torch.cat([torch.zeros_like(gauge[..., :1, :]), gauge[..., :-1, :]], dim=-2)
    space = (space + gauge - torch.roll(gauge, -1, -1))[:, reduction_order(extent_time)].movedim(1, 0)

    weight = per_configuration(2 * torch.as_tensor(kappa, dtype=links.dtype, device=links.device), 3)
    x = torch.arange(extent, device=links.device)
    series = weight / 2 * weight ** ((x[None, :] - x[:, None]) % extent)
    transport = phase((torch.cumsum(space, dim=-1) - space).to(links.dtype))
    loop = phase(space.sum(dim=-1).to(links.dtype))
    wound = (weight**extent).reshape(-1) * loop
    start = transport.conj() / (1 - wound)[..., None]
    start = torch.where(x[None, :] < x[:, None], (start * loop[..., None])[..., None], start[..., None])
    hop = start * series * transport[..., None, :]
    adjoint = hop.mH.contiguous()
    across = adjoint - hop
    slab = Slab(adjoint + hop, across, across)
    log_abs = 2 * torch.log((1 - wound).abs()).sum(0)
    return Slices(slab, hop, wound / (1 - wound), phase(polyakov.to(links.dtype)), log_abs)


def phase(angle: Tensor) -> Tensor:
    """Return `exp(i angle)`."""
    return torch.polar(torch.ones_like(angle), angle)


def merge_neighbours(slab: Slab) -> tuple[Slab, Merge, Tensor, Tensor]:
    """Return half as many slabs, what lies between the merged ones, and `log|det K|` and its sign, summed over them.

    Where K is nearly singular, two things keep 10 to 1000 times the accuracy: solving with its LU rather than
    multiplying by its inverse, and taking out what rounding adds to the Hermitian parts of B and C.
    """
    pairs, one = len(slab.a) // 2, identity(slab.a.shape[-1], slab.a)
    (a1, b1, c1), (a2, b2, c2) = zip(*map(neighbours, slab), strict=True)
    lu, pivots = torch.linalg.lu_factor(torch.baddbmm(one, b1, c2, alpha=-1))
    right = torch.linalg.lu_solve(lu, pivots, torch.cat([a1, b1 @ a2.mH], dim=-1))
    from_left, from_right = right.chunk(2, dim=-1)
    reflected = c2 @ from_left
    half_b = torch.baddbmm(b2, a2, from_right, beta=0.5, alpha=0.5)
    half_c = torch.baddbmm(c1, a1.mH, reflected, beta=0.5, alpha=0.5)
    merged = a2 @ from_left, half_b - half_b.mH, half_c - half_c.mH
    merged = Slab(*(block.unflatten(0, (pairs, -1)) for block in merged))
    if len(slab.a) % 2:
        merged = Slab(*(torch.cat([new, old[-1:]]) for new, old in zip(merged, slab, strict=True)))
    log_abs, sign = (part.unflatten(0, (pairs, -1)) for part in lu_determinant(lu, pivots))
    return merged, Merge(lu, pivots, right, reflected), log_abs.sum(0), sign.prod(0)


def neighbours(block: Tensor) -> tuple[Tensor, Tensor]:
    """Return the left and the right partners, flat in pairs and batch; an unpaired last slab is left out."""
    pairs = len(block) // 2
    return block[:pairs].flatten(0, 1), block[pairs : 2 * pairs].flatten(0, 1)


def boundary_phases(polyakov: Tensor, twists: Tensor) -> Tensor:
    """Return the diagonal `(w^*, w)` for each twist, `(batch, n, 2 L1)`."""
    w = polyakov[:, None] * phase(twists.to(polyakov.real))[:, None]
    return torch.cat([w.conj(), w], dim=-1)


def closing_matrix(slab: Slab, boundary: Tensor) -> Tensor:
    """Return `1 + S diag(w^*, w)` of the last slab, `(batch, n, 2 L1, 2 L1)`."""
    a, b, c = (block[0] for block in slab)
    s = torch.cat([torch.cat([a, b], dim=-1), torch.cat([c, a.mH], dim=-1)], dim=-2)
    return identity(s.shape[-1], s) + s[:, None] * boundary[..., None, :]


def identity(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


def lu_determinant(lu: Tensor, pivots: Tensor) -> tuple[Tensor, Tensor]:
    """Return log|det| and the sign of a real determinant from the LU factors of a complex matrix."""
    diagonal = lu.diagonal(dim1=-2, dim2=-1)
    swaps = (pivots != torch.arange(1, pivots.shape[-1] + 1, device=pivots.device)).sum(-1)
    direction = torch.sgn(diagonal.detach()).prod(-1)
    return torch.log(diagonal.abs()).sum(-1), torch.sign(direction.real) * (1 - 2 * (swaps % 2))
