"""Masks of sites: two complementary halves, and windows against a construction site by site."""

import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latticeflow.flows import AffineMap, Clamp, Coupling, coupling_flow
from latticeflow.flows.site_masks import MASKS, check_mask, checkerboard, mask_cycle, random_half, stripes, window
from latticeflow.samplers import StabilisedSampler

SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=4).filter(lambda shape: 1 < math.prod(shape) <= 400)
EVEN_SHAPES = st.lists(st.sampled_from([2, 4, 6]), min_size=1, max_size=4).filter(lambda s: math.prod(s) <= 150)


def sites_of(shape):
    return list(itertools.product(*(range(extent) for extent in shape)))


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, kind=st.sampled_from(MASKS))
def test_the_masks_of_a_pair_are_complementary_and_neither_is_empty(shape, kind):
    masks = mask_cycle(kind, shape, 6)
    for even, odd in zip(masks[::2], masks[1::2], strict=True):
        assert even.dtype == torch.bool
        assert tuple(even.shape) == tuple(shape)
        assert torch.equal(odd, ~even)
        assert 0 < even.sum() < even.numel()
        assert torch.equal(check_mask(even), even)


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, parity=st.integers(-2, 5), seed=st.integers(0, 1000))
def test_masks_are_those_of_the_definition(shape, parity, seed):
    board = checkerboard(shape, parity)
    for site in sites_of(shape):
        assert board[site] == (sum(site) % 2 == parity % 2)
    for axis in range(len(shape)):
        mask = stripes(shape, parity, axis=axis)
        assert all(mask[site] == (site[axis] % 2 == parity % 2) for site in sites_of(shape))
    half = random_half(shape, parity, seed=seed)
    assert int(half.sum()) == (math.prod(shape) + (parity + 1) % 2) // 2
    assert torch.equal(half, random_half(shape, parity, seed=seed))
    assert torch.equal(~half, random_half(shape, parity + 1, seed=seed))


def test_random_masks_are_a_new_division_after_each_pair():
    masks = mask_cycle("random", (4, 6), 8)
    divisions = {tuple(mask.flatten().tolist()) for mask in masks}
    assert len(divisions) == 8
    assert all(torch.equal(a, b) for a, b in zip(masks, mask_cycle("random", (4, 6), 8), strict=True))


def test_random_masks_are_the_same_in_every_release():
    """Checkpoints hold no masks."""
    assert random_half((6,), 0, seed=0).int().tolist() == [0, 1, 0, 0, 1, 1]
    assert random_half((2, 3), 1, seed=1).int().tolist() == [[0, 1, 0], [0, 1, 1]]


def test_stripes_take_every_axis_in_turn_but_those_of_one_site():
    masks = mask_cycle("stripes", (4, 1, 6), 6)
    expected = [(0, 0), (1, 0), (0, 2), (1, 2), (0, 0), (1, 0)]
    for mask, (parity, axis) in zip(masks, expected, strict=True):
        assert torch.equal(mask, stripes((4, 1, 6), parity, axis=axis))


def test_checkerboard_in_one_dimension_takes_every_other_variable():
    assert checkerboard((5,), 0).int().tolist() == [1, 0, 1, 0, 1]
    assert checkerboard((5,), 1).int().tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("layers", [0, -1])
@pytest.mark.parametrize("kind", MASKS)
def test_a_cycle_has_one_layer_or_more(kind, layers):
    with pytest.raises(ValueError, match=f"layers must be at least 1, got {layers}"):
        mask_cycle(kind, (4, 4), layers)
    with pytest.raises(ValueError, match=f"layers must be at least 1, got {layers}"):
        coupling_flow((4, 4), layers=layers)


# ---------------------------------------------------------------- windows


