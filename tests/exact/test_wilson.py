"""Free Wilson fermions against printed values and a dense matrix written out by hand."""

import math
from itertools import pairwise

import numpy as np
import pytest

from latticeflow.exact import CRITICAL_KAPPA, hopping_log_det, wilson_free_condensate, wilson_free_log_det

# extent, kappa, log det
TABLE = [
    (4, 0.2, 0.388362462578),
    (4, 0.276, 2.249173177239),
    (8, 0.2, 1.220303533172),
    (8, 0.276, 8.378264936037),
    (16, 0.2, 4.821855056662),
    (16, 0.276, 33.149380370571),
]
GAMMA = np.array([[[0.0, 1.0], [1.0, 0.0]], [[0.0, -1.0j], [1.0j, 0.0]]])
SHAPES = [(2, 2), (4, 4), (3, 5), (6, 2), (1, 3)]


def dense_wilson(links, kappa):
    """The Wilson operator of `links`, shape `(2, L0, L1)`, as a matrix of `2 V` rows, one site and hop at a time."""
    extents = links.shape[1:]
    hops = np.zeros((*extents, 2, *extents, 2), dtype=complex)
    for site in np.ndindex(*extents):
        for mu in (0, 1):
            ahead = list(site)
            ahead[mu] = (site[mu] + 1) % extents[mu]
            boundary = -1.0 if mu == 0 and site[0] == extents[0] - 1 else 1.0
            link = boundary * np.exp(1j * links[mu][site])
            hops[(*site, slice(None), *ahead, slice(None))] += (np.eye(2) - GAMMA[mu]) * link
            hops[(*ahead, slice(None), *site, slice(None))] += (np.eye(2) + GAMMA[mu]) * link.conjugate()
    size = 2 * math.prod(extents)
    return np.eye(size) - kappa * hops.reshape(size, size)


def constant_links(shape, twist):
    return np.stack([np.full(shape, twist[mu] / shape[mu]) for mu in (0, 1)])


def cos_plaquette_sum(links):
    ahead = np.roll(links[1], -1, axis=0), np.roll(links[0], -1, axis=1)
    return np.cos(links[0] + ahead[0] - ahead[1] - links[1]).sum()


@pytest.mark.parametrize(("extent", "kappa", "log_det"), TABLE)
def test_table(extent, kappa, log_det):
    assert wilson_free_log_det(kappa, (extent, extent)) == pytest.approx(log_det, rel=0.0, abs=0.51e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kappa", [0.0, 0.1, 0.276, 0.6, -0.2])
@pytest.mark.parametrize("twist", [(0.0, 0.0), (0.7, -1.3), (math.pi, 2.0), (9.0, 1.0)])
def test_dense_matrix(shape, kappa, twist):
    sign, log_det = np.linalg.slogdet(dense_wilson(constant_links(shape, twist), kappa))
    assert wilson_free_log_det(kappa, shape, twist=twist) == pytest.approx(log_det, abs=1e-11)
    assert sign == pytest.approx(1.0, abs=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kappa", [0.0, 0.1, 0.276])
def test_condensate_of_the_dense_matrix(shape, kappa):
    inverse = np.linalg.inv(dense_wilson(np.zeros((2, *shape)), kappa))
    assert wilson_free_condensate(kappa, shape) == pytest.approx(np.trace(inverse).real / math.prod(shape), abs=1e-12)


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (16, 8)])
@pytest.mark.parametrize("kappa", [0.1, 0.276])
def test_condensate_is_a_derivative_in_kappa(shape, kappa):
    step = 1e-3
    values = [wilson_free_log_det(kappa + k * step, shape) for k in (-2, -1, 1, 2)]
    derivative = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12.0 * step)
    expected = 2.0 - kappa * derivative / math.prod(shape)
    assert wilson_free_condensate(kappa, shape) == pytest.approx(expected, abs=1e-7)


