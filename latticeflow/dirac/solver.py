r"""Solutions of `M x = b` with the Wilson-Dirac operator by cyclic reduction over time slices, factorised once.

In time slices M is block cyclic tridiagonal. In the spin basis where `g_0` is diagonal, the eigenvalue +1 first,

    (M x)_t = D_t x_t + F_t P_- x_{t+1} + G_t P_+ x_{t-1},    F_t = -2 kappa U_0(t),    G_t = -2 kappa U_0(t-1)^*,

with D the operator within the slice, of size 2 L1, and P the projections on the eigenvalues of `g_0`, so that F and G
have size L1. One batched LU eliminates the odd slices: with `W = D^-1 [G, F]` of an odd slice, its left neighbour gets

    D_{-+} <- D_{-+} - F W_{-+},    F <- -F W_{--},

and its right neighbour the same with F, G and +, - exchanged. Half as many slices of the same form remain, and after
log2(L0) levels a single one that is its own neighbour. Factorising costs O(L0 L1^3), every column O(L0 L1^2).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from latticeflow.dirac.wilson import GAMMA, hops, per_configuration


class Tridiagonal(NamedTuple):
    """Blocks of slices: D `(slices, batch, 2 L1, 2 L1)`, F and G `(slices, batch, L1, L1)`."""

    within: Tensor
    forward: Tensor
    backward: Tensor


class Level(NamedTuple):
    """One elimination: the LU of the odd slices, their W, and F and G of the even slices beside them.

    `right` is the position, among the even slices, of each odd slice's right neighbour; the left one has its own.
    """

    lu: Tensor
    pivots: Tensor
    response: Tensor
    forward: Tensor
    backward: Tensor
    right: Tensor

    def reduce(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Return the source of the even slices, and `D^-1 b` of the odd ones, `(slices, batch, 2 L1, columns)`."""
        solved = torch.linalg.lu_solve(self.lu, self.pivots, source[1::2])
        even, (pairs, _, size, _) = source[::2].clone(), self.forward.shape
        even[:pairs, :, size:] -= self.forward @ solved[:, :, size:]
        even[self.right, :, :size] -= self.backward @ solved[:, :, :size]
        return even, solved

    def restore(self, even: Tensor, solved: Tensor) -> Tensor:
        """Return the solution on all slices from that on the even ones."""
        pairs, size = len(solved), self.forward.shape[-1]
        incoming = torch.cat([even[:pairs, :, :size], even[self.right, :, size:]], dim=2)
        both = even.new_empty(len(even) + pairs, *even.shape[1:])
        both[::2], both[1::2] = even, solved - self.response @ incoming
        return both


class WilsonSolver:
    """The factorised Wilson-Dirac operator of gauge configurations, `M x = b` for any number of columns at a time.

    `links (batch, 2, L0, L1)` with any extents; `kappa` is a number or `(batch,)`. All arithmetic is complex128. Like
    `log_abs_det` it loses digits for nearly constant links above their critical kappa on long lattices, and it fails
    where a slab of slices has an exact zero mode, which needs `|kappa| >= 1/4`. Raises ValueError for links of another
    shape.
    """

    def __init__(self, links: Tensor, kappa: float | Tensor) -> None:
        if links.dim() != 4 or links.shape[1] != 2:
            raise ValueError(f"WilsonSolver: links must be (batch, 2, L0, L1), got {tuple(links.shape)}")
        self.batch, _, *extents = links.shape
        self.shape = tuple(extents)
        self.device = links.device
        slices = _slices(links.double(), kappa)
        self._levels: list[Level] = []
        while len(slices.within) > 1:
            level, slices = _eliminate(slices)
            self._levels.append(level)
        self._last = torch.linalg.lu_factor(slices.within[0] + _diagonal(slices.backward[0], slices.forward[0]))

    def solve(self, source: Tensor) -> Tensor:
        """Return x with `M x = source`, both `(batch, L0, L1, 2, columns)`, complex128.

        Raises ValueError for a source of another shape.
        """
        expected = (self.batch, *self.shape, 2)
        if source.dim() != 5 or tuple(source.shape[:-1]) != expected:
            raise ValueError(f"solve: source must be {(*expected, 'columns')}, got {tuple(source.shape)}")
        remaining, solved = _to_slices(source.to(torch.complex128)), []
        for level in self._levels:
            remaining, odd = level.reduce(remaining)
            solved.append(odd)
        x = torch.linalg.lu_solve(*self._last, remaining[0])[None]
        for level, odd in zip(reversed(self._levels), reversed(solved), strict=True):
            x = level.restore(x, odd)
        return _from_slices(x)


