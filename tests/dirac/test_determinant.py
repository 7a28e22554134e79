"""`log|det M|` by cyclic reduction against dense linear algebra, momentum sums and finite differences."""

import itertools
import math

import numpy as np
import pytest
import torch

from latticeflow.dirac import log_abs_det, wilson_matrix
from latticeflow.exact import hopping_log_det, wilson_free_log_det
from latticeflow.u1 import gauge_transform, plaquette, shift_holonomies

SHAPES = [(1, 1), (1, 3), (3, 1), (2, 2), (3, 4), (4, 6), (5, 8), (8, 8), (16, 8), (7, 5), (6, 3)]
SMALL = [(1, 1), (1, 3), (2, 2), (3, 2), (3, 4), (5, 3)]
METHODS = ["cyclic", "dense"]
FREE = {
    (4, 4): {0.2: 0.388362462578, 0.276: 2.249173177239},
    (8, 8): {0.2: 1.220303533172, 0.276: 8.378264936037},
    (16, 16): {0.2: 4.821855056662, 0.276: 33.149380370571},
}


def random_links(shape, *, batch=3, seed=1, roughness=1.0):
    """Haar-uniform links for `roughness` 1, close to unity for a small one; on any branch."""
    generator = torch.Generator().manual_seed(seed)
    links = math.pi * roughness * (2 * torch.rand(batch, 2, *shape, dtype=torch.float64, generator=generator) - 1)
    return links + 2 * math.pi * torch.randint(-2, 3, links.shape, generator=generator).double()


def close(first, second, tolerance=1e-12):
    torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)


def gradients(links, kappa, method, *, twists=None):
    """Gradients of the sum of `log|det M|` in the links and in a kappa for each configuration."""
    leaves = links.clone().requires_grad_(), torch.full((len(links),), kappa, dtype=links.dtype, requires_grad=True)
    value = log_abs_det(*leaves, method, twists=twists)[0].sum()
    return torch.autograd.grad(value, leaves)


@pytest.mark.parametrize("roughness", [1.0, 0.2])
@pytest.mark.parametrize("kappa", [0.0, 0.2, 0.276, 0.45])
@pytest.mark.parametrize("shape", SHAPES)
def test_cyclic_reduction_is_the_dense_determinant(shape, kappa, roughness):
    """To 1e-12; at a kappa far beyond the critical one, elimination loses digits in any order."""
    links = random_links(shape, batch=2, roughness=roughness)
    sign, expected = np.linalg.slogdet(wilson_matrix(links, kappa).numpy())
    for method in METHODS:
        log_abs, sign_found = log_abs_det(links, kappa, method)
        assert log_abs.shape == sign_found.shape == (2,)
        assert log_abs.dtype == torch.float64
        close(log_abs, torch.from_numpy(expected), 1e-12 if kappa < 0.3 else 1e-10)
        assert sign_found.tolist() == np.round(sign.real).tolist()
    assert torch.equal(log_abs_det(links, kappa)[0], log_abs_det(links, kappa, "cyclic")[0])


@pytest.mark.parametrize("kappa", [-0.276, 0.5, 0.6, 1.3])
@pytest.mark.parametrize("shape", [(1, 3), (2, 2), (3, 4), (5, 3)])
def test_any_real_kappa_is_allowed(shape, kappa):
    links = random_links(shape)
    (cyclic, sign), (dense, expected) = (log_abs_det(links, kappa, method) for method in METHODS)
    close(cyclic, dense, 1e-10)
    assert torch.equal(sign, expected)


@pytest.mark.parametrize("shape", [(2, 2), (3, 4), (4, 4), (5, 6)])
@pytest.mark.parametrize("kappa", [0.4, 0.49])
def test_signs_of_rough_fields_agree_and_some_are_negative(shape, kappa):
    links = random_links(shape, batch=256, seed=7)
    log_abs, sign = log_abs_det(links, kappa)
    expected, dense = np.linalg.slogdet(wilson_matrix(links, kappa).numpy())
    assert sign.tolist() == np.round(expected.real).tolist()
    close(log_abs, torch.from_numpy(dense), 1e-10)
    assert {-1.0, 1.0} == set(sign.tolist())


