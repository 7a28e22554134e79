"""Hybrid Monte Carlo through a flow: the pulled-back action, the order of its energy, exactness with any flow.

Means compare at 4 standard deviations, 6e-4 for the ten of them; `<exp(-dH)>` at 3, 6e-3 for the two; seeds are fixed.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from latticeflow.actions import Action, HolonomyMarginal, SchwingerAction, U1Action
from latticeflow.exact import u1_plaquette, u1_susceptibility
from latticeflow.flows import Sequential, gauge_flow
from latticeflow.mcmc import HMC, FlowHMC, PulledBack
from latticeflow.mcmc.integrators import INTEGRATORS, integrate
from latticeflow.priors import HaarUniform, QuenchedU1
from latticeflow.samplers import FlowSampler
from latticeflow.stats import gamma_method

SHAPE = (4, 4)


def perturbed_gauge_flow(scale=0.1):
    """Two couplings whose weights are far enough from the identity to matter, in single precision as trained."""
    torch.manual_seed(7)
    flow = gauge_flow(SHAPE, layers=2, hidden=[4])
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return flow


class AutogradU1(U1Action):
    """The same action, its force by automatic differentiation as the pulled-back one has it."""

    force = Action.force


@pytest.fixture(params=["sine", "gauge"])
def flow(request, sine_flow):
    return sine_flow(SHAPE) if request.param == "sine" else perturbed_gauge_flow()


# ---------------------------------------------------------------- the identity


@pytest.mark.parametrize("jitter", [0.0, 0.3])
def test_with_the_identity_it_is_hmc(jitter, generator):
    prior, settings = QuenchedU1(2.0, SHAPE), {"step_size": 0.3, "integrator": "leapfrog", "jitter": jitter}
    plain = HMC(AutogradU1(2.0), prior, **settings)
    through = FlowHMC(AutogradU1(2.0), FlowSampler(prior, Sequential()), **settings)
    runs = []
    for kernel in (plain, through):
        draws = generator(1)
        state = kernel.start(32, draws)
        for _ in range(3):
            state, info = kernel.step(state, draws)
        runs.append((state, info))
    assert torch.equal(runs[0][0].field, runs[1][0].field)
    assert torch.equal(runs[0][0].orbit, runs[1][0].orbit)
    assert torch.equal(runs[0][1].history["delta_h"], runs[1][1].history["delta_h"])
    assert not runs[0][1].accepted.all()


def test_with_the_identity_it_is_hmc_with_fermions(generator):
    """The force of the determinant is the same up to rounding."""
    action, prior = SchwingerAction(1.0, 0.2), QuenchedU1(1.0, SHAPE)
    kernels = HMC(action, prior, step_size=0.5), FlowHMC(action, FlowSampler(prior, Sequential()), step_size=0.5)
    before = kernels[0].start(8, generator(2))
    (first, first_info), (second, second_info) = (kernel.step(before, generator(3)) for kernel in kernels)
    assert_close(first.field, second.field, rtol=0, atol=1e-10)
    assert_close(first_info.history["delta_h"], second_info.history["delta_h"], rtol=0, atol=1e-10)


# ---------------------------------------------------------------- the pulled-back action


def test_pulled_back_action_is_that_of_the_latent_density(flow, generator):
    action = U1Action(1.0)
    flow = flow.double()
    pulled = PulledBack(action, flow)
    z = HaarUniform(SHAPE).sample(3, generator(4))
    x, log_det = flow(z)
    assert_close(pulled(z), action(x) - log_det)
    assert log_det.abs().max() > 0.1
    assert pulled.theory == "u1"
    assert pulled.field_name == "links"
    assert pulled.field_shape(SHAPE) == (2, *SHAPE)


@pytest.mark.parametrize("action", [U1Action(1.0), SchwingerAction(1.0, 0.2)])
def test_force_is_minus_the_gradient_by_finite_differences(flow, action, generator):
    pulled, step = PulledBack(action, flow.double()), 1e-4
    z = HaarUniform(SHAPE).sample(2, generator(5))
    force = pulled.force(z)
    assert not force.requires_grad
    for component in itertools.islice(itertools.product(range(2), range(4), range(4)), 0, 32, 3):
        moved = [z.clone() for _ in range(4)]
        for copy, k in zip(moved, (-2, -1, 1, 2), strict=True):
            copy[(slice(None), *component)] += k * step
        with torch.no_grad():
            low2, low, high, high2 = (pulled(copy) for copy in moved)
        slope = (low2 - 8 * low + 8 * high - high2) / (12 * step)
        assert_close(force[(slice(None), *component)], -slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_energy_violation_has_the_order_of_the_integrator(integrator, sine_flow, generator):
    """Through a smooth flow; a spline has kinks in its slope, and there the order is lower."""
    pulled, table = PulledBack(U1Action(2.0), sine_flow(SHAPE)), INTEGRATORS[integrator]
    z = QuenchedU1(2.0, SHAPE).sample(16, generator(6))
    momentum = torch.randn(z.shape, generator=generator(7), dtype=torch.float64)
    numbers, violations = ([16, 24, 32] if table.order == 2 else [10, 14, 20]), []
    for n in numbers:
        moved, kicked = integrate(pulled.force, z, momentum, integrator=table, step_size=1 / n, steps=n)
        delta_h = pulled(moved) - pulled(z) + 0.5 * (kicked**2 - momentum**2).flatten(1).sum(1)
        violations.append(float(delta_h.square().mean().sqrt()))
    exponent = np.polyfit(-np.log(numbers), np.log(violations), 1)[0]
    assert exponent == pytest.approx(table.order, abs=0.2)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_trajectories_are_reversible(flow, integrator, generator):
    pulled = PulledBack(U1Action(2.0), flow.double())
    z = HaarUniform(SHAPE).sample(4, generator(8))
    momentum = torch.randn(z.shape, generator=generator(9), dtype=torch.float64)
    settings = {"integrator": INTEGRATORS[integrator], "step_size": 0.1, "steps": 6}
    moved, kicked = integrate(pulled.force, z, momentum, **settings)
    back, flipped = integrate(pulled.force, moved, -kicked, **settings)
    assert (moved - z).abs().max() > 0.5
    assert (back - z).abs().max() < 1e-10
    assert (flipped + momentum).abs().max() < 1e-10


# ---------------------------------------------------------------- the kernel


def test_delta_h_is_that_of_the_latent_energy(flow, generator):
    """From the field back to z: the energy of the trajectory's two ends, the Jacobian included."""
    action = U1Action(1.0)
    kernel = FlowHMC(action, FlowSampler(HaarUniform(SHAPE), flow), step_size=0.25, integrator="leapfrog")
    before = kernel.start(16, generator(10))
    after, info = kernel.step(before, generator(11))
    z, _ = kernel.flow.inverse(before.field)
    momentum = torch.randn(z.shape, generator=generator(11), dtype=torch.float64)
    moved, kicked = kernel.trajectory(z.detach(), momentum)
    pulled = PulledBack(action, kernel.flow)
    delta_h = pulled(moved) - pulled(z) + 0.5 * (kicked**2 - momentum**2).flatten(1).sum(1)
    assert_close(info.history["delta_h"], delta_h.detach(), rtol=0, atol=1e-8)
    assert info.accepted.sum() > 0
    assert_close(after.field[info.accepted], kernel.flow(moved)[0].detach()[info.accepted], rtol=0, atol=1e-9)
    assert torch.equal(after.field[~info.accepted], before.field[~info.accepted])
    for tensor in (after.field, after.orbit, info.history["delta_h"]):
        assert tensor.dtype == torch.float64
        assert not tensor.requires_grad


