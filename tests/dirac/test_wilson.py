"""The Wilson-Dirac matrix against the definition written out site by site, and its symmetries."""

import itertools
import math

import numpy as np
import pytest
import torch

from latticeflow.dirac import apply_wilson, wilson_matrix
from latticeflow.u1 import gauge_transform

SHAPES = [(1, 1), (1, 3), (3, 1), (2, 2), (2, 3), (3, 4), (4, 4)]
SIGMA = np.array([[[0, 1], [1, 0]], [[0, -1j], [1j, 0]], [[1, 0], [0, -1]]])


def random_links(shape, *, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 2 * math.pi * torch.rand(batch, 2, *shape, dtype=torch.float64, generator=generator) - math.pi


def random_spinor(shape, *, batch=2, seed=2):
    return torch.randn(batch, *shape, 2, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed))


def explicit_matrix(links, kappa):
    """M of one configuration `(2, L0, L1)` by a loop over sites and directions; hops that coincide are added."""
    _, *shape = links.shape
    size = math.prod(shape)
    matrix = np.eye(2 * size, dtype=complex)
    for site in itertools.product(*map(range, shape)):
        for mu in (0, 1):
            ahead = list(site)
            ahead[mu] = (ahead[mu] + 1) % shape[mu]
            crosses = mu == 0 and site[0] == shape[0] - 1
            link = np.exp(1j * links[(mu, *site)]) * (-1 if crosses else 1)
            x, y = (2 * (s[0] * shape[1] + s[1]) for s in (site, ahead))
            matrix[x : x + 2, y : y + 2] -= kappa * (np.eye(2) - SIGMA[mu]) * link
            matrix[y : y + 2, x : x + 2] -= kappa * (np.eye(2) + SIGMA[mu]) * np.conj(link)
    return matrix


def blocks(matrix, x, y, shape):
    """The 2x2 spin block of a matrix from site y to site x."""
    rows, columns = (2 * (s[0] * shape[1] + s[1]) for s in (x, y))
    return matrix[rows : rows + 2, columns : columns + 2]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kappa", [0.0, 0.2, 0.276, -0.3, 0.7])
def test_matrix_site_by_site(shape, kappa):
    links = random_links(shape)
    matrix = wilson_matrix(links, kappa)
    assert matrix.shape == (2, 2 * math.prod(shape), 2 * math.prod(shape))
    assert matrix.dtype == torch.complex128
    for field, dense in zip(links.numpy(), matrix.numpy(), strict=True):
        np.testing.assert_allclose(dense, explicit_matrix(field, kappa), rtol=0, atol=1e-14)


def test_gamma_algebra_of_the_hops():
    """With unit links the two hops of a direction hold `1 - g` and `1 + g`."""
    matrix = wilson_matrix(torch.zeros(1, 2, 4, 4, dtype=torch.float64), 0.2)[0].numpy()
    gammas = []
    for mu, ahead in ((0, (2, 1)), (1, (1, 2))):
        forward = blocks(matrix, (1, 1), ahead, (4, 4)) / -0.2
        backward = blocks(matrix, ahead, (1, 1), (4, 4)) / -0.2
        np.testing.assert_allclose(forward + backward, 2 * np.eye(2), atol=1e-15)
        np.testing.assert_allclose(forward @ forward, 2 * forward, atol=1e-15)  # a projector, times two
        np.testing.assert_allclose(forward @ backward, np.zeros((2, 2)), atol=1e-15)
        gammas.append((backward - forward) / 2)
        np.testing.assert_allclose(gammas[mu], SIGMA[mu], atol=1e-15)
    np.testing.assert_allclose(gammas[0] @ gammas[1] + gammas[1] @ gammas[0], np.zeros((2, 2)), atol=1e-15)
    np.testing.assert_allclose(-1j * gammas[0] @ gammas[1], SIGMA[2], atol=1e-15)


@pytest.mark.parametrize("shape", SHAPES)
def test_gamma5_hermiticity(shape):
    matrix = wilson_matrix(random_links(shape), 0.276)
    gamma5 = torch.tensor([1.0, -1.0], dtype=torch.complex128).repeat(math.prod(shape))
    torch.testing.assert_close(gamma5[:, None] * matrix * gamma5, matrix.mH, rtol=0, atol=1e-15)
    assert not torch.allclose(matrix, matrix.mH)