def sites_in_window(shape, centre, kernel):
    """Return the different sites of a window, without the code under test."""
    reach = range(-(kernel // 2), kernel // 2 + 1)
    steps = itertools.product(*(reach for _ in shape))
    return {tuple((c + s) % n for c, s, n in zip(centre, step, shape, strict=True)) for step in steps}


@settings(max_examples=40, deadline=None)
@given(
    shape=EVEN_SHAPES,
    kernel=st.sampled_from([1, 3, 5, 7]),
    parity=st.integers(0, 1),
    same=st.booleans(),
    data=st.data(),
)
def test_window_holds_the_members_around_each_centre_once(shape, kernel, parity, same, data):
    axis = data.draw(st.integers(0, len(shape) - 1))
    centres = data.draw(st.sampled_from([checkerboard(shape, parity), stripes(shape, parity, axis=axis)]))
    members = centres if same else ~centres
    if kernel == 1 and not same:
        with pytest.raises(ValueError, match="kernel = 1 sees none of the sites"):
            window(centres, members, kernel)
        return
    table = window(centres, members, kernel)
    centre_sites = [site for site in sites_of(shape) if centres[site]]
    member_sites = [site for site in sites_of(shape) if members[site]]
    assert len(table) == len(centre_sites)
    for row, centre in zip(table.tolist(), centre_sites, strict=True):
        found = [member_sites[position] for position in row]
        assert len(set(found)) == len(found)
        assert set(found) == {site for site in sites_in_window(shape, centre, kernel) if members[site]}


@pytest.mark.parametrize("make", [checkerboard, lambda shape, parity: stripes(shape, parity, axis=1)])
def test_every_place_in_the_window_is_the_same_step_from_all_centres(make):
    """So that one weight belongs to one direction: convolutions commute with translations."""
    shape = (8, 6)
    centres = make(shape, 1)
    table = window(centres, ~centres, 5)
    first, others = centres.nonzero(), (~centres).nonzero()
    steps = (others[table] - first[:, None]) % torch.tensor(shape)
    assert (steps == steps[:1]).all()


@pytest.mark.parametrize("shape", [(6,), (4, 4), (2, 6), (2, 2, 4), (2, 4, 2, 2)])
def test_a_window_wider_than_the_lattice_sees_every_member_once(shape):
    centres = checkerboard(shape, 0)
    for members in (centres, ~centres):
        table = window(centres, members, 9)
        assert table.sort(dim=1).values.tolist() == [list(range(int(members.sum())))] * int(centres.sum())


@pytest.mark.parametrize("kernel", [3, 5])
def test_places_in_the_window_mean_the_same_on_a_larger_lattice(kernel):
    """Weights of a convolution are carried over by their order in the window."""

    def steps(extent):
        centres = checkerboard((extent, extent), 0)
        place = (~centres).nonzero()[window(centres, ~centres, kernel)[0]]
        return ((place + extent // 2) % extent - extent // 2).tolist()

    assert steps(8) == steps(16) == steps(10)


# ---------------------------------------------------------------- what is refused


def coupling(mask, **options):
    return Coupling(mask, AffineMap(Clamp()), **{"hidden": [4], **options})


def uneven(shape):
    """Return a pattern of what is said of a mask that no convolution fits."""
    lattice = re.escape(str(list(shape)))
    return rf"not look the same from all .* lattice {lattice}: .* even extents; a dense conditioner takes any mask"


@pytest.mark.parametrize("shape", [(3, 4), (5,), (4, 3, 5)])
def test_convolutions_of_a_checkerboard_need_even_extents(shape):
    message = uneven(shape)
    with pytest.raises(ValueError, match=message):
        window(checkerboard(shape, 0), ~checkerboard(shape, 0), 3)
    with pytest.raises(ValueError, match=message):
        coupling_flow(shape, layers=2)
    with pytest.raises(ValueError, match=message):
        StabilisedSampler(shape, layers=2)
    assert len(coupling_flow(shape, layers=2, conditioner="dense").layers) == 2


def test_convolutions_of_stripes_need_an_even_extent_along_their_axis_alone():
    coupling(stripes((4, 3), 0, axis=0))
    with pytest.raises(ValueError, match=uneven((4, 3))):
        coupling(stripes((4, 3), 0, axis=1))


def test_convolutions_of_random_masks_are_refused():
    with pytest.raises(ValueError, match=uneven((4, 4))):
        coupling_flow((4, 4), layers=1, mask="random")


def test_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="mask must be one of checkerboard, stripes, random, got 'chess'"):
        mask_cycle("chess", (4, 4), 2)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", [(1,), (1, 1, 1)])
def test_a_single_site_leaves_nothing_to_condition_on(kind, shape):
    with pytest.raises(
        ValueError, match=rf"'{kind}' does not fit the shape \[{shape[0]}.*nothing is left to condition on"
    ):
        mask_cycle(kind, shape, 2)


def test_masks_must_be_boolean():
    with pytest.raises(ValueError, match=r"mask must be boolean, got torch\.int64"):
        coupling(checkerboard((4, 4), 0).long())


@pytest.mark.parametrize("value", [False, True])
def test_masks_need_active_and_frozen_sites(value):
    with pytest.raises(ValueError, match=rf"mask of shape \[4, 2\] has {8 * value} active sites of 8"):
        coupling(torch.full((4, 2), value))


def test_shapes_must_be_positive():
    for make in (
        lambda: checkerboard((4, 0), 0),
        lambda: mask_cycle("stripes", (-2,), 1),
        lambda: mask_cycle("random", (), 1),
    ):
        with pytest.raises(ValueError, match="must hold positive integers"):
            make()


@pytest.mark.parametrize("field_shape", [(4, 6), (6, 4, 1), (24,)])
def test_fields_of_another_shape_are_refused(field_shape):
    layer = coupling(checkerboard((6, 4), 0))
    for direction in (layer.forward, layer.inverse):
        with pytest.raises(ValueError, match=r"mask of shape \[6, 4\] does not fit fields of shape \[3, "):
            direction(torch.zeros(3, *field_shape))


def test_unknown_conditioner_and_transform_are_refused():
    with pytest.raises(ValueError, match="conditioner must be 'convolution' or 'dense', got 'local'"):
        coupling(checkerboard((4, 4), 0), conditioner="local")
    with pytest.raises(ValueError, match="transform must be one of affine, spline, got 'cubic'"):
        coupling_flow((4, 4), layers=1, transform="cubic")


@pytest.mark.parametrize("make", [checkerboard, lambda shape, parity: stripes(shape, parity, axis=1)])
def test_a_window_without_frozen_sites_is_refused(make):
    with pytest.raises(ValueError, match="kernel = 1 sees none of the sites that it is to read"):
        coupling(make((4, 4), 0), kernel=1)
    coupling(make((4, 4), 0), inner_kernel=1)
    coupling(make((4, 4), 0), kernel=1, conditioner="dense")


@pytest.mark.parametrize("kernel", [-3, -1, 0, 2, 4])
@pytest.mark.parametrize("name", ["kernel", "inner_kernel"])
def test_a_kernel_is_odd_and_positive(name, kernel):
    with pytest.raises(ValueError, match=f"kernel must be odd and positive, got {kernel}"):
        coupling(checkerboard((4, 4), 0), **{name: kernel})
