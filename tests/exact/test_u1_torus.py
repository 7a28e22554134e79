"""Partition function, plaquette and Wilson loops of U(1) on a torus, against printed values and brute force."""

import math

import numpy as np
import pytest
from scipy.special import iv

from latticeflow.exact import u1_charge_distribution, u1_log_z, u1_plaquette, u1_wilson_loop

# extent, beta, <cos P>, log Z
TABLE = [
    (4, 1.0, 0.4463939120, 3.77463471),
    (4, 2.0, 0.6992519268, 13.19019326),
    (8, 2.0, 0.6977746580, 52.73558666),
    (8, 3.0, 0.8099855474, 101.45969057),
    (16, 5.0, 0.8933831370, 845.99853461),
    (16, 7.0, 0.9255322109, 1312.63818627),
]
LOOPS = {1: 0.697775, 2: 0.486889, 4: 0.237061, 9: 0.0392136, 16: 0.00315826}
SHAPES = [(1, 1), (1, 2), (2, 2), (3, 5), (16, 4), (64, 64)]
FUNCTIONS = [u1_log_z, u1_plaquette, lambda beta, shape: u1_wilson_loop(beta, shape, 1)]


def haar_averages(beta, volume, *, area, points=48):
    """`(Z, <cos P>, <W(area)>)` as plain sums over `volume - 1` free plaquettes; the last one closes the torus."""
    grid = 2.0 * math.pi * np.arange(points) / points
    free = np.stack(np.meshgrid(*[grid] * (volume - 1), indexing="ij"), axis=-1).reshape(-1, volume - 1)
    plaquettes = np.concatenate([free, -free.sum(axis=-1, keepdims=True)], axis=-1)
    weight = np.exp(beta * np.cos(plaquettes).sum(axis=-1))
    loop = np.cos(plaquettes[:, :area].sum(axis=-1))
    return weight.mean(), np.average(np.cos(plaquettes).mean(axis=-1), weights=weight), np.average(loop, weights=weight)


@pytest.mark.parametrize(("extent", "beta", "plaquette", "log_z"), TABLE)
def test_table(extent, beta, plaquette, log_z):
    assert u1_plaquette(beta, (extent, extent)) == pytest.approx(plaquette, rel=0.0, abs=0.51e-10)
    assert u1_log_z(beta, (extent, extent)) == pytest.approx(log_z, rel=0.0, abs=0.51e-8)


def test_printed_wilson_loops():
    loops = u1_wilson_loop(2.0, (8, 8), list(LOOPS))
    for found, printed in zip(loops, LOOPS.values(), strict=True):
        assert f"{found:.6g}" == f"{printed:.6g}"


@pytest.mark.parametrize("beta", [0.0, 0.7, 3.0])
@pytest.mark.parametrize("volume", [2, 3, 4])
def test_brute_force_over_plaquettes(beta, volume):
    partition, plaquette, loop = haar_averages(beta, volume, area=2)
    assert u1_log_z(beta, (1, volume)) == pytest.approx(math.log(partition), abs=1e-13)
    assert u1_plaquette(beta, (volume, 1)) == pytest.approx(plaquette, abs=1e-13)
    assert u1_wilson_loop(beta, (1, volume), 2) == pytest.approx(loop, abs=1e-13)


def test_brute_force_over_links():
    """Two plaquettes from four links, so that the Haar measure of links is tested, not only that of plaquettes."""
    grid = 2.0 * math.pi * np.arange(16) / 16
    time_0, time_1, space_0, space_1 = np.meshgrid(grid, grid, grid, grid, indexing="ij")
    # shape (1, 2): direction 0 returns to the same site, so the links of direction 1 cancel
    plaquettes = [time_0 + space_0 - time_1 - space_0, time_1 + space_1 - time_0 - space_1]
    weight = np.exp(0.8 * (np.cos(plaquettes[0]) + np.cos(plaquettes[1])))
    assert u1_log_z(0.8, (1, 2)) == pytest.approx(math.log(weight.mean()), abs=1e-13)


def test_strong_and_weak_coupling():
    assert u1_plaquette(1e-4, (3, 5)) == pytest.approx(0.5e-4, rel=1e-7)
    # one zero mode of the constraint: <1 - cos P> = (1 - 1/V) / (2 beta) + O(1 / beta^2)
    assert 1.0 - u1_plaquette(2000.0, (3, 5)) == pytest.approx(14 / 15 / 4000.0, rel=1e-3)


