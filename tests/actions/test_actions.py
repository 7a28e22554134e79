"""Every action: its force, its symmetries and its independence of the batch; each against loops or a dense matrix."""

import itertools
import math

import numpy as np
import pytest
import torch

from latticeflow.actions import Action, HolonomyMarginal, ScalarAction, SchwingerAction, U1Action
from latticeflow.dirac import wilson_matrix
from latticeflow.u1 import gauge_transform

# name: action, lattice
ACTIONS = {
    "scalar in 1d": (ScalarAction(-0.7, 0.9), (5,)),
    "scalar in 2d": (ScalarAction(-4.0, 8.0), (3, 4)),
    "scalar in 3d": (ScalarAction(0.3, 0.1), (2, 3, 2)),
    "free scalar": (ScalarAction(1.25, 0.0), (1, 4)),
    "u1": (U1Action(2.0), (3, 4)),
    "u1 with extent 1": (U1Action(1.5), (1, 3)),
    "schwinger": (SchwingerAction(2.0, 0.25), (3, 4)),
    "schwinger with one flavour": (SchwingerAction(1.0, 0.3, flavours=1), (4, 3)),
    "schwinger with extent 2": (SchwingerAction(2.0, 0.276), (2, 2)),
    "schwinger without hopping": (SchwingerAction(2.0, 0.0), (2, 3)),
    "u1 marginal": (HolonomyMarginal(U1Action(2.0), (2, 3)), (3, 4)),
    "schwinger marginal": (HolonomyMarginal(SchwingerAction(2.0, 0.25), (3, 2)), (4, 3)),
}
GAUGE = [name for name, (action, _) in ACTIONS.items() if action.field_name == "links"]
SCALAR = [name for name, (action, _) in ACTIONS.items() if action.field_name == "phi"]


def random_field(action, shape, *, batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 1.3 * torch.randn(batch, *action.field_shape(shape), dtype=torch.float64, generator=generator)


def close(first, second, tolerance=1e-11):
    torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=ACTIONS)
def case(request):
    action, shape = ACTIONS[request.param]
    return action, shape, random_field(action, shape)


@pytest.fixture(params=GAUGE)
def gauge_case(request):
    action, shape = ACTIONS[request.param]
    return action, shape, random_field(action, shape)


@pytest.fixture(params=SCALAR)
def scalar_case(request):
    action, shape = ACTIONS[request.param]
    return action, shape, random_field(action, shape)


def test_values_and_names(case):
    action, _, field = case
    assert isinstance(action, Action)
    assert action.theory in {"scalar", "u1", "schwinger"}
    values = action(field)
    assert values.shape == (3,)
    assert values.dtype == torch.float64
    assert len(values.unique()) == 3
    assert action(field.float()).dtype == torch.float32
    torch.testing.assert_close(action(field.float()).double(), values, rtol=2e-5, atol=2e-4)


def test_force_is_minus_the_gradient_by_finite_differences(case):
    action, _, field = case
    force, step = action.force(field), 1e-3
    assert force.shape == field.shape
    for component in itertools.product(*map(range, field.shape[1:])):
        moved = [field.clone() for _ in range(4)]
        for copy, k in zip(moved, (-2, -1, 1, 2), strict=True):
            copy[(slice(None), *component)] += k * step
        low2, low, high, high2 = (action(copy) for copy in moved)
        slope = (low2 - 8 * low + 8 * high - high2) / (12 * step)
        torch.testing.assert_close(force[(slice(None), *component)], -slope, rtol=1e-6, atol=1e-7)


def test_force_needs_no_surrounding_gradient(case):
    action, _, field = case
    expected = action.force(field)
    with torch.no_grad():
        assert torch.equal(action.force(field), expected)
    assert not field.requires_grad
    assert not expected.requires_grad


def test_configurations_of_a_batch_do_not_mix(case):
    action, _, field = case
    values, force = action(field), action.force(field)
    for i in range(len(field)):
        close(action(field[i : i + 1])[0], values[i])
        close(action.force(field[i : i + 1])[0], force[i], 1e-10)
    close(action(field.flip(0)), values.flip(0))


def test_translations_change_nothing(case):
    action, shape, field = case
    axes = tuple(range(-len(shape), 0))
    for steps in itertools.product(*map(range, shape)):
        close(action(torch.roll(field, steps, axes)), action(field))


def test_without_a_group_the_orbit_is_the_field_itself(case):
    action, _, field = case
    orbit = action.orbit(field)
    assert orbit.shape[0] == 3
    close(orbit.flatten(1)[:, 0], action.action(field) if isinstance(action, HolonomyMarginal) else action(field))
    close(action.marginal(orbit), action(field))
    if not isinstance(action, HolonomyMarginal):
        assert orbit.shape == (3, 1)
        drawn, same = action.draw(field, orbit, torch.Generator().manual_seed(1))
        assert torch.equal(drawn, field)
        assert torch.equal(same, orbit)


def test_gauge_transformations_change_nothing(gauge_case):
    action, shape, links = gauge_case
    angles = 3 * torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    transformed = gauge_transform(links, angles)
    close(action(transformed), action(links))
    close(action.force(transformed), action.force(links), 1e-10)


def test_links_are_periodic_one_by_one(gauge_case):
    action, _, links = gauge_case
    for component in itertools.product(*map(range, links.shape[1:])):
        turned = links.clone()
        turned[(slice(None), *component)] += 2 * math.pi
        close(action(turned), action(links))


