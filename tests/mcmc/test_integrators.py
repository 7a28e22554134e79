"""Integrators: their tables, order, reversibility and phase-space volume for every action, and the oscillator."""

import itertools
import math

import numpy as np
import pytest
import torch

from latticeflow.actions import ScalarAction, SchwingerAction, U1Action
from latticeflow.mcmc import integrate
from latticeflow.mcmc.integrators import INTEGRATORS

# name: action, lattice, steps of a trajectory of length 1 at second and at fourth order, a lattice with few links
ACTIONS = {
    "scalar": (ScalarAction(-4.0, 8.0), (4, 4), (30, 40), (3,)),
    "u1": (U1Action(2.0), (4, 4), (12, 8), (1, 2)),
    "schwinger": (SchwingerAction(2.0, 0.25), (4, 6), (12, 8), (2, 2)),
}


@pytest.fixture(params=INTEGRATORS)
def integrator(request):
    return INTEGRATORS[request.param]


@pytest.fixture(params=ACTIONS)
def action(request):
    return ACTIONS[request.param][0]


@pytest.fixture
def setting(request, action, integrator):
    _, shape, steps, small = next(entry for entry in ACTIONS.values() if entry[0] is action)
    return shape, steps[0 if integrator.order == 2 else 1], small


def random_phase_space(action, shape, replica, generator):
    """Positions of ordinary size, momenta of the heat bath."""
    scale = 0.4 if action.field_name == "phi" else 1.0
    draw = {"generator": generator, "dtype": torch.float64}
    size = (replica, *action.field_shape(shape))
    return scale * torch.randn(*size, **draw), torch.randn(*size, **draw)


def energy(action, position, momentum):
    return action(position) + 0.5 * (momentum**2).flatten(1).sum(1)


def trajectory(action, integrator, position, momentum, *, steps, length=1.0):
    return integrate(action.force, position, momentum, integrator=integrator, step_size=length / steps, steps=steps)


# ---------------------------------------------------------------- the tables


def test_coefficients_of_either_kind_add_up_to_one(integrator):
    assert sum(integrator.kicks) == pytest.approx(1.0, abs=1e-15)
    assert sum(integrator.drifts) == pytest.approx(1.0, abs=1e-15)


def test_tables_are_palindromes_that_begin_and_end_with_a_kick(integrator):
    assert integrator.kicks == integrator.kicks[::-1]
    assert integrator.drifts == integrator.drifts[::-1]
    assert len(integrator.kicks) == len(integrator.drifts) + 1


@pytest.mark.parametrize(("name", "order", "forces"), [("leapfrog", 2, 1), ("omelyan", 2, 2), ("omelyan4", 4, 5)])
def test_a_step_costs_as_many_forces_as_it_has_drifts(name, order, forces):
    calls = []

    def force(x):
        calls.append(1)
        return -x

    one = torch.ones(1, 1, dtype=torch.float64)
    integrate(force, one, one, integrator=INTEGRATORS[name], step_size=0.1, steps=7)
    assert len(calls) == 7 * forces + 1
    assert INTEGRATORS[name].order == order


# ---------------------------------------------------------------- every integrator on every action


def test_energy_violation_has_the_order_of_the_integrator(action, integrator, setting, generator):
    """The fitted exponent of rms dH against the step size at length 1 is 2 or 4 within 0.2."""
    shape, steps, _ = setting
    position, momentum = random_phase_space(action, shape, 16, generator(1))
    before, numbers = energy(action, position, momentum), [steps, round(1.5 * steps), 2 * steps]
    violations = []
    for n in numbers:
        after = energy(action, *trajectory(action, integrator, position, momentum, steps=n))
        violations.append(float((after - before).square().mean().sqrt()))
    assert violations[-1] > 1e-9
    assert violations[0] < 1
    exponent = np.polyfit(-np.log(numbers), np.log(violations), 1)[0]
    assert exponent == pytest.approx(integrator.order, abs=0.2)


def test_trajectories_are_reversible(action, integrator, setting, generator):
    shape, steps, _ = setting
    position, momentum = random_phase_space(action, shape, 8, generator(2))
    moved, kicked = trajectory(action, integrator, position, momentum, steps=steps)
    assert (moved - position).abs().max() > 0.5
    back, flipped = trajectory(action, integrator, moved, -kicked, steps=steps)
    assert (back - position).abs().max() < 1e-10
    assert (flipped + momentum).abs().max() < 1e-10