def test_infinite_volume_limit():
    ratio = iv(1, 2.0) / iv(0, 2.0)
    assert u1_plaquette(2.0, (64, 64)) == pytest.approx(ratio, abs=1e-13)
    assert u1_wilson_loop(2.0, (64, 64), 5) == pytest.approx(ratio**5, abs=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("beta", [0.3, 2.0, 30.0, 200.0])
def test_plaquette_is_the_derivative_of_log_z(beta, shape):
    step = 1e-2
    values = [u1_log_z(beta + k * step, shape) for k in (-2, -1, 1, 2)]
    derivative = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12.0 * step)
    assert u1_plaquette(beta, shape) == pytest.approx(derivative / math.prod(shape), abs=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("beta", [0.0, 0.3, 2.0, 200.0])
def test_wilson_loop_of_one_plaquette_and_of_the_whole_torus(beta, shape):
    volume = math.prod(shape)
    loops = u1_wilson_loop(beta, shape, [0, 1, volume - 1, volume])
    assert loops[1] == pytest.approx(u1_plaquette(beta, shape), abs=1e-13)
    np.testing.assert_allclose(loops[[0, 3]], 1.0, atol=1e-13)
    assert loops[2] == pytest.approx(loops[1], abs=1e-13)  # the loop seen from the other side


def test_area_law_and_shapes_of_the_result():
    areas = np.arange(12).reshape(3, 4)
    loops = u1_wilson_loop(2.0, (8, 6), areas)
    assert loops.shape == areas.shape
    assert np.all(np.diff(loops.ravel()) < 0.0)
    assert isinstance(u1_wilson_loop(2.0, (8, 6), 3), float)
    assert u1_wilson_loop(2.0, (8, 6), np.int64(3)) == loops[0, 3]


def test_only_the_volume_matters():
    assert u1_log_z(1.3, (3, 5)) == u1_log_z(1.3, (15, 1)) == u1_log_z(1.3, (5, 3))
    assert u1_log_z(1.3, (3, 5)) != u1_log_z(1.3, (4, 4))


def test_haar_limit_is_exact():
    assert u1_log_z(0.0, (4, 4)) == 0.0
    assert u1_plaquette(0.0, (4, 4)) == 0.0
    assert u1_wilson_loop(0.0, (4, 4), [0, 3, 16]).tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 5), (8, 8)])
@pytest.mark.parametrize("vartheta", [0.1, 2.0, math.pi, -2.0, 2.0 + 4.0 * math.pi])
def test_vacuum_angle_sums_the_charge_sectors(shape, vartheta):
    charges, probabilities = u1_charge_distribution(1.2, shape)
    difference = u1_log_z(1.2, shape, vartheta=vartheta) - u1_log_z(1.2, shape)
    assert math.exp(difference) == pytest.approx(probabilities @ np.cos(vartheta * charges), abs=1e-13)


def test_vacuum_angle_where_the_sum_over_sectors_has_no_digits_left():
    # at beta = 0, f(t) = sin(pi t) / (pi t); at vartheta = pi the orders 1/2 and -1/2 are all that counts
    expected = 4096 * math.log(2.0 / math.pi) + math.log(2.0)
    assert u1_log_z(0.0, (64, 64), vartheta=math.pi) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("beta", [-0.1, math.nan, math.inf, -math.inf, 1e7])
def test_bad_beta_is_named(function, beta):
    with pytest.raises(ValueError, match=f"beta = {beta!r}"):
        function(beta, (4, 4))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(0, 4), (4, -1), (4,), (4, 4, 4), (4.0, 4), ()])
def test_bad_shape_is_named(function, shape):
    with pytest.raises(ValueError, match="shape = "):
        function(1.0, shape)


@pytest.mark.parametrize("area", [-1, 17, 1.5, [1, 17], [0.5]])
def test_bad_area_is_named(area):
    with pytest.raises(ValueError, match="area = "):
        u1_wilson_loop(1.0, (4, 4), area)


@pytest.mark.parametrize("vartheta", [math.nan, math.inf])
def test_bad_vacuum_angle_is_named(vartheta):
    with pytest.raises(ValueError, match="vartheta = "):
        u1_log_z(1.0, (4, 4), vartheta=vartheta)
