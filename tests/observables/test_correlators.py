"""Meson correlators and the connected chiral susceptibility against the dense inverse, momentum sums and PHYSICS."""

import math

import numpy as np
import pytest
import torch

from latticeflow.actions import SchwingerAction
from latticeflow.dirac import wilson_matrix
from latticeflow.observables import effective_mass, fermion
from latticeflow.observables.derived import pcac_mass
from latticeflow.priors import QuenchedU1
from latticeflow.u1 import random_gauge_transform

SHAPES = [(1, 1), (1, 3), (2, 1), (2, 2), (2, 4), (3, 2), (4, 6), (6, 4), (5, 3), (8, 4)]
MESONS = [fermion.pion_correlator, fermion.axial_correlator, fermion.eta_disconnected]
ALL = [*MESONS, fermion.chiral_susceptibility_connected]
SIGMA = np.array([[[0, 1], [1, 0]], [[0, -1j], [1j, 0]], [[1, 0], [0, -1]]])


def random_links(shape, *, batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 2 * math.pi * torch.rand(batch, 2, *shape, dtype=torch.float64, generator=generator)


def dense_correlators(links, kappa):
    """The three correlators by traces over the dense inverse, one source slice and one distance after the other."""
    shape = links.shape[-2:]
    extent, volume = shape[0], math.prod(shape)
    inverse = np.linalg.inv(wilson_matrix(links, kappa).numpy()).reshape(-1, *shape, 2, *shape, 2)
    pion, axial, eta = (np.zeros((len(links), extent), dtype=complex) for _ in range(3))
    trace = np.einsum("ij,btxjtxi->bt", SIGMA[2], inverse)
    for t0 in range(extent):
        for t in range(extent):
            block = inverse[:, (t0 + t) % extent, :, :, t0]
            pion[:, t] += np.einsum("bxiyj,bxiyj->b", block, block.conj()) / volume
            axial[:, t] += np.einsum("ij,bxjyk,bxiyk->b", SIGMA[0], block, block.conj()) / volume
            eta[:, t] += trace[:, (t0 + t) % extent] * trace[:, t0] / volume
    distances = np.arange(extent // 2 + 1)
    back = -distances % extent
    return (
        (pion[:, distances] + pion[:, back]) / 2,
        (axial[:, distances] - axial[:, back]) / 2,
        (eta[:, distances] + eta[:, back]) / 2,
    )


@pytest.mark.parametrize("kappa", [0.0, 0.2, 0.276])
@pytest.mark.parametrize("shape", SHAPES)
def test_correlators_are_those_of_the_dense_inverse(shape, kappa):
    links = random_links(shape)
    for observable, expected in zip(MESONS, dense_correlators(links, kappa), strict=True):
        found = observable(links, kappa)
        assert found.shape == (3, shape[0] // 2 + 1)
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kappa", [0.0, 1e-3, 0.2, 0.276, 0.4])
@pytest.mark.parametrize("shape", SHAPES)
def test_connected_susceptibility_is_the_trace_of_the_squared_inverse(shape, kappa):
    """At kappa 0.4 one of these fields has a nearly singular block, whose second derivatives lose seven digits."""
    links = random_links(shape)
    inverse = np.linalg.inv(wilson_matrix(links, kappa).numpy())
    expected = -np.einsum("bij,bji->b", inverse, inverse).real / math.prod(shape)
    found = fermion.chiral_susceptibility_connected(links, kappa)
    assert found.shape == (3,)
    assert not found.requires_grad
    accuracy = 1e-7 if kappa == 0.4 else 1e-9
    np.testing.assert_allclose(found.numpy(), expected, rtol=accuracy, atol=accuracy)


def test_connected_susceptibility_is_the_slope_of_the_condensate():
    """`M + m = (1 + m)(1 - kappa/(1 + m) H)`, so the condensate at mass m is known from `kappa / (1 + m)`."""
    links, kappa, step = random_links((4, 6)), 0.25, 1e-4

    def at_mass(mass):
        return fermion.condensate(links, kappa / (1 + mass)) / (1 + mass)

    slope = (at_mass(step) - at_mass(-step)) / (2 * step)
    torch.testing.assert_close(fermion.chiral_susceptibility_connected(links, kappa), slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("observable", ALL)
@pytest.mark.parametrize("shape", [(3, 4), (4, 6)])
def test_symmetries_and_batches(observable, shape):
    """Gauge transformations, charge conjugation and translations, across the antiperiodic boundary too."""
    links = random_links(shape)
    values = observable(links, 0.25)
    moved = random_gauge_transform(links, torch.Generator().manual_seed(2))
    for same in (moved, -links, links + 2 * math.pi, links.roll(1, -1), links.roll(2, -2)):
        torch.testing.assert_close(observable(same, 0.25), values, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(observable(links[1:2], 0.25), values[1:2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("observable", ALL)
def test_links_may_carry_gradients(observable):
    links = random_links((2, 3))
    expected = observable(links, 0.25)
    found = observable(links.clone().requires_grad_(), 0.25)
    assert not found.requires_grad
    assert torch.equal(found, expected)
    with torch.no_grad():
        assert torch.equal(observable(links, 0.25), expected)


# ---------------------------------------------------------------- free field


def free_propagator(kappa, shape):
    """`S(t, p_1)` of the free field, `(L0, L1, 2, 2)`, by the sum over the antiperiodic time momenta."""
    p0 = 2 * np.pi * (np.arange(shape[0]) + 0.5) / shape[0]
    p1 = 2 * np.pi * np.arange(shape[1]) / shape[1]
    mass = 1 - 2 * kappa * (np.cos(p0)[:, None] + np.cos(p1))
    sines = 2 * kappa * np.stack(np.broadcast_arrays(np.sin(p0)[:, None], np.sin(p1)))
    spin = mass[..., None, None] * np.eye(2) - 1j * np.einsum("mpq,mij->pqij", sines, SIGMA[:2])
    spin /= (mass**2 + (sines**2).sum(0))[..., None, None]
    waves = np.exp(1j * np.outer(np.arange(shape[0]), p0)) / shape[0]
    return np.einsum("tp,pqij->tqij", waves, spin)


def free_correlators(kappa, shape):
    links = torch.zeros(1, 2, *shape, dtype=torch.float64)
    return [observable(links, kappa)[0].numpy() for observable in MESONS]


@pytest.mark.parametrize("kappa", [0.15, 0.24, 0.276])
@pytest.mark.parametrize("shape", [(2, 2), (4, 6), (6, 4), (5, 3), (12, 8)])
def test_free_field(shape, kappa):
    pion, axial, eta = free_correlators(kappa, shape)
    s = free_propagator(kappa, shape)[: shape[0] // 2 + 1]
    np.testing.assert_allclose(pion, (np.abs(s) ** 2).sum((1, 2, 3)) / shape[1], rtol=1e-11)
    expected = np.einsum("ij,tpjk,tpik->t", SIGMA[0], s, s.conj()).real / shape[1]
    np.testing.assert_allclose(axial, expected, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(eta, 0, atol=1e-20)


@pytest.mark.parametrize("extent", [24, 25])
@pytest.mark.parametrize("kappa", [0.22, 0.24, 0.245, 0.255])
def test_pcac_mass_of_the_free_field(kappa, extent):
    """Far from the source it is `sinh(2 log(1 + m_0)) / 2`, which is `m_0` up to lattice artefacts, sign included."""
    pion, axial, _ = free_correlators(kappa, (extent, 8))
    bare = 1 / (2 * kappa) - 2
    mass = pcac_mass(pion, axial, extent=extent)
    assert mass.shape == (extent // 2,)
    assert mass[-1] == pytest.approx(math.sinh(2 * math.log1p(bare)) / 2, abs=1e-4)
    assert mass[-1] == pytest.approx(bare, rel=0.1)
    assert np.ptp(mass[-3:]) < 1e-3


def test_pion_mass_of_the_free_field():
    """Two quarks at rest: a cosh from each, so the mass tends to twice `log(1 + m_0)`."""
    pion, _, _ = free_correlators(0.2, (32, 4))
    assert effective_mass(pion)[-1] == pytest.approx(2 * math.log(1.5), rel=0.02)


# ---------------------------------------------------------------- interacting


def test_pion_correlator_of_the_schwinger_model():
    """Reweighted quenched draws at 8x8 within 4 combined deviations of PHYSICS, section 4: 3e-4 for five distances."""
    action, prior = SchwingerAction(2.0, 0.276), QuenchedU1(2.35, (8, 8), sector=0.6)
    links = prior.sample(3000, torch.Generator().manual_seed(5))
    weights = torch.softmax(-action(links) - prior.log_prob(links), dim=0)[:, None]
    pion = torch.cat([fermion.pion_correlator(part, 0.276) for part in links.split(256)])
    mean = (weights * pion).sum(0)
    error = torch.sqrt((weights**2 * (pion - mean) ** 2).sum(0))
    trusted = torch.tensor([2.397, 1.103, 0.727, 0.567, 0.520], dtype=torch.float64)
    trusted_error = torch.tensor([0.008, 0.006, 0.005, 0.004, 0.004], dtype=torch.float64)
    assert float(error.max()) < 0.05
    assert float(((mean - trusted) / torch.hypot(error, trusted_error)).abs().max()) < 4