def jacobian(action, integrator, position, momentum, *, steps):
    """Return `d(x', p') / d(x, p)` at one point, by four-point differences in one batch."""
    size, shape, h = position.numel(), position.shape[1:], 2e-3
    point = torch.cat([position.flatten(), momentum.flatten()])
    offsets = h * torch.eye(2 * size, dtype=torch.float64)
    batch = torch.cat([point + k * offsets for k in (-2, -1, 1, 2)])
    x, p = (half.reshape(-1, *shape) for half in batch.split(size, dim=1))
    moved, kicked = trajectory(action, integrator, x, p, steps=steps)
    low2, low, high, high2 = torch.cat([moved.flatten(1), kicked.flatten(1)], dim=1).split(2 * size)
    return ((low2 - 8 * low + 8 * high - high2) / (12 * h)).T


def test_trajectories_keep_the_phase_space_volume(action, integrator, setting, generator):
    """The Jacobian is symplectic, `J^T omega J = omega`, hence of determinant 1."""
    point = random_phase_space(action, setting[2], 1, generator(3))
    matrix = jacobian(action, integrator, *point, steps=3)
    size = len(matrix) // 2
    one, zero = torch.eye(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
    omega = torch.cat([torch.cat([zero, one], 1), torch.cat([-one, zero], 1)])
    assert (matrix - torch.eye(2 * size)).abs().max() > 0.5
    assert (matrix.T @ omega @ matrix - omega).abs().max() < 1e-6
    assert float(torch.linalg.det(matrix)) == pytest.approx(1.0, abs=1e-6)


def test_steps_may_differ_between_replica(action, integrator, setting, generator):
    position, momentum = random_phase_space(action, setting[0], 3, generator(4))
    sizes = torch.tensor([0.02, 0.05, 0.1], dtype=torch.float64)
    together = integrate(
        action.force,
        position,
        momentum,
        integrator=integrator,
        step_size=sizes.reshape(-1, *[1] * (position.dim() - 1)),
        steps=4,
    )
    for i, size in enumerate(sizes):
        alone = trajectory(
            action, integrator, position[i : i + 1], momentum[i : i + 1], steps=4, length=4 * float(size)
        )
        for first, second in zip(together, alone, strict=True):
            torch.testing.assert_close(first[i : i + 1], second, rtol=0, atol=1e-11)


# ---------------------------------------------------------------- the harmonic oscillator

OSCILLATOR = ScalarAction(0.5, 0.0)  # on one site `S = x^2 / 2`


def oscillate(integrator, step_size, steps):
    """Return the 2x2 matrix that takes (x, p) through a trajectory."""
    unit = torch.eye(2, dtype=torch.float64)
    moved, kicked = integrate(
        OSCILLATOR.force, unit[:, :1], unit[:, 1:], integrator=integrator, step_size=step_size, steps=steps
    )
    return torch.cat([moved, kicked], dim=1).T.numpy()


def test_oscillator_is_the_product_of_its_kicks_and_drifts(integrator):
    e, step = 0.3, np.eye(2)
    for i, kick in enumerate(integrator.kicks):
        step = np.array([[1, 0], [-kick * e, 1]]) @ step
        if i < len(integrator.drifts):
            step = np.array([[1, integrator.drifts[i] * e], [0, 1]]) @ step
    np.testing.assert_allclose(oscillate(integrator, e, 20), np.linalg.matrix_power(step, 20), rtol=0, atol=1e-13)


def test_oscillator_turns_like_the_exact_one(integrator):
    """The distance from the exact rotation by 2 goes down as the order says."""
    rotation = np.array([[math.cos(2), math.sin(2)], [-math.sin(2), math.cos(2)]])
    errors = [np.abs(oscillate(integrator, 2 / n, n) - rotation).max() for n in (10, 20, 40)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(integrator.order, abs=0.2)
    assert errors[-1] < 1e-3


def test_leapfrog_conserves_its_shadow_energy():
    """`p^2 + x^2 (1 - e^2 / 4)` exactly, and turns by `arccos(1 - e^2 / 2)` a step."""
    e, steps = 0.5, 37
    matrix = oscillate(INTEGRATORS["leapfrog"], e, steps)
    shadow = np.diag([1 - e**2 / 4, 1.0])
    np.testing.assert_allclose(matrix.T @ shadow @ matrix, shadow, rtol=0, atol=1e-13)
    assert np.trace(matrix) == pytest.approx(2 * math.cos(steps * math.acos(1 - e**2 / 2)), abs=1e-12)
