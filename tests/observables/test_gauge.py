"""Gauge observables against NumPy loops, exact means and their symmetries."""

import itertools
import math

import numpy as np
import pytest
import torch

from latticeflow.exact import u1_plaquette, u1_susceptibility
from latticeflow.observables import gauge
from latticeflow.priors import QuenchedU1
from latticeflow.u1 import random_gauge_transform

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
