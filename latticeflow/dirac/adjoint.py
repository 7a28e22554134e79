r"""The gradient of `log|det M|` in the links by the adjoint of the cyclic reduction, without a stored autograd graph.

With the notation of `dirac.reduction`, the gradient of `f = log|det M|` in a slab's S is the matrix Q of

    df = Re tr(Q dS),    Q = [[alpha, gamma], [beta, alpha^+]],    beta^+ = -beta,  gamma^+ = -gamma,

the Green's function between the slab's two faces through all the others; the form is that of S, by `g_5`-hermiticity.
Closing the last slab gives `Q = diag(w^*, w) (1 + S diag(w^*, w))^-1`. One level down, with `P = K^-1`,

    dP = P (dB_1 C_2 + B_1 dC_2) P,    d log|det K| = -Re tr(Y dB_1) - Re tr(X dC_2),
    X = P B_1 = B_1 P^+,    Y = C_2 P = P^+ C_2,    P = 1 + B_1 Y = 1 + X C_2,

so that `dX = P dB_1 P^+ + X dC_2 X` and `dY = P^+ dC_2 P + Y dB_1 Y`. Put into `df` and sorted by slab, with
`R_1 = P A_1`, `R_2 = A_2 P`, `V = X A_2^+` and `W = Y A_1`:

    alpha_2 = R_1 alpha + V beta,       gamma_2 = [R_1 gamma R_1^+ - (2 R_1 alpha + V beta) V^+ - X]_-,
    alpha_1 = alpha R_2 - gamma W^+,    beta_1  = [R_2^+ beta R_2 + W (2 alpha R_2 - gamma W^+) - Y]_-,

and `beta_2 = beta`, `gamma_1 = gamma`, where `[.]_-` is the anti-Hermitian part: only that counts for beta and gamma,
as B and C are anti-Hermitian.

A slice has `A = h + h^+` and `B = C = h^+ - h` with `h = kappa (1 - 2 kappa H)^-1`, hence `df = Re tr(G dh)` with
`G = 2 (alpha + alpha^+ - beta - gamma)`. Each element of h is a modulus times the transporter from x to y, over
`1 - (2 kappa)^L1 exp(i Phi)`; sums of `G_yx h_xy` over x and y are the derivatives in the links.

A level costs about as much as in the reduction itself. Configurations are independent, and so they are taken a few at a
time within a fixed working memory.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from latticeflow.dirac.reduction import (
    Merge,
    Slab,
    Slices,
    boundary_phases,
    closing_matrix,
    identity,
    lu_determinant,
    merge_neighbours,
    neighbours,
    plain_log_abs_det,
    reduction_order,
    time_slices,
)

WORKING_MEMORY = {"cpu": 2**27, "cuda": 2**31}  # bytes that a group of configurations may take
KEPT_MEMORY = 2**28  # bytes of reductions that a call keeps for its backward; beyond them reductions are made again
MATRICES = 20  # most L1 x L1 matrices alive at a time, for each time slice
CLOSING_MATRICES = 16  # and for each twist


class Green(NamedTuple):
    """Blocks alpha, beta, gamma of Q for slabs of time slices, each `(slabs, batch, L1, L1)`."""

    alpha: Tensor
    beta: Tensor
    gamma: Tensor


class Transfer(NamedTuple):
    """What the adjoint needs of a merge, flat in pairs and batch: `[R_1, V]`, R_2, W, X and Y."""

    right: Tensor
    r2: Tensor
    w: Tensor
    x: Tensor
    y: Tensor


class Reduction(NamedTuple):
    """A finished reduction: `log|det M|` and its sign, `(batch, n)`, and what the adjoint needs."""

    log_abs: Tensor
    sign: Tensor
    slices: Slices
    transfers: list[Transfer]
    boundary: Tensor
    lu: Tensor
    pivots: Tensor

    @property
    def nbytes(self) -> int:
        """Return the bytes that the adjoint keeps alive."""
        tensors = [self.slices.hop, self.boundary, self.lu, *(part for level in self.transfers for part in level)]
        return sum(tensor.nbytes for tensor in tensors)


class LogAbsDet(torch.autograd.Function):
    """`log|det M|` and its sign, `(batch, n)`, of links and n twists; links alone may carry a gradient.

    With one twist the gradient is made together with the value, since it is known but for a factor; with more of them
    the reductions are kept, or made again, for the backward. A second derivative is that of the plain formula.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, links: Tensor, kappa: float | Tensor, twists: Tensor) -> tuple[Tensor, Tensor]:
        log_abs, sign = links.new_empty(2, len(links), len(twists))
        ctx.kappa, ctx.twists, ctx.kept = kappa, twists, {}
        wanted, single, budget = ctx.needs_input_grad[0], len(twists) == 1, KEPT_MEMORY
        gradient = torch.empty_like(links) if wanted and single else None
        for rows in groups(links, twists):
            reduction = reduce(links[rows], _of_rows(kappa, rows), twists, with_adjoint=wanted)
            log_abs[rows], sign[rows] = reduction.log_abs, reduction.sign
            if wanted and single:
                gradient[rows] = links_gradient(reduction, torch.ones_like(reduction.log_abs))
            elif wanted and reduction.nbytes <= budget:
                budget -= reduction.nbytes
                ctx.kept[rows.start] = reduction
        ctx.save_for_backward(links, gradient)
        ctx.mark_non_differentiable(sign)
        return log_abs, sign

    @staticmethod
    def backward(ctx: FunctionCtx, slope: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        links, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():
            log_abs, _ = plain_log_abs_det(links, ctx.kappa, ctx.twists)
            return *torch.autograd.grad(log_abs, links, slope, create_graph=True), None, None
        if gradient is not None:
            return slope[:, :, None, None] * gradient, None, None
        gradient = torch.empty_like(links)
        for rows in groups(links, ctx.twists):
            reduction = ctx.kept.pop(rows.start, None)
            if reduction is None:
                reduction = reduce(links[rows], _of_rows(ctx.kappa, rows), ctx.twists, with_adjoint=True)
            gradient[rows] = links_gradient(reduction, slope[rows])
        return gradient, None, None


def groups(links: Tensor, twists: Tensor) -> list[slice]:
    """Return the rows of groups of configurations that are reduced at a time."""
    extent_time, extent = links.shape[-2:]
    matrix = 2 * links.element_size() * extent**2
    each = matrix * (MATRICES * extent_time + CLOSING_MATRICES * len(twists))
    rows = max(1, WORKING_MEMORY.get(links.device.type, WORKING_MEMORY["cuda"]) // each)
    return [slice(start, start + rows) for start in range(0, len(links), rows)]


def _of_rows(kappa: float | Tensor, rows: slice) -> float | Tensor:
    return kappa[rows] if isinstance(kappa, Tensor) and kappa.numel() > 1 else kappa


def reduce(links: Tensor, kappa: float | Tensor, twists: Tensor, *, with_adjoint: bool) -> Reduction:
    """Return the reduction; without the adjoint it keeps nothing for it."""
    slices = time_slices(links, kappa)
    slab, log_abs, sign, transfers = slices.slab, slices.log_abs, torch.ones_like(slices.log_abs), []
    slices = slices._replace(slab=None)
    while len(slab.a) > 1:
        merged, between, log_det, sign_k = merge_neighbours(slab)
        log_abs, sign = log_abs + log_det, sign * sign_k
        if with_adjoint:
            transfers.append(_transfer(slab, between))
        slab = merged
    boundary = boundary_phases(slices.polyakov, twists)
    lu, pivots, _ = torch.linalg.lu_factor_ex(closing_matrix(slab, boundary))
    log_det, sign_closed = lu_determinant(lu, pivots)
    return Reduction(log_abs[:, None] + log_det, sign[:, None] * sign_closed, slices, transfers, boundary, lu, pivots)


def _transfer(slab: Slab, between: Merge) -> Transfer:
    (b1, _), (_, a2), (_, c2) = neighbours(slab.b), neighbours(slab.a), neighbours(slab.c)
    one = identity(b1.shape[-1], b1).expand_as(b1).contiguous()
    inverse = torch.linalg.lu_solve(between.lu, between.pivots, one)
    return Transfer(between.right, a2 @ inverse, between.reflected, inverse @ b1, c2 @ inverse)


def links_gradient(reduction: Reduction, slope: Tensor) -> Tensor:
    """Return the gradient of `sum(slope * log|det M|)` in the links, `(batch, 2, L0, L1)`; `slope (batch, n)`."""
    size = reduction.lu.shape[-1] // 2
    inverse = torch.linalg.lu_solve(reduction.lu, reduction.pivots, identity(2 * size, reduction.lu))
    inverse = inverse * slope[..., None, None]
    weight, diagonal = slope.sum(1), inverse.diagonal(dim1=-2, dim2=-1).imag.sum(1)
    closed = (reduction.boundary[..., None] * inverse).sum(1)[None]
    q = Green(closed[..., :size, :size], closed[..., size:, :size], closed[..., :size, size:])
    for transfer in reversed(reduction.transfers):
        q = _split(q, transfer, weight)
    return _of_links(reduction.slices, q, weight, diagonal[:, size:] - diagonal[:, :size])


def _split(q: Green, transfer: Transfer, weight: Tensor) -> Green:
    """Return the gradients of twice as many slabs."""
    pairs = len(transfer.x) // len(weight)
    alpha, beta, gamma = (part[:pairs].flatten(0, 1) for part in q)
    r1, v = transfer.right.chunk(2, dim=-1)
    half = -weight.repeat(pairs)[:, None, None] / 2
    both = Green(*(part.new_empty(len(part) + pairs, *part.shape[1:]) for part in q))
    (alpha_1, alpha_2), (beta_1, beta_2), (gamma_1, gamma_2) = (neighbours(part[: 2 * pairs]) for part in both)

    through = r1 @ alpha
    torch.baddbmm(through, v, beta, out=alpha_2)
    found = torch.baddbmm(half * transfer.x, r1 @ gamma, r1.mH, alpha=0.5)
    found.baddbmm_(through.add_(alpha_2), v.mH, alpha=-0.5)
    torch.sub(found, found.mH, out=gamma_2)

    through = alpha @ transfer.r2
    torch.baddbmm(through, gamma, transfer.w.mH, alpha=-1, out=alpha_1)
    found = torch.baddbmm(half * transfer.y, transfer.r2.mH, beta @ transfer.r2, alpha=0.5)
    found.baddbmm_(transfer.w, through.add_(alpha_1), alpha=0.5)
    torch.sub(found, found.mH, out=beta_1)

    beta_2.copy_(beta), gamma_1.copy_(gamma)
    for children, parents in zip(both, q, strict=True):
        children[2 * pairs :] = parents[pairs:]
    return both


def _of_links(slices: Slices, q: Green, weight: Tensor, polyakov: Tensor) -> Tensor:
    """Return the gradient in the links from those in the slices and in the phases of w.

    The transporter from x to y has the links x..y-1, and those of the loop besides where it winds around the slice.
    """
    g = 2 * (q.alpha + q.alpha.mH - q.beta - q.gamma)
    product = slices.hop * g.mT
    rows, columns = product.sum(-1), product.sum(-2)
    wraps = product.tril(-1).sum((-2, -1)).imag
    loop = 2 * weight * slices.winding.imag - (slices.winding * rows.sum(-1)).imag - wraps
    ordered = torch.cumsum((columns - rows).imag, dim=-1) + loop[..., None]
    space = torch.empty_like(ordered)
    space[reduction_order(len(space))] = ordered
    space = space.movedim(0, 1)
    gauge = space - torch.roll(space, 1, -1)
    time = gauge.sum(1, keepdim=True) - torch.cumsum(gauge, dim=1) + polyakov[:, None]
    return torch.stack([time, space], dim=1)