def test_charge_conjugation_changes_nothing(gauge_case):
    action, _, links = gauge_case
    close(action(-links), action(links))
    close(action.force(-links), -action.force(links), 1e-10)


def test_space_and_time_reflections_change_nothing(gauge_case):
    action, _, links = gauge_case
    for mu in (0, 1):
        reflected = links.flip(mu - 2)
        reflected[:, mu] = -reflected[:, mu].roll(-1, mu - 2)
        close(action(reflected), action(links))


def test_gauge_fields_have_two_links_per_site(gauge_case):
    action, shape, _ = gauge_case
    assert action.field_shape(shape) == (2, *shape)
    assert action.theory in {"u1", "schwinger"}
    with pytest.raises(ValueError, match="has 3 extents, expected 2"):
        action.field_shape((2, 2, 2))


def test_scalar_fields_are_even(scalar_case):
    action, shape, phi = scalar_case
    assert action.field_shape(shape) == shape
    assert action.theory == "scalar"
    close(action(-phi), action(phi))
    close(action.force(-phi), -action.force(phi))


def test_scalar_action_by_loops(scalar_case):
    action, shape, phi = scalar_case
    for field, value in zip(phi.numpy(), action(phi), strict=True):
        expected = 0.0
        for site in itertools.product(*map(range, shape)):
            expected += action.m2 * field[site] ** 2 + action.lam * field[site] ** 4
            for mu, extent in enumerate(shape):
                ahead = (*site[:mu], (site[mu] + 1) % extent, *site[mu + 1 :])
                expected += (field[ahead] - field[site]) ** 2
        assert float(value) == pytest.approx(expected, rel=1e-12)


def gauge_action_by_loops(links, beta):
    _, extent0, extent1 = links.shape
    total = 0.0
    for x, y in itertools.product(range(extent0), range(extent1)):
        angle = links[0, x, y] + links[1, (x + 1) % extent0, y] - links[0, x, (y + 1) % extent1] - links[1, x, y]
        total -= beta * math.cos(angle)
    return total


@pytest.mark.parametrize("beta", [0.0, 0.7, 5.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 2), (3, 5)])
def test_gauge_action_by_loops(shape, beta):
    action = U1Action(beta)
    links = random_field(action, shape)
    expected = [gauge_action_by_loops(field, beta) for field in links.numpy()]
    np.testing.assert_allclose(action(links).numpy(), expected, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("flavours", [1, 2, 3])
@pytest.mark.parametrize(("beta", "kappa"), [(2.0, 0.276), (0.0, 0.2), (1.0, 0.0), (1.0, 0.45)])
@pytest.mark.parametrize("shape", [(1, 3), (2, 2), (3, 5)])
def test_schwinger_action_of_the_dense_determinant(shape, beta, kappa, flavours):
    action = SchwingerAction(beta, kappa, flavours=flavours)
    links = random_field(action, shape)
    _, log_det = np.linalg.slogdet(wilson_matrix(links, kappa).numpy())
    expected = [gauge_action_by_loops(field, beta) for field in links.numpy()] - flavours * log_det
    np.testing.assert_allclose(action(links).numpy(), expected, rtol=1e-12, atol=1e-11)
    assert torch.equal(action.gauge(links), U1Action(beta)(links))


def test_there_are_two_flavours_unless_told():
    assert SchwingerAction(2.0, 0.25) == SchwingerAction(2.0, 0.25, flavours=2)
    assert SchwingerAction(2.0, 0.25) != SchwingerAction(2.0, 0.25, flavours=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScalarAction(math.nan, 1.0), r"m2 must be a finite number in \[-inf, inf\), got nan"),
        (lambda: ScalarAction(-math.inf, 1.0), r"m2 must be a finite number in \[-inf, inf\), got -inf"),
        (lambda: ScalarAction(1.0, -0.1), r"lam must be a finite number in \[0, inf\), got -0.1"),
        (lambda: ScalarAction(1.0, math.inf), r"lam must be a finite number in \[0, inf\), got inf"),
        (lambda: ScalarAction(-1.0, 0.0), r"m2 must be positive where lam = 0, got -1.0"),
        (lambda: ScalarAction(0.0, 0.0), r"m2 must be positive where lam = 0, got 0.0"),
        (lambda: U1Action(-1.0), r"beta must be a finite number in \[0, inf\), got -1.0"),
        (lambda: U1Action(math.nan), r"beta must be a finite number in \[0, inf\), got nan"),
        (lambda: SchwingerAction(-2.0, 0.2), r"beta must be a finite number in \[0, inf\), got -2.0"),
        (lambda: SchwingerAction(math.inf, 0.2), r"beta must be a finite number in \[0, inf\), got inf"),
        (lambda: SchwingerAction(2.0, 0.5), r"kappa must be a finite number in \[0, 0.5\), got 0.5"),
        (lambda: SchwingerAction(2.0, -0.1), r"kappa must be a finite number in \[0, 0.5\), got -0.1"),
        (lambda: SchwingerAction(2.0, math.nan), r"kappa must be a finite number in \[0, 0.5\), got nan"),
        (lambda: SchwingerAction(2.0, 0.2, flavours=0), r"flavours must be a positive integer, got 0"),
        (lambda: SchwingerAction(2.0, 0.2, flavours=1.5), r"flavours must be a positive integer, got 1.5"),
    ],
)
def test_bad_couplings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