def test_it_is_named_and_starts_from_the_sampler(sine_flow, generator):
    sampler = FlowSampler(QuenchedU1(1.0, SHAPE), sine_flow(SHAPE))
    kernel = FlowHMC(U1Action(1.0), sampler)
    assert kernel.name == "flow_hmc"
    start = kernel.start(5, generator(12)).field
    offered = sampler.sample(40, generator(12))[0]
    assert all((field == offered).flatten(1).all(1).sum() == 1 for field in start)


def test_its_settings_are_those_of_hmc(sine_flow):
    sampler = FlowSampler(QuenchedU1(1.0, SHAPE), sine_flow(SHAPE))
    kernel = FlowHMC(U1Action(1.0), sampler, trajectory_length=2.0, step_size=0.5, integrator="leapfrog")
    assert kernel.steps == 4
    with pytest.raises(ValueError, match="jitter must be in"):
        FlowHMC(U1Action(1.0), sampler, jitter=2.0)


def test_exact_in_pure_gauge_theory(flow, run_chains):
    """Any flow gives the exact means, and `<exp(-dH)> = 1`, at an acceptance clearly below 1."""
    sine = not isinstance(flow, Sequential)
    replica, step_size = (256, 0.34) if sine else (96, 0.2)
    kernel = FlowHMC(
        U1Action(1.0), FlowSampler(QuenchedU1(1.0, SHAPE), flow), step_size=step_size, integrator="leapfrog"
    )
    names = ["plaquette", "topological_susceptibility"]
    chains = run_chains(kernel, names, replica=replica, steps=20, burn=10, seed=13)
    for name, exact in zip(names, (u1_plaquette(1.0, SHAPE), u1_susceptibility(1.0, SHAPE)), strict=True):
        mean, error = chains.mean(name)
        assert abs(mean - exact) < 4 * error, name
        assert error < 0.12 * exact
    result = gamma_method(np.exp(-chains.history["delta_h"]))
    assert abs(result.mean - 1) < 3 * result.error
    assert result.error < 0.05
    assert 0.3 < chains.history["accepted"].mean() < 0.95


@pytest.mark.parametrize("grid", [None, pytest.param((2, 3), marks=pytest.mark.long)])
def test_exact_with_fermions(grid, sine_flow, run_chains):
    """4x4, beta 1, kappa 0.20 (PHYSICS, section 4), with and without the holonomy marginal."""
    action = SchwingerAction(1.0, 0.20)
    action = HolonomyMarginal(action, grid) if grid else action
    sampler = FlowSampler(QuenchedU1(1.0, SHAPE), sine_flow(SHAPE, strength=0.3))
    kernel = FlowHMC(action, sampler, step_size=0.5, integrator="leapfrog")
    chains = run_chains(kernel, ["plaquette", "condensate"], replica=96, steps=12, burn=6, seed=14)
    for name, (value, error) in {"plaquette": (0.46005, 0.00035), "condensate": (1.960678, 0.000095)}.items():
        mean, found = chains.mean(name)
        assert abs(mean - value) < 4 * math.hypot(error, found), name
        assert found < 0.02 * value
