"""Which links a gauge coupling updates, and the mask cells its conditioner works on.

A layer updates the links of direction `mu` at the sites with `x_nu = offset + 2 x_mu (mod 4)`, `nu` the other
direction: a pattern periodic under (1 along mu, 2 along nu) and (0, 4), with a quarter of the links of one direction
(arXiv:2202.11712, section III). Each such link bounds two plaquettes, `P(x)` (active: transformed) and `P(x - nu)`
(passive: moves along). The other two of the four in a row are frozen, and so is the sum of active and passive, the
2x1 loop around both.

Counted as cells of four sites in a row, site `(r, c)` being the cell `c` of row `r` that starts at
`x_nu = offset + 2 r + 4 c`, the pattern is an ordinary periodic lattice of `V/4` cells.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from latticeflow.lattice import Shape, check_shape, site_index

CYCLE = 8
"""Layers after which every link has been updated once: 2 directions x 4 offsets."""


@dataclass(frozen=True)
class StripeMask:
    """The stripe pattern of one layer on a lattice whose two extents are multiples of 4.

    Raises ValueError, naming the extents, on a lattice that the pattern cannot tile.
    """

    shape: Shape
    mu: int
    offset: int

    def __post_init__(self) -> None:
        check_tiles(self.shape)

    @property
    def cells(self) -> Shape:
        """Return the extents of the lattice of cells, along mu and along nu."""
        return self.shape[self.mu], self.shape[1 - self.mu] // 4

    def sites(self, column: int) -> Tensor:
        """Return the row-major numbers of the sites `column` steps along nu from each cell's active one, `(V/4,)`."""
        rows, columns = self.cells
        r, c = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
        along_nu = (self.offset + column + 2 * r + 4 * c) % self.shape[1 - self.mu]
        along_mu = r.expand(rows, columns)
        x = (along_mu, along_nu) if self.mu == 0 else (along_nu, along_mu)
        return site_index(self.shape)[x].flatten()

    def active_links(self) -> Tensor:
        """Return the updated links' positions in the flattened `(2, L0, L1)` array, `(V/4,)`."""
        return self.mu * self.shape[0] * self.shape[1] + self.sites(0)

    def frozen_windings(self) -> tuple[Tensor, Tensor]:
        """Return which Polyakov loops each cell sees: of direction nu, and of direction mu, `(V/4,)` each.

        That of direction nu goes through the active link, that of direction mu is the next one, at `x_nu + 1`; those at
        even distance from `offset` hold active links. Numbers are coordinates transverse to the loop.
        """
        rows, columns = self.cells
        r, c = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
        beside = (self.offset + 1 + 2 * r + 4 * c) % self.shape[1 - self.mu]
        return r.expand(rows, columns).flatten(), beside.flatten()

    def neighbours(self, kernel: int, dilation: int = 1) -> Tensor:
        """Return the cells under a `kernel x kernel` window around each cell, `(V/4, kernel^2)`, periodic."""
        reach = dilation * (torch.arange(kernel) - (kernel - 1) // 2)
        return self._window(reach, reach)

    def steps(self, kernel: int, dilation: int = 1) -> Tensor:
        """Return how many sites along mu and along nu the cells of that window are away, `(kernel^2, 2)`."""
        reach = dilation * (torch.arange(kernel) - (kernel - 1) // 2)
        r, c = torch.meshgrid(reach, reach, indexing="ij")
        return torch.stack([r, 2 * r + 4 * c], dim=-1).flatten(0, 1)

    def all_cells(self) -> Tensor:
        """Return all cells in the order of their distance vector from each cell, `(V/4, V/4)`."""
        rows, columns = self.cells
        return self._window(torch.arange(rows), torch.arange(columns))

    def nearest(self, larger: Shape, ahead: int) -> Tensor:
        """Return where the cells that `all_cells` lists are on a larger lattice, as the nearest images, `(V'/4, V/4)`.

        A column has a 1 in the row of that distance vector there, fractions that add up to 1 where several are as near;
        distances are those of sites `ahead` steps along nu of the cells.
        """
        rows, columns = self.cells
        there = StripeMask(larger, self.mu, self.offset)
        weight = torch.zeros(there.cells[0] * there.cells[1], rows * columns)
        for step, (r, c) in enumerate(product(range(rows), range(columns))):
            along_nu = _shortest(2 * r + 4 * c + ahead, self.shape[1 - self.mu])
            images = list(product(_shortest(r, rows), along_nu))
            for i, j in images:
                row = i % there.cells[0]
                column = (j - ahead - 2 * row) // 4 % there.cells[1]
                weight[row * there.cells[1] + column, step] += 1 / len(images)
        return weight

    def _window(self, along_mu: Tensor, along_nu: Tensor) -> Tensor:
        """Return the cells at these steps from each cell.

        Going once around mu moves the cells by half that extent, since each row starts two sites further.
        """
        rows, columns = self.cells
        r = torch.arange(rows)[:, None, None, None] + along_mu[None, None, :, None]
        c = torch.arange(columns)[None, :, None, None] + along_nu[None, None, None, :]
        turns = torch.div(r, rows, rounding_mode="floor")
        c = (c + turns * (rows // 2)) % columns
        return ((r % rows) * columns + c).reshape(rows * columns, -1)


def _shortest(step: int, extent: int) -> list[int]:
    """Return the shortest steps that are this one on a circle: two half a turn away, otherwise one."""
    ahead = step % extent
    return [ahead] if 2 * ahead < extent else [ahead - extent, ahead][: 1 + (2 * ahead == extent)]


def check_tiles(shape: Shape) -> None:
    """Raise ValueError, naming the extents, unless the stripe masks tile the lattice."""
    bad = [extent for extent in check_shape(shape, dimensions=2) if extent % 4]
    if bad:
        raise ValueError(f"stripe masks need extents that are multiples of 4; lattice {list(shape)} has {bad}")


def stripe_cycle(shape: Shape, layers: int) -> list[StripeMask]:
    """Return the masks of `layers` couplings, directions in turn and offsets in the order 0, 2, 1, 3."""
    return [StripeMask(shape, mu=layer % 2, offset=(0, 2, 1, 3)[layer // 2 % 4]) for layer in range(layers)]
