"""Gauge observables against NumPy loops, exact means and their symmetries."""

import itertools
import math

import numpy as np
import pytest
import torch

from latticeflow.exact import u1_plaquette, u1_susceptibility, u1_wilson_loop
from latticeflow.observables import gauge
from latticeflow.priors import QuenchedU1
from latticeflow.u1 import random_gauge_transform, shift_holonomies, wilson_loop

SHAPES = [(1, 1), (1, 3), (2, 2), (3, 5), (4, 4)]
ALL = [gauge.plaquette, gauge.charge, gauge.charge_squared, gauge.susceptibility]


def random_links(shape, *, batch=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 2 * math.pi * torch.rand(batch, 2, *shape, dtype=torch.float64, generator=generator)


def angles_by_loops(links):
    """Plaquette angles of one configuration `(2, L0, L1)`, as a flat list."""
    _, extent0, extent1 = links.shape
    return [
        links[0, x, y] + links[1, (x + 1) % extent0, y] - links[0, x, (y + 1) % extent1] - links[1, x, y]
        for x, y in itertools.product(range(extent0), range(extent1))
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_values_by_loops(shape):
    links = random_links(shape)
    plaquette, charge = gauge.plaquette(links), gauge.charge(links)
    squared, susceptibility = gauge.charge_squared(links), gauge.susceptibility(links)
    for b, field in enumerate(links.numpy()):
        angles = np.array(angles_by_loops(field))
        winding = np.round(((angles + math.pi) % (2 * math.pi) - math.pi).sum() / (2 * math.pi))
        assert float(plaquette[b]) == pytest.approx(np.cos(angles).mean(), abs=1e-13)
        assert float(charge[b]) == winding
        assert float(squared[b]) == winding**2
        assert float(susceptibility[b]) == pytest.approx(winding**2 / math.prod(shape), abs=1e-15)
    assert (len(charge.unique()) > 1) == (math.prod(shape) > 2)


@pytest.mark.parametrize("observable", ALL)
def test_one_number_per_configuration_and_gauge_invariant(observable):
    links = random_links((3, 5))
    values = observable(links)
    assert values.shape == (16,)
    assert values.dtype == torch.float64
    moved = random_gauge_transform(links, torch.Generator().manual_seed(2))
    torch.testing.assert_close(observable(moved), values, rtol=0, atol=1e-13)
    torch.testing.assert_close(observable(links[3:4]), values[3:4], rtol=0, atol=1e-13)


def test_charge_is_odd_and_the_others_are_even():
    links = random_links((4, 4))
    assert torch.equal(gauge.charge(-links), -gauge.charge(links))
    for observable in (gauge.plaquette, gauge.charge_squared, gauge.susceptibility):
        torch.testing.assert_close(observable(-links), observable(links), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("shape", "beta"), [((3, 4), 0.5), ((4, 4), 2.0), ((8, 8), 2.0)])
def test_means_of_pure_gauge_theory(shape, beta):
    """Plaquette, charge and susceptibility within 4.5 deviations of the exact values, 2e-5 for each shape."""
    links = QuenchedU1(beta, shape).sample(4000, torch.Generator().manual_seed(3))
    exact = {
        gauge.plaquette: u1_plaquette(beta, shape),
        gauge.charge: 0.0,
        gauge.susceptibility: u1_susceptibility(beta, shape),
    }
    for observable, expected in exact.items():
        values = observable(links)
        assert abs(float(values.mean()) - expected) < 4.5 * float(values.std()) / math.sqrt(4000)


# ---------------------------------------------------------------- loops

LOOPS = [gauge.wilson_loops, gauge.polyakov_correlator]
POLYAKOV = [f"polyakov_{mu}_{part}" for mu in ("time", "space") for part in ("real", "imaginary", "abs")]


@pytest.mark.parametrize("shape", [*SHAPES, (2, 7), (6, 4)])
def test_wilson_loops_are_those_of_one_size_at_a_time(shape):
    links = random_links(shape)
    found = gauge.wilson_loops(links)
    sides = [max(1, extent // 2) for extent in shape]
    assert found.shape == (16, *sides)
    for r0, r1 in itertools.product(*(range(1, side + 1) for side in sides)):
        expected = torch.cos(wilson_loop(links, r0, r1)).mean((1, 2))
        torch.testing.assert_close(found[:, r0 - 1, r1 - 1], expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(found[:, 0, 0], gauge.plaquette(links), rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [(4, 6), (8, 8)])
def test_means_of_wilson_loops_in_pure_gauge_theory(shape):
    """Every loop within 4.5 deviations of its exact mean: 7e-6 each, 2e-4 for the 22 of them."""
    links = QuenchedU1(2.0, shape).sample(4000, torch.Generator().manual_seed(4))
    found = gauge.wilson_loops(links)
    area = np.outer(np.arange(1, shape[0] // 2 + 1), np.arange(1, shape[1] // 2 + 1))
    error = found.std(0).numpy() / math.sqrt(4000)
    assert np.all(np.abs(found.mean(0).numpy() - u1_wilson_loop(2.0, shape, area)) < 4.5 * error)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 2)])
def test_polyakov_loops_by_hand(shape):
    links = random_links(shape)
    found = gauge.polyakov_loops(links)
    assert list(found) == POLYAKOV
    phases = np.exp(1j * links.numpy())
    for mu, name in enumerate(("time", "space")):
        loop = np.prod(phases[:, mu], axis=mu + 1).mean(-1)
        for part, expected in (("real", loop.real), ("imaginary", loop.imag), ("abs", np.abs(loop))):
            np.testing.assert_allclose(found[f"polyakov_{name}_{part}"].numpy(), expected, atol=1e-13)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 2), (2, 6)])
def test_polyakov_correlator_by_hand(shape):
    links = random_links(shape)
    loop = np.exp(1j * links[:, 0].sum(1).numpy())
    found = gauge.polyakov_correlator(links)
    assert found.shape == (16, shape[1] // 2 + 1)
    for r in range(shape[1] // 2 + 1):
        expected = (loop.conj() * np.roll(loop, -r, axis=1)).mean(1).real
        np.testing.assert_allclose(found[:, r].numpy(), expected, atol=1e-13)


@pytest.mark.parametrize("observable", LOOPS)
def test_symmetries_of_loops(observable):
    links = random_links((4, 5))
    values = observable(links)
    moved = random_gauge_transform(links, torch.Generator().manual_seed(2))
    shifted = shift_holonomies(links, torch.tensor([0.7, -1.1], dtype=torch.float64))
    for same in (moved, shifted, -links, links + 2 * math.pi, links.roll(1, -1), links.roll(1, -2)):
        torch.testing.assert_close(observable(same), values, rtol=0, atol=1e-12)


def test_polyakov_loops_turn_with_the_holonomies():
    links = random_links((4, 5))
    moved = random_gauge_transform(links, torch.Generator().manual_seed(2))
    turned = shift_holonomies(moved, torch.tensor([math.pi / 2, math.pi], dtype=torch.float64))
    before, after = gauge.polyakov_loops(links), gauge.polyakov_loops(turned)
    expected = {
        "polyakov_time_real": -before["polyakov_time_imaginary"],
        "polyakov_time_imaginary": before["polyakov_time_real"],
        "polyakov_time_abs": before["polyakov_time_abs"],
        "polyakov_space_real": -before["polyakov_space_real"],
        "polyakov_space_imaginary": -before["polyakov_space_imaginary"],
        "polyakov_space_abs": before["polyakov_space_abs"],
    }
    for name, values in expected.items():
        torch.testing.assert_close(after[name], values, rtol=0, atol=1e-12)
