"""Hybrid Monte Carlo: one step, its purity, energies that are not finite, tuning and arguments."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch.testing import assert_close

from latticeflow.actions import Action, HolonomyMarginal, ScalarAction, SchwingerAction, U1Action
from latticeflow.mcmc import HMC, ChainState, Kernel, StepInfo, integrate
from latticeflow.mcmc.integrators import INTEGRATORS
from latticeflow.priors import HaarUniform, Normal, QuenchedU1

CASES = {
    "scalar": (ScalarAction(-4.0, 8.0), Normal((4, 4), scale=0.4), 0.3),
    "u1": (U1Action(2.0), QuenchedU1(2.0, (4, 4)), 0.4),
    "schwinger": (SchwingerAction(1.0, 0.2), QuenchedU1(1.0, (4, 6)), 0.5),
    "marginal": (HolonomyMarginal(SchwingerAction(1.0, 0.2), (2, 3)), QuenchedU1(1.0, (4, 4)), 0.5),
}


def one_step(name, generator, *, replica=32, **settings):
    """Return the kernel, the state before, the state after and the step's info."""
    action, prior, step_size = CASES[name]
    kernel = HMC(action, prior, **{"step_size": step_size, "integrator": "leapfrog"} | settings)
    draws = generator(1)
    before = kernel.start(replica, draws)
    return kernel, before, *kernel.step(before, draws)


@pytest.fixture(params=CASES)
def case(request):
    return request.param


# ---------------------------------------------------------------- one step


def test_step_accepts_with_the_energy_along_its_trajectory(case, generator):
    """The step written out: momenta, trajectory, `H' - H`, uniform numbers, in this order of one stream."""
    kernel, before, after, info = one_step(case, generator)
    action, draws = kernel.action.bare, generator(1)
    kernel.start(32, draws)
    momentum = torch.randn(before.field.shape, generator=draws, dtype=torch.float64)
    moved, kicked = integrate(
        action.force,
        before.field,
        momentum,
        integrator=INTEGRATORS["leapfrog"],
        step_size=1.0 / kernel.steps,
        steps=kernel.steps,
    )
    kinetic = 0.5 * ((kicked**2).flatten(1).sum(1) - (momentum**2).flatten(1).sum(1))
    delta_h = action(moved) - action(before.field) + kinetic
    accepted = torch.rand(32, generator=draws, dtype=torch.float64) < torch.exp(-delta_h)
    assert_close(info.history["delta_h"], delta_h, rtol=0, atol=1e-9)
    assert torch.equal(info.accepted, accepted)
    assert 4 <= accepted.sum() <= 28
    if not isinstance(kernel.action, HolonomyMarginal):
        assert_close(after.field[accepted], action.wrap(moved)[accepted], rtol=0, atol=1e-11)


def test_rejected_replica_stay_bit_for_bit(case, generator):
    kernel, before, after, info = one_step(case, generator)
    assert not info.accepted.all()
    if isinstance(kernel.action, HolonomyMarginal):
        first, second = (kernel.action.marginal(state.orbit)[~info.accepted] for state in (before, after))
        assert_close(first, second, rtol=0, atol=1e-12)
        assert (after.action != before.action)[~info.accepted].any()  # drawn afresh along the orbit
        return
    assert torch.equal(after.field[~info.accepted], before.field[~info.accepted])
    assert torch.equal(after.orbit[~info.accepted], before.orbit[~info.accepted])
    assert (after.field != before.field).flatten(1).any(1)[info.accepted].all()


def test_state_after_a_step_is_consistent_and_knows_no_sampler(case, generator):
    kernel, _, after, info = one_step(case, generator)
    assert_close(after.orbit, kernel.action.orbit(after.field), rtol=0, atol=1e-9)
    assert after.field.dtype == after.orbit.dtype == torch.float64
    assert after.log_q is None
    assert after.log_weight is None
    assert {name: values.dtype for name, values in info.history.items()} == kernel.history
    assert all(values.shape == (32,) for values in info.history.values())
    assert not info.proposals
    assert info.bad == 0


def test_step_is_pure(case, generator):
    """It changes neither the state that it is given nor the kernel; the same generator gives the same step."""
    kernel, before, _, _ = one_step(case, generator, jitter=0.3)
    field, orbit, parameters = before.field.clone(), before.orbit.clone(), kernel.parameters
    steps = [kernel.step(before, generator(seed)) for seed in (2, 2, 3)]
    assert torch.equal(before.field, field)
    assert torch.equal(before.orbit, orbit)
    assert kernel.parameters == parameters
    (first, first_info), (second, second_info), (third, _) = steps
    assert torch.equal(first.field, second.field)
    assert torch.equal(first.orbit, second.orbit)
    assert torch.equal(first_info.history["delta_h"], second_info.history["delta_h"])
    assert not torch.equal(first.field, third.field)


