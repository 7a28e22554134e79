"""Fermionic observables against the dense inverse and the momentum sums of the free field."""

import math

import numpy as np
import pytest
import torch

from latticeflow.dirac import wilson_matrix
from latticeflow.exact import wilson_free_condensate, wilson_free_log_det
from latticeflow.observables import fermion
from latticeflow.u1 import random_gauge_transform

SHAPES = [(1, 1), (1, 3), (2, 2), (3, 4), (5, 3), (4, 4)]


def random_links(shape, *, batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 2 * math.pi * torch.rand(batch, 2, *shape, dtype=torch.float64, generator=generator)


def dense_condensate(links, kappa):
    """`Re Tr M^-1 / V` and the imaginary part, which vanishes by `g_5` hermiticity."""
    inverse = np.linalg.inv(wilson_matrix(links, kappa).numpy())
    trace = np.trace(inverse, axis1=1, axis2=2) / math.prod(links.shape[-2:])
    np.testing.assert_allclose(trace.imag, 0, atol=1e-10 * np.abs(inverse).max())
    return trace.real


@pytest.mark.parametrize("kappa", [0.0, 1e-3, 0.2, 0.276, 0.4])
@pytest.mark.parametrize("shape", SHAPES)
def test_condensate_is_the_trace_of_the_inverse(shape, kappa):
    links = random_links(shape)
    values = fermion.condensate(links, kappa)
    assert values.shape == (3,)
    assert not values.requires_grad
    np.testing.assert_allclose(values.numpy(), dense_condensate(links, kappa), rtol=1e-10, atol=1e-10)


def test_condensate_without_hopping_counts_the_spins():
    assert fermion.condensate(random_links((3, 4)), 0.0).tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("kappa", [0.0, 0.2, 0.276])
@pytest.mark.parametrize("shape", [(2, 2), (3, 5), (8, 8)])
def test_free_field(shape, kappa):
    links = torch.zeros(1, 2, *shape, dtype=torch.float64)
    assert float(fermion.condensate(links, kappa)) == pytest.approx(wilson_free_condensate(kappa, shape), abs=1e-10)
    assert float(fermion.log_det(links, kappa)) == pytest.approx(wilson_free_log_det(kappa, shape), abs=1e-11)


@pytest.mark.parametrize("kappa", [0.0, 0.2, 0.45])
@pytest.mark.parametrize("shape", SHAPES)
def test_log_det_is_that_of_the_dense_matrix(shape, kappa):
    links = random_links(shape)
    expected = np.linalg.slogdet(wilson_matrix(links, kappa).numpy())[1]
    np.testing.assert_allclose(fermion.log_det(links, kappa).numpy(), expected, rtol=1e-12, atol=1e-12)


def test_gradients_around_the_call_do_not_matter():
    """Neither `no_grad` outside nor links that carry gradients change the condensate or leave a gradient behind."""
    links = random_links((3, 4))
    expected = fermion.condensate(links, 0.25)
    with torch.no_grad():
        assert torch.equal(fermion.condensate(links, 0.25), expected)
    leaf = links.clone().requires_grad_()
    assert torch.equal(fermion.condensate(leaf, 0.25), expected)
    assert leaf.grad is None


@pytest.mark.parametrize("observable", [fermion.condensate, fermion.log_det])
def test_gauge_invariance_charge_conjugation_and_batches(observable):
    links = random_links((3, 4))
    values = observable(links, 0.25)
    moved = random_gauge_transform(links, torch.Generator().manual_seed(2))
    for same in (moved, -links, links + 2 * math.pi):
        torch.testing.assert_close(observable(same, 0.25), values, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(observable(links[1:2], 0.25), values[1:2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("observable", [fermion.condensate, fermion.log_det])
def test_single_precision(observable):
    links = 0.3 * random_links((3, 4))
    values = observable(links.float(), 0.25)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), observable(links, 0.25), rtol=1e-4, atol=1e-4)