def test_sign_follows_the_real_eigenvalues():
    """A real determinant is negative where an odd number of real eigenvalues is."""
    links = random_links((4, 3), batch=64, seed=8)
    eigenvalues = np.linalg.eigvals(wilson_matrix(links, 0.45).numpy())
    negative = (eigenvalues.real < 0) & (np.abs(eigenvalues.imag) < 1e-9)
    expected = 1 - 2 * (negative.sum(axis=1) % 2)
    assert -1 in expected
    assert log_abs_det(links, 0.45)[1].tolist() == expected.tolist()


@pytest.mark.parametrize("shape", [(1, 3), (2, 2), (3, 4), (4, 3), (7, 5), (8, 8)])
@pytest.mark.parametrize("kappa", [0.2, 0.276])
def test_gradients_of_both_methods_agree(shape, kappa):
    links = random_links(shape, batch=2)
    for cyclic, dense in zip(*(gradients(links, kappa, method) for method in METHODS), strict=True):
        close(cyclic, dense, 1e-10)


@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize("method", METHODS)
def test_gradient_in_the_links_by_finite_differences(shape, method):
    links, step = random_links(shape, batch=2, roughness=0.4), 1e-3
    gradient, _ = gradients(links, 0.276, method)
    for component in itertools.product(*map(range, links.shape[1:])):
        values = []
        for k in (-2, -1, 1, 2):
            moved = links.clone()
            moved[(slice(None), *component)] += k * step
            values.append(log_abs_det(moved, 0.276, method)[0])
        slope = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * step)
        close(gradient[(slice(None), *component)], slope, 1e-8)


@pytest.mark.parametrize("kappa", [0.0, 0.1, 0.276])
@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize("method", METHODS)
def test_gradient_in_kappa_is_a_trace(shape, kappa, method):
    """`d log|det M| / d kappa = -Re Tr M^-1 H` with `M = 1 - kappa H`, at kappa = 0 included."""
    links = random_links(shape, batch=2, roughness=0.4)
    _, slope = gradients(links, kappa, method)
    matrix = wilson_matrix(links, kappa).numpy()
    hopping = np.eye(matrix.shape[-1]) - wilson_matrix(links, 1.0).numpy()
    expected = -np.trace(np.linalg.inv(matrix) @ hopping, axis1=1, axis2=2).real
    close(slope, torch.from_numpy(expected), 1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_kappa_of_each_configuration(method):
    links, kappa = random_links((3, 4)), torch.tensor([0.1, 0.0, 0.3], dtype=torch.float64)
    log_abs, sign = log_abs_det(links, kappa, method)
    assert log_abs.shape == sign.shape == (3,)
    for i in range(3):
        close(log_abs[i], log_abs_det(links[i : i + 1], float(kappa[i]), method)[0][0])
    close(log_abs_det(links, kappa[0], method)[0], log_abs_det(links, 0.1, method)[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 3), (2, 2), (3, 4), (4, 3)])
def test_twists_are_holonomy_shifts_in_time(shape, method):
    links = random_links(shape)
    twists = torch.tensor([0.0, 1.0, math.pi, -2.5, 7.0], dtype=torch.float64)
    log_abs, sign = log_abs_det(links, 0.4, method, twists=twists)
    assert log_abs.shape == sign.shape == (3, 5)
    for i, twist in enumerate(twists):
        expected, expected_sign = log_abs_det(shift_holonomies(links, torch.stack([twist, 0 * twist])), 0.4, method)
        close(log_abs[:, i], expected, 1e-10)
        assert torch.equal(sign[:, i], expected_sign)
    close(log_abs[:, 0], log_abs_det(links, 0.4)[0])
    assert bool(torch.all(log_abs.std(dim=1) > 1e-3))