def test_replica_do_not_mix(generator):
    """The first of many replica moves as it does among others: only its own energy counts."""
    kernel, before, _, _ = one_step("schwinger", generator)
    momentum = torch.randn(before.field.shape, generator=generator(4), dtype=torch.float64)
    together = kernel.trajectory(before.field, momentum)
    alone = kernel.trajectory(before.field[:1], momentum[:1])
    for first, second in zip(together, alone, strict=True):
        assert_close(first[:1], second, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["u1", "schwinger", "marginal"])
def test_links_stay_on_their_branch(name, generator):
    """They are in `(-pi, pi]` after every step, that of the holonomies included."""
    action, _, step_size = CASES[name]
    kernel, draws = HMC(action, HaarUniform((4, 4)), step_size=step_size), generator(5)
    state = kernel.start(16, draws)
    for _ in range(5):
        state, _ = kernel.step(state, draws)
        assert state.field.max() <= math.pi
        assert state.field.min() > -math.pi
    assert state.field.abs().max() > 3


@pytest.mark.parametrize(
    ("length", "step_size", "steps"), [(1.0, 0.1, 10), (1.0, 0.11, 10), (0.3, 0.1, 3), (1.0, 7.0, 1), (2.0, 0.3, 7)]
)
def test_steps_of_a_trajectory(length, step_size, steps):
    """`ceil(length / step_size)`, with no extra step for a rounding error."""
    kernel = HMC(U1Action(1.0), HaarUniform((4, 4)), trajectory_length=length, step_size=step_size)
    assert kernel.steps == steps


def test_jitter_scales_the_steps_of_each_replica(generator):
    """Equal replica without it end at one point; with it within what factors in `1 -+ jitter` allow, and not at one."""
    action, length, jitter = ScalarAction(0.5, 0.0), 0.5, 0.4
    field, momentum = torch.zeros(2, 64, 1, dtype=torch.float64)
    momentum = momentum + 1.0
    ends = {}
    for j in (0.0, jitter):
        kernel = HMC(action, Normal((1,)), trajectory_length=length, step_size=0.01, jitter=j)
        ends[j] = kernel.trajectory(field, momentum, generator(6))[0]
    times = torch.asin(ends[jitter]) / length
    assert (ends[0.0] == ends[0.0][0]).all()
    assert times.min() == pytest.approx(1 - jitter, abs=0.1)
    assert times.max() == pytest.approx(1 + jitter, abs=0.1)
    assert times.min() > 1 - jitter - 1e-3
    assert times.max() < 1 + jitter + 1e-3


# ---------------------------------------------------------------- energies that are not finite


@dataclass(frozen=True)
class Cliff(Action):
    """`x^2 / 2` on one site, and `beyond` where x > 0.7; the force knows nothing of it."""

    beyond: float

    def __call__(self, field):
        energy = 0.5 * (field**2).flatten(1).sum(1)
        return torch.where(field[:, 0] > 0.7, torch.full_like(energy, self.beyond), energy)

    def force(self, field):
        return -field

    def field_shape(self, shape):
        return (1,)


@pytest.mark.parametrize("beyond", [math.nan, math.inf, -math.inf])
def test_non_finite_energies_are_rejected_and_counted(beyond, generator, constant):
    kernel = HMC(Cliff(beyond), constant((1,), 0.3), trajectory_length=2.0, step_size=0.05)
    before = kernel.start(400, generator(7))
    after, info = kernel.step(before, generator(8))
    bad = torch.isposinf(info.history["delta_h"])
    assert 50 < info.bad == bad.sum() < 350
    assert not info.accepted[bad].any()
    assert torch.equal(after.field[bad], before.field[bad])
    assert torch.equal(after.orbit[bad], before.orbit[bad])
    assert info.accepted[~bad].double().mean() > 0.9
    assert not torch.isnan(info.history["delta_h"]).any()


def test_trajectories_that_diverge_are_rejected(generator):
    kernel = HMC(ScalarAction(-4.0, 8.0), Normal((4, 4)), trajectory_length=50.0, step_size=2.0)
    before = kernel.start(8, generator(9))
    after, info = kernel.step(before, generator(10))
    assert info.bad == 8
    assert torch.equal(after.field, before.field)
    kernel.tune(info)
    assert 0 < kernel.step_size < 2.0


# ---------------------------------------------------------------- tuning


def tuned(generator, *, step_size, target=0.8, integrator="leapfrog"):
    kernel = HMC(
        U1Action(3.0),
        QuenchedU1(3.0, (8, 8)),
        trajectory_length=1.5,
        step_size=step_size,
        integrator=integrator,
        target_acceptance=target,
    )
    draws = generator(11)
    state = kernel.start(96, draws)
    for _ in range(30):
        state, info = kernel.step(state, draws)
        kernel.tune(info)
    return kernel, state, draws


