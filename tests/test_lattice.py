"""Geometry against NumPy loops: neighbours, numbering and sums for one to three dimensions and any extents."""

import itertools

import numpy as np
import pytest
import torch

from latticeflow.lattice import check_shape, shift, site_index, site_mean, site_sum, volume

SHAPES = [(1,), (5,), (1, 1), (2, 1), (3, 5), (4, 4), (2, 3, 4), (2, 1, 3)]


def random_field(shape, *, leading=(2,), seed=1):
    return torch.randn(*leading, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_check_shape_returns_a_tuple(shape):
    assert check_shape(list(shape)) == shape
    assert check_shape(shape, dimensions=len(shape)) == shape
    assert isinstance(check_shape(list(shape)), tuple)


@pytest.mark.parametrize("shape", [(), (0,), (4, -1), (2.0, 2), ("4", 4), (4, None)])
def test_bad_extents_are_named(shape):
    with pytest.raises(ValueError, match=r"must hold positive integers") as caught:
        check_shape(shape)
    assert str(list(shape)) in str(caught.value)


@pytest.mark.parametrize("shape", [(4,), (4, 4, 4), ()])
def test_wrong_number_of_extents_is_named(shape):
    with pytest.raises(ValueError, match=f"has {len(shape)} extents, expected 2") as caught:
        check_shape(shape, dimensions=2)
    assert str(list(shape)) in str(caught.value)


@pytest.mark.parametrize("shape", SHAPES)
def test_volume_and_site_index_count_the_sites_in_row_major_order(shape):
    sites = list(itertools.product(*map(range, shape)))
    assert volume(shape) == len(sites)
    index = site_index(shape)
    assert index.shape == shape
    assert [int(index[site]) for site in sites] == list(range(len(sites)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [-7, -1, 0, 1, 2, 5])
def test_shift_is_the_field_that_many_steps_ahead(shape, steps):
    field = random_field(shape, leading=(2, 3))
    for mu in range(len(shape)):
        shifted = shift(field, mu, steps, dimensions=len(shape))
        for site in itertools.product(*map(range, shape)):
            ahead = tuple((x + steps * (nu == mu)) % shape[nu] for nu, x in enumerate(site))
            assert torch.equal(shifted[(..., *site)], field[(..., *ahead)])


def test_shift_is_by_one_in_two_dimensions_unless_told():
    field = random_field((3, 5))
    for mu in (0, 1):
        assert torch.equal(shift(field, mu), shift(field, mu, 1, dimensions=2))
        assert not torch.equal(shift(field, mu), field)


@pytest.mark.parametrize("shape", SHAPES)
def test_sum_and_mean_keep_the_leading_axes(shape):
    field = random_field(shape, leading=(2, 3))
    total, mean = site_sum(field, len(shape)), site_mean(field, len(shape))
    assert total.shape == mean.shape == (2, 3)
    for batch in itertools.product(range(2), range(3)):
        expected = sum(float(field[batch + site]) for site in itertools.product(*map(range, shape)))
        np.testing.assert_allclose(float(total[batch]), expected, rtol=0, atol=1e-13)
        np.testing.assert_allclose(float(mean[batch]), expected / volume(shape), rtol=0, atol=1e-13)


def test_sum_and_mean_are_over_two_dimensions_unless_told():
    field = random_field((3, 5), leading=(2,))
    assert torch.equal(site_sum(field), site_sum(field, 2))
    assert torch.equal(site_mean(field), site_mean(field, 2))
    assert site_sum(field).shape == (2,)