def test_gradients_with_twists():
    links, twists = random_links((4, 3)), torch.tensor([0.3, 2.0], dtype=torch.float64)
    found, _ = gradients(links, 0.276, "cyclic", twists=twists)
    moved = [shift_holonomies(links, torch.stack([twist, 0 * twist])) for twist in twists]
    close(found, sum(gradients(shifted, 0.276, "dense")[0] for shifted in moved), 1e-10)
    leaf = twists.clone().requires_grad_()
    (slope,) = torch.autograd.grad(log_abs_det(links, 0.276, twists=leaf)[0].sum(), leaf)
    ahead, behind = (log_abs_det(links, 0.276, twists=twists + step)[0].sum(0) for step in (1e-5, -1e-5))
    close(slope, (ahead - behind) / 2e-5, 1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_twists_with_a_kappa_of_each_configuration(method):
    links, twists = random_links((3, 4)), torch.tensor([0.0, 1.0], dtype=torch.float64)
    kappa = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    log_abs, _ = log_abs_det(links, kappa, method, twists=twists)
    assert log_abs.shape == (3, 2)
    for i in range(3):
        close(log_abs[i], log_abs_det(links[i : i + 1], float(kappa[i]), method, twists=twists)[0][0])


@pytest.mark.parametrize("shape", [(2, 2), (3, 4), (8, 8)])
@pytest.mark.parametrize("method", METHODS)
def test_single_precision_is_close_with_finite_gradients(shape, method):
    links = random_links(shape, roughness=0.5)
    log_abs, sign = log_abs_det(links.float(), 0.276, method)
    assert log_abs.dtype == torch.float32
    torch.testing.assert_close(log_abs.double(), log_abs_det(links, 0.276)[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(sign.double(), log_abs_det(links, 0.276)[1])
    for single, double in zip(gradients(links.float(), 0.276, method), gradients(links, 0.276, method), strict=True):
        assert bool(torch.isfinite(single).all())
        torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-3)
    twisted = log_abs_det(links.float(), 0.276, method, twists=torch.tensor([0.0, 1.0]))[0]
    assert twisted.dtype == torch.float32


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(4, 4), (8, 8), (16, 16), (3, 5)])
@pytest.mark.parametrize("kappa", [0.2, 0.276])
def test_free_field(shape, kappa, method):
    log_abs, sign = log_abs_det(torch.zeros(1, 2, *shape, dtype=torch.float64), kappa, method)
    assert float(log_abs[0]) == pytest.approx(wilson_free_log_det(kappa, shape), rel=0, abs=1e-10)
    if shape in FREE:
        assert float(log_abs[0]) == pytest.approx(FREE[shape][kappa], rel=0, abs=1e-10)
    assert float(sign[0]) == 1


@pytest.mark.parametrize("shape", [(1, 4), (3, 5), (6, 4)])
def test_constant_field_is_a_free_field_with_twisted_momenta(shape):
    for twist in ((1.3, 0.0), (0.0, -0.7), (2.9, 0.4)):
        links = torch.zeros(1, 2, *shape, dtype=torch.float64)
        for mu in (0, 1):
            links[:, mu] = twist[mu] / shape[mu]
        expected = wilson_free_log_det(0.276, shape, twist=twist)
        assert float(log_abs_det(links, 0.276)[0]) == pytest.approx(expected, abs=1e-11)
        assert abs(expected - wilson_free_log_det(0.276, shape)) > 1e-3


def test_hopping_expansion():
    """The remainder is of order kappa^6: 64 times as large at twice the kappa."""
    links = random_links((8, 6))
    total = torch.cos(plaquette(links)).sum((1, 2)).numpy()
    remainders = [log_abs_det(links, kappa)[0].numpy() - hopping_log_det(kappa, total) for kappa in (0.015, 0.03)]
    np.testing.assert_allclose(np.log2(remainders[1] / remainders[0]), 6, atol=0.2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kappa", [0.2, 0.276])
def test_gauge_invariance(shape, kappa):
    links = random_links(shape)
    angles = 9 * torch.rand(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    before, after = log_abs_det(links, kappa), log_abs_det(gauge_transform(links, angles), kappa)
    close(after[0], before[0])
    assert torch.equal(after[1], before[1])


def test_large_lattices_do_not_overflow():
    """The determinant itself is beyond the range of double precision."""
    expected = wilson_free_log_det(0.276, (32, 192))
    assert expected > math.log(np.finfo(np.float64).max)
    log_abs, sign = log_abs_det(torch.zeros(1, 2, 32, 192, dtype=torch.float64), 0.276)
    assert float(log_abs[0]) == pytest.approx(expected, rel=1e-12)
    assert float(sign[0]) == 1


@pytest.mark.parametrize("method", ["lu", "", "Cyclic", None])
def test_unknown_method_is_named(method):
    with pytest.raises(ValueError, match=f"method must be 'auto', 'cyclic' or 'dense', got {method!r}"):
        log_abs_det(random_links((2, 2)), 0.2, method)
