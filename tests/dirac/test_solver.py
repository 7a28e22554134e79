"""The cyclic reduction of `M x = b` against dense linear algebra and against the operator itself."""

import math

import pytest
import torch

from latticeflow.dirac import WilsonSolver, apply_wilson, propagator, wilson_matrix

SHAPES = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 5), (7, 1), (3, 4), (4, 3), (5, 6), (6, 2), (8, 8), (13, 3)]


def random_links(shape, *, batch=3, seed=1, roughness=1.0):
    generator = torch.Generator().manual_seed(seed)
    links = math.pi * roughness * (2 * torch.rand(batch, 2, *shape, dtype=torch.float64, generator=generator) - 1)
    return links + 2 * math.pi * torch.randint(-2, 3, links.shape, generator=generator).double()


def random_source(shape, *, batch=3, columns=3, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *shape, 2, columns, dtype=torch.complex128, generator=generator)


def close(first, second, tolerance=1e-11):
    torch.testing.assert_close(first, second, rtol=0, atol=tolerance)


@pytest.mark.parametrize("roughness", [1.0, 0.2])
@pytest.mark.parametrize("kappa", [0.0, 0.2, 0.276, -0.2])
@pytest.mark.parametrize("shape", SHAPES)
def test_solution_is_that_of_the_dense_matrix(shape, kappa, roughness):
    links, source = random_links(shape, roughness=roughness), random_source(shape)
    x = WilsonSolver(links, kappa).solve(source)
    assert x.shape == source.shape
    assert x.dtype == torch.complex128
    expected = torch.linalg.solve(wilson_matrix(links, kappa), source.reshape(3, -1, 3))
    close(x, expected.reshape(source.shape))


@pytest.mark.parametrize("kappa", [0.2, 0.276, 0.4])
@pytest.mark.parametrize("shape", [*SHAPES, (16, 16), (32, 8)])
def test_the_operator_gives_the_source_back(shape, kappa):
    links, source = random_links(shape), random_source(shape)
    x = WilsonSolver(links, kappa).solve(source)
    applied = torch.stack([apply_wilson(links, kappa, column) for column in x.unbind(-1)], dim=-1)
    close(applied, source, 1e-11 if kappa < 0.3 else 1e-9)


def test_one_factorisation_serves_any_number_of_columns():
    links = random_links((4, 3))
    solver = WilsonSolver(links, 0.276)
    source = random_source((4, 3), columns=5)
    together = solver.solve(source)
    for column in range(5):
        close(solver.solve(source[..., column : column + 1]), together[..., column : column + 1], 1e-14)
    close(solver.solve(source), together, 0)


def test_configurations_do_not_mix_and_kappa_may_differ():
    links, source = random_links((3, 4)), random_source((3, 4))
    kappa = torch.tensor([0.1, 0.2, 0.276], dtype=torch.float64)
    together = WilsonSolver(links, kappa).solve(source)
    for i in range(3):
        alone = WilsonSolver(links[i : i + 1], float(kappa[i])).solve(source[i : i + 1])
        close(together[i : i + 1], alone, 1e-14)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 2), (2, 4), (4, 3), (5, 2)])
def test_propagator_is_the_columns_of_the_inverse(shape):
    links = random_links(shape)
    inverse = torch.linalg.inv(wilson_matrix(links, 0.25)).reshape(3, *shape, 2, *shape, 2)
    solver = WilsonSolver(links, 0.25)
    close(propagator(solver, range(shape[0])), inverse)
    for slices in ([0], [shape[0] - 1], [shape[0] - 1, 0]):
        found = propagator(solver, slices)
        assert found.shape == (3, *shape, 2, len(slices), shape[1], 2)
        close(found, inverse[:, :, :, :, slices])


def test_gradients_in_the_links():
    links = random_links((3, 2), batch=1)
    source = random_source((3, 2), batch=1, columns=1)
    assert torch.autograd.gradcheck(lambda theta: WilsonSolver(theta, 0.25).solve(source), (links.requires_grad_(),))


@pytest.mark.parametrize("slices", [[-1], [4], [0, 7]])
def test_slices_outside_the_lattice_are_named(slices):
    with pytest.raises(ValueError, match=r"slices must lie in 0..3, got \["):
        propagator(WilsonSolver(random_links((4, 3)), 0.2), slices)


@pytest.mark.parametrize("shape", [(3, 4, 3, 2), (3, 4, 3, 1, 2), (2, 4, 3, 2, 1), (3, 3, 4, 2, 1)])
def test_wrong_sources_are_named(shape):
    with pytest.raises(ValueError, match=r"source must be \(3, 4, 3, 2, 'columns'\), got"):
        WilsonSolver(random_links((4, 3)), 0.2).solve(torch.zeros(shape, dtype=torch.complex128))


@pytest.mark.parametrize("shape", [(2, 4, 3), (1, 3, 4, 3)])
def test_wrong_links_are_named(shape):
    with pytest.raises(ValueError, match=r"links must be \(batch, 2, L0, L1\), got"):
        WilsonSolver(torch.zeros(shape, dtype=torch.float64), 0.2)
