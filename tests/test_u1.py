"""Compact U(1) links against walks around the lattice, and the symmetries of every loop."""

import itertools
import math

import numpy as np
import pytest
import torch

from latticeflow.u1 import (
    gauge_transform,
    plaquette,
    polyakov_loop,
    random_gauge_transform,
    sawtooth,
    shift_holonomies,
    smooth_charge,
    topological_charge,
    wilson_loop,
    wrap,
)

SHAPES = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (3, 5), (5, 2), (4, 4)]
SIDES = [(1, 1), (1, 2), (2, 1), (2, 3), (3, 2)]


def random_links(shape, *, batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 2 * math.pi * torch.rand(batch, 2, *shape, dtype=torch.float64, generator=generator) - math.pi


def random_angles(*size, seed=2):
    return 20 * torch.rand(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 10


def walk(links, start, steps):
    """The angle gathered along a path of links `(2, L0, L1)`; a step is `(direction, +1 or -1)`."""
    angle, site = 0.0, list(start)
    for mu, sign in steps:
        if sign < 0:
            site[mu] = (site[mu] - 1) % links.shape[1 + mu]
        angle += sign * float(links[(mu, *site)])
        if sign > 0:
            site[mu] = (site[mu] + 1) % links.shape[1 + mu]
    return angle


def rectangle(r0, r1):
    return [(0, 1)] * r0 + [(1, 1)] * r1 + [(0, -1)] * r0 + [(1, -1)] * r1


def sites(shape):
    return itertools.product(range(shape[0]), range(shape[1]))


def constant_flux(shape, charge):
    """Links whose plaquette angles are all `2 pi charge / V` modulo 2 pi."""
    time_extent, space_extent = shape
    links = torch.zeros(1, 2, *shape, dtype=torch.float64)
    for x0, x1 in sites(shape):
        links[0, 1, x0, x1] = 2 * math.pi * charge * x0 / (time_extent * space_extent)
        if x0 == time_extent - 1:
            links[0, 0, x0, x1] = -2 * math.pi * charge * x1 / space_extent
    return links


def same_angle(first, second, *, tolerance=1e-12):
    return bool(torch.all(torch.remainder(first - second + math.pi, 2 * math.pi).sub(math.pi).abs() < tolerance))


@pytest.mark.parametrize("shape", SHAPES)
def test_plaquette_is_a_walk_around_one_square(shape):
    links = random_links(shape)
    angle = plaquette(links)
    assert angle.shape == (3, *shape)
    for b, site in itertools.product(range(3), sites(shape)):
        assert float(angle[(b, *site)]) == pytest.approx(walk(links[b], site, rectangle(1, 1)), abs=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sides", SIDES)
def test_wilson_loop_is_a_walk_around_a_rectangle(shape, sides):
    links = random_links(shape, batch=2)
    angle = wilson_loop(links, *sides)
    assert angle.shape == (2, *shape)
    for b, site in itertools.product(range(2), sites(shape)):
        assert float(angle[(b, *site)]) == pytest.approx(walk(links[b], site, rectangle(*sides)), abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sides", SIDES)
def test_wilson_loop_is_the_sum_of_the_plaquettes_inside(shape, sides):
    links = random_links(shape)
    inside, angle = plaquette(links), wilson_loop(links, *sides)
    for x0, x1 in sites(shape):
        enclosed = [((x0 + i) % shape[0], (x1 + j) % shape[1]) for i in range(sides[0]) for j in range(sides[1])]
        expected = sum(inside[(slice(None), *site)] for site in enclosed)
        torch.testing.assert_close(angle[:, x0, x1], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_polyakov_loop_winds_once(shape):
    links = random_links(shape)
    assert torch.equal(polyakov_loop(links), polyakov_loop(links, 0))
    for mu in (0, 1):
        loops = polyakov_loop(links, mu)
        assert loops.shape == (3, shape[1 - mu])
        for b, y in itertools.product(range(3), range(shape[1 - mu])):
            start = (0, y) if mu == 0 else (y, 0)
            expected = walk(links[b], start, [(mu, 1)] * shape[mu])
            assert float(loops[b, y]) == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
def test_topological_charge_is_the_winding_of_the_plaquettes(shape):
    links = random_links(shape, batch=16)
    charge = topological_charge(links)
    assert charge.shape == (16,)
    assert charge.dtype == torch.float64
    for b in range(16):
        angles = [walk(links[b], site, rectangle(1, 1)) for site in sites(shape)]
        total = sum((angle + math.pi) % (2 * math.pi) - math.pi for angle in angles) / (2 * math.pi)
        assert float(charge[b]) == round(total)
        assert total == pytest.approx(round(total), abs=1e-12)


@pytest.mark.parametrize("shape", [(2, 2), (3, 5), (5, 2), (4, 4)])
def test_constant_flux_has_its_charge(shape):
    largest = (math.prod(shape) - 1) // 2
    for charge in range(-largest, largest + 1):
        links = constant_flux(shape, charge)
        assert same_angle(plaquette(links), 2 * math.pi * charge / math.prod(shape))
        assert float(topological_charge(links)) == charge


@pytest.mark.parametrize("shape", SHAPES)
def test_charge_is_odd_and_does_not_see_the_branch(shape):
    links = random_links(shape, batch=16)
    turns = torch.randint(-3, 4, links.shape, generator=torch.Generator().manual_seed(5))
    assert torch.equal(topological_charge(-links), -topological_charge(links))
    assert torch.equal(topological_charge(links + 2 * math.pi * turns.double()), topological_charge(links))


def test_random_links_have_charges_of_both_signs():
    charges = {int(q) for q in topological_charge(random_links((4, 4), batch=200))}
    assert {-1, 0, 1} <= charges
    assert topological_charge(random_links((4, 4)).float()).dtype == torch.float32


def test_sawtooth_is_a_smoothed_fourier_series_of_the_wrapped_angle():
    """Coefficients `2 (-1)^(k+1) / k` of the wrapped angle, times Lanczos factors `sinc(k / 3)`, k = 1 and 2."""
    angle = random_angles(200)
    grid = 2 * np.pi * (np.arange(3000) + 0.5) / 3000 - np.pi
    expected = np.zeros(200)
    for k in (1, 2):
        coefficient = 2 * np.mean(grid * np.sin(k * grid))
        expected += np.sinc(k / 3) * coefficient * np.sin(k * angle.numpy())
    found = sawtooth(torch.cos(angle), torch.sin(angle))
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5)
    assert float(sawtooth(torch.tensor(-1.0), torch.tensor(0.0))) == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_smooth_charge_by_loops_and_its_symmetries(shape):
    links = random_links(shape)
    charge = smooth_charge(links)
    for b in range(3):
        angles = torch.tensor([walk(links[b], site, rectangle(1, 1)) for site in sites(shape)], dtype=torch.float64)
        expected = float(sawtooth(torch.cos(angles), torch.sin(angles)).sum()) / (2 * math.pi)
        assert float(charge[b]) == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(smooth_charge(-links), -charge, rtol=0, atol=1e-12)
    transformed = random_gauge_transform(links, torch.Generator().manual_seed(7))
    torch.testing.assert_close(smooth_charge(transformed), charge, rtol=0, atol=1e-12)
    torch.testing.assert_close(smooth_charge(links + 2 * math.pi), charge, rtol=0, atol=1e-12)


def test_smooth_charge_follows_the_topological_charge():
    links = torch.cat([constant_flux((4, 4), charge) for charge in (0, -3, -1, 1, 3)])
    charges, smooth = topological_charge(links), smooth_charge(links)
    assert charges.tolist() == [0, -3, -1, 1, 3]
    assert torch.equal(torch.sign(smooth.round(decimals=9)), torch.sign(charges))
    rough = random_links((4, 4), batch=400, seed=8)
    assert np.corrcoef(smooth_charge(rough), topological_charge(rough))[0, 1] > 0.8


@pytest.mark.parametrize("shape", SHAPES)
def test_gauge_transformation_site_by_site(shape):
    links, angles = random_links(shape), random_angles(3, *shape)
    transformed = gauge_transform(links, angles)
    for x0, x1 in sites(shape):
        here, ahead = angles[:, x0, x1], (angles[:, (x0 + 1) % shape[0], x1], angles[:, x0, (x1 + 1) % shape[1]])
        for mu in (0, 1):
            expected = links[:, mu, x0, x1] + here - ahead[mu]
            torch.testing.assert_close(transformed[:, mu, x0, x1], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
def test_loops_and_charge_are_gauge_invariant(shape):
    links = random_links(shape)
    generator = torch.Generator().manual_seed(3)
    for transformed in (
        gauge_transform(links, random_angles(3, *shape)),
        random_gauge_transform(links, generator),
    ):
        torch.testing.assert_close(plaquette(transformed), plaquette(links), rtol=0, atol=1e-12)
        for sides in SIDES:
            loop, expected = wilson_loop(transformed, *sides), wilson_loop(links, *sides)
            torch.testing.assert_close(loop, expected, rtol=0, atol=1e-12)
        for mu in (0, 1):
            loop, expected = polyakov_loop(transformed, mu), polyakov_loop(links, mu)
            torch.testing.assert_close(loop, expected, rtol=0, atol=1e-12)
        assert torch.equal(topological_charge(transformed), topological_charge(links))
        if math.prod(shape) > 1:
            assert not torch.allclose(transformed, links)


def test_random_gauge_transformation_follows_its_generator():
    links = random_links((3, 5))
    first, again, other = (random_gauge_transform(links, torch.Generator().manual_seed(s)) for s in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_random_gauge_transformation_is_uniform_on_the_orbit():
    """Chi^2 of the angle of one link on 1x2 with 16 bins, from links at zero; rejects below 1e-6."""
    links = random_gauge_transform(torch.zeros(8000, 2, 1, 2, dtype=torch.float64), torch.Generator().manual_seed(6))
    for link in (links[:, 1, 0, 0], links[:, 1, 0, 1]):
        counts = np.histogram(np.mod(link.numpy(), 2 * math.pi), bins=16, range=(0, 2 * math.pi))[0]
        assert ((counts - 500) ** 2 / 500).sum() < 59.0  # chi^2 with 15 degrees of freedom: 59 at 4e-7


@pytest.mark.parametrize(
    ("angle", "expected"),
    [
        (0.0, 0.0),
        (math.pi, math.pi),
        (-math.pi, math.pi),
        (3 * math.pi, math.pi),
        (-3.0, -3.0),
        (4.0, 4.0 - 2 * math.pi),
        (-4.0, 2 * math.pi - 4.0),
        (2 * math.pi, 0.0),
        (100.0, 100.0 - 32 * math.pi),
    ],
)
def test_wrap_at_chosen_angles(angle, expected):
    assert float(wrap(torch.tensor(angle, dtype=torch.float64))) == pytest.approx(expected, abs=1e-13)


def test_wrap_range_and_period():
    angles = random_angles(1000)
    wrapped = wrap(angles)
    assert bool(torch.all((wrapped > -math.pi) & (wrapped <= math.pi)))
    torch.testing.assert_close(torch.polar(torch.ones_like(angles), wrapped), torch.exp(1j * angles))
    torch.testing.assert_close(wrap(angles + 6 * math.pi), wrapped, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batched", [True, False])
def test_holonomy_shift_moves_the_polyakov_loops_only(shape, batched):
    links = random_links(shape)
    angles = random_angles(3, 2) if batched else random_angles(2)
    before = links.clone()
    shifted = shift_holonomies(links, angles)
    assert torch.equal(links, before)
    for mu in (0, 1):
        moved = polyakov_loop(shifted, mu) - polyakov_loop(links, mu)
        torch.testing.assert_close(moved, angles[..., mu, None].expand_as(moved), rtol=0, atol=1e-12)
    for sides in SIDES:
        torch.testing.assert_close(wilson_loop(shifted, *sides), wilson_loop(links, *sides), rtol=0, atol=1e-12)
    assert torch.equal(topological_charge(shifted), topological_charge(links))


@pytest.mark.parametrize("sides", [(0, 1), (1, 0), (-1, 2), (2, -3)])
def test_sides_that_are_not_positive_are_named(sides):
    with pytest.raises(ValueError, match=f"sides must be positive, got {sides[0]} x {sides[1]}"):
        wilson_loop(random_links((3, 3)), *sides)