def test_twist_moves_the_momenta():
    assert wilson_free_log_det(0.2, (4, 6), twist=(2.0 * math.pi, -4.0 * math.pi)) == pytest.approx(
        wilson_free_log_det(0.2, (4, 6)), abs=1e-13
    )
    # a temporal phase of pi makes direction 0 periodic; half a turn in direction 1 exchanges the directions
    assert wilson_free_log_det(0.2, (4, 6), twist=(math.pi, math.pi)) == pytest.approx(
        wilson_free_log_det(0.2, (6, 4)), abs=1e-13
    )
    assert wilson_free_log_det(0.2, (4, 6)) != pytest.approx(wilson_free_log_det(0.2, (6, 4)), abs=1e-4)


@pytest.mark.parametrize("shape", [(6, 6), (8, 6)])
def test_hopping_expansion_in_a_random_field(shape):
    links = np.random.default_rng(4).uniform(-math.pi, math.pi, size=(2, *shape))
    total = cos_plaquette_sum(links)
    remainders = []
    for kappa in (0.02, 0.04):
        _, log_det = np.linalg.slogdet(dense_wilson(links, kappa))
        remainders.append(log_det - hopping_log_det(kappa, total))
        assert abs(remainders[-1]) < 0.1 * abs(log_det)
    assert math.log2(remainders[1] / remainders[0]) == pytest.approx(6.0, abs=0.2)


def test_hopping_expansion_of_the_free_field():
    assert hopping_log_det(0.02, 64.0) == pytest.approx(wilson_free_log_det(0.02, (8, 8)), rel=0.02)


def test_hopping_expansion_keeps_shapes():
    sums = np.array([[1.0, -2.0, 0.5]])
    np.testing.assert_allclose(hopping_log_det(0.5, sums), 0.5 * sums, rtol=1e-15)
    assert isinstance(hopping_log_det(0.5, 2.0), float)


def test_critical_kappa_approaches_the_free_value():
    assert sorted(CRITICAL_KAPPA) == [1, 2, 3, 4, 5, 6]
    values = [CRITICAL_KAPPA[beta] for beta in sorted(CRITICAL_KAPPA)]
    assert values == [0.29769, 0.27728, 0.26811, 0.26362, 0.26096, 0.25932]
    assert all(first > second > 0.25 for first, second in pairwise(values))


def test_zero_mode():
    # a temporal twist of pi leaves the constant mode, whose mass vanishes at kappa = 1/4
    for twist in (math.pi, -math.pi):
        assert wilson_free_log_det(0.25, (4, 6), twist=(twist, 0.0)) == -math.inf
    # antiperiodic fermions meet one only at a negative kappa, where both momenta are pi
    with pytest.raises(ValueError, match=r"kappa = -0.25"):
        wilson_free_condensate(-0.25, (3, 2))


@pytest.mark.parametrize("function", [wilson_free_log_det, wilson_free_condensate])
@pytest.mark.parametrize("kappa", [math.nan, math.inf])
def test_bad_kappa_is_named(function, kappa):
    with pytest.raises(ValueError, match=f"kappa = {kappa!r}"):
        function(kappa, (4, 4))


def test_bad_kappa_of_the_hopping_expansion_is_named():
    with pytest.raises(ValueError, match="kappa = nan"):
        hopping_log_det(math.nan, 1.0)


@pytest.mark.parametrize("function", [wilson_free_log_det, wilson_free_condensate])
@pytest.mark.parametrize("shape", [(0, 4), (4, -1), (4,), (4, 4, 4)])
def test_bad_shape_is_named(function, shape):
    with pytest.raises(ValueError, match="shape = "):
        function(0.2, shape)


@pytest.mark.parametrize("twist", [(math.nan, 0.0), (0.0, math.inf), (0.0,), (0.0, 0.0, 0.0)])
def test_bad_twist_is_named(twist):
    with pytest.raises(ValueError, match="twist"):
        wilson_free_log_det(0.2, (4, 4), twist=twist)
