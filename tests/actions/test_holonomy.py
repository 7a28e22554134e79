"""The holonomy marginal against brute force over shifted links, and the Gibbs draw that undoes it."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import chisquare

from latticeflow.actions import HolonomyMarginal, ScalarAction, SchwingerAction, U1Action
from latticeflow.observables import observables
from latticeflow.priors import HaarUniform, QuenchedU1
from latticeflow.stats import reweighted_mean
from latticeflow.u1 import plaquette, polyakov_loop, shift_holonomies, wrap

ACTIONS = {
    "u1": U1Action(2.0),
    "schwinger": SchwingerAction(2.0, 0.276),
    "one flavour": SchwingerAction(1.0, 0.4, flavours=1),
}
GRIDS = [(1, 1), (4, 1), (1, 3), (3, 2), (2, 5)]
SHAPES = [(1, 3), (2, 2), (4, 3), (3, 4)]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def haar_links(shape, *, batch=3, seed=1):
    return HaarUniform(shape).sample(batch, seeded(seed))


def shifted(links, element, grid):
    angles = [2 * math.pi * i / extent for i, extent in zip(element, grid, strict=True)]
    return shift_holonomies(links, torch.tensor(angles, dtype=torch.float64))


def elements(grid):
    return list(itertools.product(range(grid[0]), range(grid[1])))


def close(first, second, tolerance=1e-10):
    torch.testing.assert_close(first, second, rtol=0, atol=tolerance)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ACTIONS)
def test_orbit_and_marginal_by_brute_force(name, shape, grid):
    action, links = ACTIONS[name], haar_links(shape)
    marginal = HolonomyMarginal(action, grid)
    orbit = marginal.orbit(links)
    assert orbit.shape == (3, *grid)
    by_hand = torch.stack([action(shifted(links, element, grid)) for element in elements(grid)], dim=1)
    close(orbit.reshape(3, -1), by_hand)
    expected = math.log(math.prod(grid)) - logsumexp(-by_hand.numpy(), axis=1)
    close(marginal(links), torch.from_numpy(expected))
    close(marginal.marginal(orbit), marginal(links))
    if name != "u1" and grid != (1, 1):
        assert bool(torch.all(orbit.flatten(1).std(dim=1) > 1e-3))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ACTIONS)
def test_marginal_is_invariant_under_the_group(name, grid):
    links = haar_links((4, 3))
    marginal = HolonomyMarginal(ACTIONS[name], grid)
    for element in elements(grid):
        moved = shifted(links, element, grid)
        close(marginal(moved), marginal(links))
        close(marginal.force(moved), marginal.force(links), 1e-8)


def test_marginal_is_not_invariant_under_other_shifts():
    links = haar_links((4, 3))
    marginal = HolonomyMarginal(SchwingerAction(2.0, 0.276), (2, 2))
    assert bool(torch.all((marginal(shifted(links, (1, 1), (8, 8))) - marginal(links)).abs() > 1e-5))


@pytest.mark.parametrize("name", ACTIONS)
def test_one_element_is_the_action_itself(name):
    action, links = ACTIONS[name], haar_links((3, 4))
    marginal = HolonomyMarginal(action, (1, 1))
    close(marginal(links), action(links), 1e-12)
    close(marginal.force(links), action.force(links))
    drawn, orbit = marginal.draw(links, marginal.orbit(links), seeded(2))
    assert torch.equal(drawn, links)
    close(orbit[:, 0, 0], action(links), 1e-12)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ACTIONS)
def test_draw_returns_a_shifted_field_and_its_orbit(name, shape, grid):
    action, links = ACTIONS[name], haar_links(shape, batch=12)
    marginal = HolonomyMarginal(action, grid)
    before = links.clone()
    drawn, orbit = marginal.draw(links, marginal.orbit(links), seeded(3))
    close(orbit[:, 0, 0], action(drawn))
    close(orbit, marginal.orbit(drawn))
    change = wrap(plaquette(drawn) - plaquette(links))
    close(change, torch.zeros_like(change), 1e-12)
    for mu, extent in enumerate(grid):
        steps = (polyakov_loop(drawn, mu) - polyakov_loop(links, mu)) * extent / (2 * math.pi)
        close(steps, torch.round(steps), 1e-9)
    assert torch.equal(links, before)
    if math.prod(grid) > 1:
        assert not torch.equal(drawn, links)


def test_draw_follows_its_generator():
    links = haar_links((3, 4), batch=20)
    marginal = HolonomyMarginal(SchwingerAction(2.0, 0.276), (4, 3))
    first, again, other = (marginal.draw(links, marginal.orbit(links), seeded(seed))[0] for seed in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("grid", [(4, 1), (1, 3), (3, 4)])
def test_draw_frequencies_are_the_weights(grid):
    """Chi^2 of 20,000 draws for one configuration, p above 1e-6."""
    count = 20_000
    marginal = HolonomyMarginal(SchwingerAction(2.0, 0.276), grid)
    links = haar_links((4, 3), batch=1, seed=6)
    orbit = marginal.orbit(links)
    weights = np.exp(-orbit.flatten().numpy() + orbit.min().item())
    weights /= weights.sum()
    assert weights.min() * count > 5
    assert weights.max() > 1.3 * weights.min()
    drawn, _ = marginal.draw(links.expand(count, -1, -1, -1), orbit.expand(count, -1, -1), seeded(7))
    turns = [polyakov_loop(drawn - links, mu)[:, 0] / (2 * math.pi) for mu in (0, 1)]  # up to whole ones
    step = [(turn * extent).round().long() % extent for turn, extent in zip(turns, grid, strict=True)]
    counts = np.bincount((step[0] * grid[1] + step[1]).numpy(), minlength=math.prod(grid))
    assert chisquare(counts, count * weights).pvalue > 1e-6


@pytest.mark.parametrize(("beta", "kappa", "condensate"), [(1.0, 0.20, 1.745210), (2.0, 0.25, 1.466977)])
def test_marginal_and_draw_reproduce_the_theory_on_2x2(beta, kappa, condensate):
    """Holonomy-dependent means from drawn fields against direct reweighting of other samples, within 4.5 deviations.

    The condensate also against the quadrature of PHYSICS, section 4. Six comparisons, rate 4e-5.
    """
    action, prior = SchwingerAction(beta, kappa), QuenchedU1(1.2 * beta, (2, 2))
    marginal = HolonomyMarginal(action, (3, 2))
    measured = {
        "condensate": observables(action)["condensate"],
        "temporal": lambda links: torch.cos(polyakov_loop(links, 0)).mean(1),
        "spatial": lambda links: torch.cos(polyakov_loop(links, 1)).mean(1),
    }
    first, second = prior.sample(6000, seeded(8)), prior.sample(6000, seeded(9))
    log_weight = -marginal(first) - prior.log_prob(first)
    drawn, _ = marginal.draw(first, marginal.orbit(first), seeded(10))
    direct_weight = -action(second) - prior.log_prob(second)
    for name, observable in measured.items():
        value, error = reweighted_mean(observable(drawn), log_weight)
        direct, direct_error = reweighted_mean(observable(second), direct_weight)
        assert abs(value - direct) < 4.5 * math.hypot(error, direct_error), name
        blind, blind_error = reweighted_mean(observable(first), log_weight)
        if name == "temporal":  # without the draw the loop comes out wrong
            assert abs(blind - direct) > 4.5 * math.hypot(blind_error, direct_error)
        if name == "condensate":
            assert abs(value - condensate) < 4.5 * error


def test_names_and_shapes_are_those_of_the_action():
    for action in ACTIONS.values():
        marginal = HolonomyMarginal(action, (2, 2))
        assert (marginal.theory, marginal.field_name) == (action.theory, action.field_name)
        assert marginal.field_shape((3, 4)) == action.field_shape((3, 4)) == (2, 3, 4)


@pytest.mark.parametrize("grid", [(0, 2), (2, -1), (2,), (2, 2, 2), (1.5, 2), ()])
def test_bad_grids_are_named(grid):
    with pytest.raises(ValueError, match="grid must hold two positive integers, got") as caught:
        HolonomyMarginal(U1Action(1.0), grid)
    assert repr(grid) in str(caught.value)


@pytest.mark.parametrize("action", [ScalarAction(1.0, 1.0), SimpleNamespace(theory="u1")])
def test_actions_without_holonomies_are_refused(action):
    with pytest.raises(TypeError, match="needs a gauge action with at_holonomies, got"):
        HolonomyMarginal(action, (2, 2))