def propagator(solver: WilsonSolver, slices: Sequence[int]) -> Tensor:
    """Return `M^-1(x; y)` for every source y on the given time slices, all spins, and every sink x.

    The result is `(batch, L0, L1, 2, slices, L1, 2)`: sink time, space and spin, then source time, space and spin.
    Raises ValueError for a slice outside the lattice.
    """
    extent_time, extent = solver.shape
    if any(not 0 <= t < extent_time for t in slices):
        raise ValueError(f"propagator: slices must lie in 0..{extent_time - 1}, got {list(slices)}")
    columns = len(slices) * extent * 2
    source = torch.zeros(extent_time, 2 * extent, len(slices), 2 * extent, dtype=torch.complex128, device=solver.device)
    one = torch.eye(2 * extent, dtype=torch.complex128, device=solver.device)
    for position, t in enumerate(slices):
        source[t, :, position] = one
    expanded = source.reshape(1, extent_time, extent, 2, columns).expand(solver.batch, -1, -1, -1, -1)
    return solver.solve(expanded).reshape(solver.batch, extent_time, extent, 2, len(slices), extent, 2)


def _slices(links: Tensor, kappa: float | Tensor) -> Tridiagonal:
    """Return the blocks of the single slices, batch second."""
    time, space = (per_configuration(kappa, 3) * hop for hop in hops(links).unbind(1))
    extent = links.shape[-1]
    one = torch.eye(2, dtype=time.dtype, device=links.device)
    gamma = _turn_spin(_turn_spin(GAMMA[1].to(time)).mT).mT
    here = torch.eye(extent, dtype=time.dtype, device=links.device)
    ahead = space[..., None] * torch.roll(here, 1, -1)  # added, not assigned: for extents 1 and 2 the hops coincide
    hopped = torch.einsum("st,bzxy->zbsxty", one - gamma, ahead)
    hopped = hopped + torch.einsum("st,bzyx->zbsxty", one + gamma, ahead.conj())
    identity = torch.eye(2 * extent, dtype=time.dtype, device=links.device)
    within = identity - hopped.reshape(*hopped.shape[:2], 2 * extent, 2 * extent)
    forward, backward = -2 * time, -2 * torch.roll(time, 1, 1).conj()
    return Tridiagonal(within, torch.diag_embed(forward.movedim(1, 0)), torch.diag_embed(backward.movedim(1, 0)))


def _eliminate(slices: Tridiagonal) -> tuple[Level, Tridiagonal]:
    within, forward, backward = (block[::2].clone() for block in slices)
    odd = Tridiagonal(*(block[1::2] for block in slices))
    pairs, size = len(odd.within), forward.shape[-1]
    right = (torch.arange(pairs, device=within.device) + 1) % len(within)
    lu, pivots = torch.linalg.lu_factor(odd.within)
    response = torch.linalg.lu_solve(lu, pivots, _diagonal(odd.backward, odd.forward))
    level = Level(lu, pivots, response, forward[:pairs].clone(), backward[right], right)
    to_left, to_right = level.forward @ response[:, :, size:], level.backward @ response[:, :, :size]
    within[:pairs, :, size:, :size] -= to_left[..., :size]
    within[right, :, :size, size:] -= to_right[..., size:]
    forward[:pairs], backward[right] = -to_left[..., size:], -to_right[..., :size]
    return level, Tridiagonal(within, forward, backward)


def _diagonal(first: Tensor, second: Tensor) -> Tensor:
    """Return the block-diagonal matrix of two square blocks of the same size."""
    zero = torch.zeros_like(first)
    return torch.cat([torch.cat([first, zero], dim=-1), torch.cat([zero, second], dim=-1)], dim=-2)


def _turn_spin(spinor: Tensor) -> Tensor:
    """Return the components `(2, ...)` in the eigenbasis of `g_0`, or back: the turn is its own inverse."""
    up, down = spinor.unbind(0)
    return torch.stack([up + down, up - down]) / math.sqrt(2)


def _to_slices(spinor: Tensor) -> Tensor:
    batch, extent_time, extent, _, columns = spinor.shape
    turned = _turn_spin(spinor.permute(3, 1, 0, 2, 4))
    return turned.movedim(0, 2).reshape(extent_time, batch, 2 * extent, columns)


def _from_slices(slices: Tensor) -> Tensor:
    extent_time, batch, size, columns = slices.shape
    spinor = slices.reshape(extent_time, batch, 2, size // 2, columns)
    return _turn_spin(spinor.movedim(2, 0)).permute(2, 1, 3, 0, 4)
