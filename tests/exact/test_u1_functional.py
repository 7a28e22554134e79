"""Gaussians of a plaquette sum, against sums over plaquettes on a grid."""

import itertools
import math

import numpy as np
import pytest
import torch

from latticeflow.exact import u1_gaussian_log_mean
from latticeflow.priors import QuenchedU1
from latticeflow.u1 import plaquette


def brute_force(beta, volume, c, function, points=40):
    """Sum over all but one plaquette on a periodic grid, exact to rounding for smooth integrands."""
    grid = 2 * np.pi * np.arange(points) / points
    axes = np.meshgrid(*[grid] * (volume - 1), indexing="ij")
    plaquettes = [*axes, -sum(axes)]
    weight = np.exp(beta * sum(np.cos(p) for p in plaquettes))
    gauss = np.exp(-c * sum(function(p) for p in plaquettes) ** 2)
    return math.log((weight * gauss).sum() / weight.sum())


@pytest.mark.parametrize(("beta", "c"), list(itertools.product([0.0, 0.5, 2.0], [0.1, 1.0, 8.0])))
@pytest.mark.parametrize("shape", [(1, 2), (1, 3), (2, 2)])
def test_against_brute_force(shape, beta, c):
    def function(angle):
        return (1.5 * np.sin(angle) - 0.4 * np.sin(2 * angle)) / (2 * np.pi)

    found = u1_gaussian_log_mean(beta, shape, c, function=function)
    assert found == pytest.approx(brute_force(beta, math.prod(shape), c, function), abs=1e-12)


def test_no_gaussian_is_no_factor():
    assert u1_gaussian_log_mean(2.0, (8, 8), 0.0, function=np.sin) == 0.0


def test_against_independent_draws_on_a_large_lattice():
    """Mean over 4000 exact draws at 12x16; 4 sigma, false-alarm rate 6e-5."""
    links = QuenchedU1(1.5, (12, 16)).sample(4000, torch.Generator().manual_seed(5))
    gaussian = torch.exp(-2.0 * torch.sin(plaquette(links)).sum(dim=(1, 2)) ** 2 / 25)
    error = float(gaussian.std()) / math.sqrt(len(gaussian))
    expected = math.exp(u1_gaussian_log_mean(1.5, (12, 16), 2.0, function=lambda angle: np.sin(angle) / 5))
    assert float(gaussian.mean()) == pytest.approx(expected, abs=4 * error)


@pytest.mark.parametrize(("beta", "c"), [(-1.0, 1.0), (1.0, -1.0), (1.0, math.nan)])
def test_bad_numbers(beta, c):
    with pytest.raises(ValueError, match=r"beta|c "):
        u1_gaussian_log_mean(beta, (4, 4), c, function=np.sin)