@pytest.mark.parametrize(
    ("start", "target", "integrator"),
    [(1.4, 0.8, "leapfrog"), (0.014, 0.8, "leapfrog"), (1.4, 0.6, "leapfrog"), (0.03, 0.9, "omelyan4")],
)
def test_tuning_reaches_the_target(start, target, integrator, generator):
    """From ten times too long and too short a step; the error of the measured acceptance is 0.008."""
    kernel, state, draws = tuned(generator, step_size=start, target=target, integrator=integrator)
    found = kernel.parameters
    acceptance = 0.0
    for _ in range(25):
        state, info = kernel.step(state, draws)
        acceptance += float(info.accepted.double().mean()) / 25
    assert kernel.parameters == found
    assert found["tunings"] == 30
    assert acceptance > target - 0.05
    shorter = HMC(
        kernel.action,
        kernel.draws,
        trajectory_length=1.5,
        step_size=1.5 / max(1, kernel.steps - 1) * 1.0001,
        integrator=integrator,
    )
    _, info = shorter.step(state, draws)
    one_step_less = float(torch.exp(-info.history["delta_h"].clamp(min=0)).mean())
    assert acceptance < target + 0.05 or one_step_less < target + 0.05
    if kernel.steps > 8:
        assert acceptance == pytest.approx(target, abs=0.05)


def info_of(delta_h):
    """A step in which every replica has this delta_h."""
    return StepInfo({"delta_h": torch.full((4,), delta_h, dtype=torch.float64)})


@pytest.mark.parametrize(("delta_h", "factor"), [(-1.0, 2.0), (0.0, 2.0), (50.0, 0.5), (math.inf, 0.5)])
def test_one_correction_is_at_most_a_factor_of_two(delta_h, factor):
    kernel = HMC(U1Action(1.0), HaarUniform((4, 4)), step_size=0.25)
    kernel.tune(info_of(delta_h))
    assert kernel.step_size == pytest.approx(0.25 * factor)


def test_a_step_is_never_longer_than_the_trajectory():
    kernel = HMC(U1Action(1.0), HaarUniform((4, 4)), step_size=0.9, trajectory_length=1.0)
    for _ in range(5):
        kernel.tune(info_of(0.0))
    assert kernel.step_size == 1.0
    assert kernel.steps == 1


def test_at_the_target_the_step_stays():
    kernel = HMC(U1Action(1.0), HaarUniform((4, 4)), step_size=0.1, target_acceptance=0.8)
    kernel.tune(info_of(-math.log(0.8)))
    assert kernel.step_size == pytest.approx(0.1)


def test_parameters_round_trip(generator):
    kernel, _, _ = tuned(generator, step_size=0.05)
    other = HMC(kernel.action, kernel.draws, trajectory_length=1.5, integrator="leapfrog")
    assert other.parameters != kernel.parameters
    other.parameters = kernel.parameters
    assert other.parameters == kernel.parameters
    state = kernel.start(8, generator(12))
    first, second = (k.step(state, generator(13))[0] for k in (kernel, other))
    assert torch.equal(first.field, second.field)


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"integrator": "euler"}, "integrator must be one of leapfrog, omelyan, omelyan4, got 'euler'"),
        ({"trajectory_length": 0.0}, "trajectory_length must be between 0 and inf, got 0.0"),
        ({"trajectory_length": math.inf}, "trajectory_length must be between 0 and inf, got inf"),
        ({"step_size": -0.1}, "step_size must be between 0 and inf, got -0.1"),
        ({"step_size": math.nan}, "step_size must be between 0 and inf, got nan"),
        ({"target_acceptance": 1.0}, "target_acceptance must be between 0 and 1, got 1.0"),
        ({"target_acceptance": 0.0}, "target_acceptance must be between 0 and 1, got 0.0"),
        ({"jitter": 1.0}, r"jitter must be in \[0, 1\), got 1.0"),
        ({"jitter": -0.1}, r"jitter must be in \[0, 1\), got -0.1"),
        ({"jitter": math.nan}, r"jitter must be in \[0, 1\), got nan"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        HMC(U1Action(1.0), HaarUniform((4, 4)), **settings)


def test_start_takes_different_draws_by_their_weight(generator):
    """Normal draws of width 1 for a target of width 1/2: the mean of phi^2 comes close to the target's 1/4.

    4096 draws out of 32768, no one twice; the bounds are ten standard deviations off.
    """
    kernel = HMC(ScalarAction(2.0, 0.0), Normal((1, 1)))
    fields = kernel.start(4096, generator(15)).field
    assert len(fields.unique()) == 4096
    assert 0.2 < float((fields**2).mean()) < 0.4


def test_start_draws_in_double_precision(generator):
    class Single:
        def sample(self, n, generator=None):
            return torch.zeros(n, 2, 4, 4)

        def log_prob(self, x):
            return torch.zeros(len(x))

    kernel = HMC(U1Action(1.0), Single())
    state = kernel.start(3, generator(14))
    assert isinstance(kernel, Kernel)
    assert isinstance(state, ChainState)
    assert state.field.dtype == torch.float64
    assert_close(state.action, torch.full((3,), -16.0, dtype=torch.float64))