def test_time_is_antiperiodic_and_space_periodic():
    unit = torch.zeros(1, 2, 4, 3, dtype=torch.float64)
    matrix = wilson_matrix(unit, 0.25)[0].numpy()
    inside, across = (blocks(matrix, (x0, 0), ((x0 + 1) % 4, 0), (4, 3)) for x0 in (0, 3))
    np.testing.assert_allclose(across, -inside, atol=1e-15)
    inside, across = (blocks(matrix, (0, x1), (0, (x1 + 1) % 3), (4, 3)) for x1 in (0, 2))
    np.testing.assert_allclose(across, inside, atol=1e-15)
    assert np.abs(inside).max() == pytest.approx(0.25)


def test_hops_of_an_extent_of_two_add():
    """In space `(1 - g_1) U + (1 + g_1) U'^*`, in time the same with a minus sign for the one that crosses."""
    links = random_links((2, 2), batch=1)
    phases, matrix = np.exp(1j * links[0].numpy()), wilson_matrix(links, 0.2)[0].numpy()
    one = np.eye(2)
    space = (one - SIGMA[1]) * phases[1, 0, 0] + (one + SIGMA[1]) * phases[1, 0, 1].conj()
    time = (one - SIGMA[0]) * phases[0, 0, 0] - (one + SIGMA[0]) * phases[0, 1, 0].conj()
    np.testing.assert_allclose(blocks(matrix, (0, 0), (0, 1), (2, 2)), -0.2 * space, atol=1e-15)
    np.testing.assert_allclose(blocks(matrix, (0, 0), (1, 0), (2, 2)), -0.2 * time, atol=1e-15)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kappa", [0.0, 0.276, 0.6])
def test_apply_is_the_matrix_product(shape, kappa):
    links, spinor = random_links(shape), random_spinor(shape)
    product = torch.einsum("bij,bj->bi", wilson_matrix(links, kappa), spinor.reshape(2, -1))
    applied = apply_wilson(links, kappa, spinor)
    assert applied.shape == spinor.shape
    torch.testing.assert_close(applied.reshape(2, -1), product, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
def test_gauge_covariance(shape):
    """`M[U'] = G M[U] G^*` with `G = exp(i alpha)`."""
    links = random_links(shape)
    angles = 5 * torch.rand(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    phase = torch.polar(torch.ones_like(angles), angles).flatten(1).repeat_interleave(2, dim=1)
    expected = phase[:, :, None] * wilson_matrix(links, 0.276) * phase.conj()[:, None, :]
    matrix = wilson_matrix(gauge_transform(links, angles), 0.276)
    torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-14)


def test_charge_conjugation_is_complex_conjugation_between_sigmas():
    """`C M[U^*] C^-1 = M[U]^T` with `C g_mu C^-1 = -g_mu^T`, so `C = sigma_2`."""
    links = random_links((3, 4))
    charge = torch.kron(torch.eye(12, dtype=torch.complex128), torch.from_numpy(SIGMA[1]))
    conjugate = charge @ wilson_matrix(-links, 0.276) @ charge
    torch.testing.assert_close(conjugate, wilson_matrix(links, 0.276).mT, rtol=0, atol=1e-14)


def test_single_precision_links_give_a_single_precision_matrix():
    links, spinor = random_links((3, 4)), random_spinor((3, 4))
    single = wilson_matrix(links.float(), 0.276)
    assert single.dtype == torch.complex64
    torch.testing.assert_close(single.to(torch.complex128), wilson_matrix(links, 0.276), rtol=0, atol=1e-6)
    applied = apply_wilson(links.float(), 0.276, spinor.to(torch.complex64))
    assert applied.dtype == torch.complex64
    torch.testing.assert_close(applied.to(torch.complex128), apply_wilson(links, 0.276, spinor), rtol=0, atol=1e-5)


def test_apply_is_differentiable_in_links_and_spinor():
    links, spinor = random_links((2, 3), batch=1), random_spinor((2, 3), batch=1)
    assert torch.autograd.gradcheck(
        lambda theta, psi: apply_wilson(theta, 0.276, psi), (links.requires_grad_(), spinor.requires_grad_())
    )


@pytest.mark.parametrize("batch", [2, 4])
def test_kappa_of_each_configuration(batch):
    links, spinor = random_links((3, 4), batch=batch), random_spinor((3, 4), batch=batch)
    kappa = torch.linspace(0.1, 0.3, batch, dtype=torch.float64)
    applied = apply_wilson(links, kappa, spinor)
    for i in range(batch):
        expected = apply_wilson(links[i : i + 1], float(kappa[i]), spinor[i : i + 1])
        torch.testing.assert_close(applied[i : i + 1], expected)
