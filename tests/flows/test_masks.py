"""Stripe masks: which links move, which loops do not, and what a translation does to the cells."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from latticeflow.flows.masks import CYCLE, StripeMask, check_tiles, stripe_cycle
from latticeflow.u1 import plaquette

SHAPES = [(4, 4), (8, 8), (4, 8), (8, 4), (12, 8), (4, 16)]
PATTERNS = list(itertools.product((0, 1), range(4)))
ACTIVE, PASSIVE = 0, -1


def coordinates(mask, sites):
    """Return the coordinates of site numbers along (mu, nu)."""
    x0, x1 = torch.div(sites, mask.shape[1], rounding_mode="floor"), sites % mask.shape[1]
    return (x0, x1) if mask.mu == 0 else (x1, x0)


def moved_sites(mask, sites, along_mu, along_nu):
    """Return the numbers of the sites that lie at these periodic displacements."""
    a, b = coordinates(mask, sites)
    a, b = (a + along_mu) % mask.shape[mask.mu], (b + along_nu) % mask.shape[1 - mask.mu]
    x0, x1 = (a, b) if mask.mu == 0 else (b, a)
    return x0 * mask.shape[1] + x1


def masks(shape):
    return [StripeMask(shape, mu=mu, offset=offset) for mu, offset in PATTERNS]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_cycle_updates_every_link_exactly_once(shape):
    links = torch.cat([mask.active_links() for mask in stripe_cycle(shape, CYCLE)])
    assert links.sort().values.tolist() == list(range(2 * shape[0] * shape[1]))
    again = stripe_cycle(shape, 2 * CYCLE)
    assert again[CYCLE:] == again[:CYCLE] == stripe_cycle(shape, CYCLE)


def test_cycle_alternates_directions():
    assert [(mask.mu, mask.offset) for mask in stripe_cycle((4, 8), 5)] == [(0, 0), (1, 0), (0, 2), (1, 2), (0, 1)]
    assert stripe_cycle((4, 4), 0) == []


@pytest.mark.parametrize("shape", SHAPES)
def test_the_four_columns_partition_the_plaquettes(shape):
    for mask in masks(shape):
        rows, columns = mask.cells
        assert rows * columns == shape[0] * shape[1] // 4
        sites = torch.cat([mask.sites(column) for column in (PASSIVE, ACTIVE, 1, 2)])
        assert sites.sort().values.tolist() == list(range(shape[0] * shape[1]))


@pytest.mark.parametrize("shape", SHAPES)
def test_active_sites_satisfy_the_stripe_equation(shape):
    for mask in masks(shape):
        along_mu, along_nu = coordinates(mask, mask.sites(ACTIVE))
        assert ((along_nu - mask.offset - 2 * along_mu) % 4 == 0).all()
        assert (mask.active_links() - mask.mu * shape[0] * shape[1] == mask.sites(ACTIVE)).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_moving_the_active_links_changes_active_and_passive_plaquettes_alone(shape):
    generator = torch.Generator().manual_seed(1)
    links = 2 * math.pi * torch.rand(3, 2, *shape, generator=generator, dtype=torch.float64)
    for mask in masks(shape):
        delta = torch.rand(3, len(mask.active_links()), generator=generator, dtype=torch.float64) + 0.1
        changed = links.flatten(1).index_add(1, mask.active_links(), delta).reshape(links.shape)
        difference = (plaquette(changed) - plaquette(links)).flatten(1)
        sign = 1 if mask.mu == 0 else -1
        assert_close(difference[:, mask.sites(ACTIVE)], sign * delta)
        assert_close(difference[:, mask.sites(PASSIVE)], -sign * delta)
        for frozen in (1, 2):
            assert_close(difference[:, mask.sites(frozen)], torch.zeros_like(delta), rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
def test_columns_are_neighbours_along_nu(shape):
    for mask in masks(shape):
        for column in (-1, 1, 2):
            assert (mask.sites(column) == moved_sites(mask, mask.sites(ACTIVE), 0, column)).all()


@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 1), (3, 2), (5, 1), (3, 5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_neighbours_lie_where_the_lattice_says(shape, kernel, dilation):
    """The window's entry (a, b) of a cell is the cell `a` steps of (1 mu, 2 nu) and `b` steps of (4 nu) away."""
    for mask in masks(shape):
        active = mask.sites(ACTIVE)
        table = mask.neighbours(kernel, dilation).reshape(len(active), kernel, kernel)
        for i, j in itertools.product(range(kernel), repeat=2):
            a, b = dilation * (i - kernel // 2), dilation * (j - kernel // 2)
            assert (active[table[:, i, j]] == moved_sites(mask, active, a, 2 * a + 4 * b)).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_all_cells_are_listed_by_their_distance(shape):
    """Entry (a, b) is again `a` steps of (1 mu, 2 nu) and `b` steps of (4 nu) away; each cell occurs once."""
    for mask in masks(shape):
        active, (rows, columns) = mask.sites(ACTIVE), mask.cells
        table = mask.all_cells()
        assert (table.sort(dim=1).values == torch.arange(len(active))).all()
        for entry, (a, b) in enumerate(itertools.product(range(rows), range(columns))):
            assert (active[table[:, entry]] == moved_sites(mask, active, a, 2 * a + 4 * b)).all()


@pytest.mark.parametrize("step", [(1, 2), (0, 4)])
@pytest.mark.parametrize("shape", SHAPES)
def test_translation_by_one_cell_commutes_with_the_neighbours(shape, step):
    for mask in masks(shape):
        active, table = mask.sites(ACTIVE), mask.neighbours(3)
        cell_of_site = torch.full((shape[0] * shape[1],), -1)
        cell_of_site[active] = torch.arange(len(active))
        translated = cell_of_site[moved_sites(mask, active, *step)]
        assert (translated >= 0).all()
        assert (table[translated] == translated[table]).all()
        assert (mask.all_cells()[translated] == translated[mask.all_cells()]).all()
        assert (table[:, 4] == torch.arange(len(active))).all()


@pytest.mark.parametrize("shape", [(4, 4), (8, 12), (16, 4)])
def test_check_tiles_accepts_multiples_of_four(shape):
    check_tiles(shape)


@pytest.mark.parametrize(
    ("shape", "named"), [((6, 8), r"\[6, 8\] has \[6\]"), ((10, 10), r"\[10, 10\] has \[10, 10\]"), ((4, 2), r"\[2\]")]
)
def test_check_tiles_refuses_and_names_the_extents(shape, named):
    with pytest.raises(ValueError, match=f"multiples of 4.*{named}"):
        check_tiles(shape)
    with pytest.raises(ValueError, match=named):
        StripeMask(shape, mu=0, offset=0)


@pytest.mark.parametrize("shape", [(8,), (4, 4, 4), (0, 4), (-4, 4)])
def test_check_tiles_refuses_what_is_no_two_dimensional_lattice(shape):
    with pytest.raises(ValueError, match="lattice shape"):
        check_tiles(shape)
