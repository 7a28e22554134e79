"""Composite kernels: names, columns, tuning, order, starts; and the means of the Schwinger model."""

import math

import pytest
import torch

from latticeflow.actions import HolonomyMarginal, SchwingerAction, U1Action
from latticeflow.flows import Sequential
from latticeflow.mcmc import HMC, ChainState, Composite, IndependenceMetropolis, Kernel, StepInfo, Winding
from latticeflow.priors import QuenchedU1
from latticeflow.samplers import FlowSampler

ACTION = U1Action(2.0)
PRIOR = QuenchedU1(2.0, (4, 4))


class Recorder(Kernel):
    """Adds its number to the field, notes what it was tuned with, and has a column and a parameter of its own."""

    def __init__(self, name, number, *, own=(), proposals=()):
        self.name, self.number, self.action, self.proposals = name, number, ACTION, proposals
        self.history = {"accepted": torch.bool, **dict.fromkeys(own, torch.float64)}
        self.tuned, self.gain = [], 1.0

    def start(self, replica, generator):
        return ChainState(torch.full((replica, 1), 1.0), torch.full((replica, 1), float(self.number)))

    def step(self, state, generator):
        columns = {name: torch.full((len(state.field),), float(self.number)) for name in self.history}
        columns["accepted"] = columns["accepted"] > 1
        proposed = {name: torch.full((1,), float(self.number)) for name in self.proposals}
        after = ChainState(10 * state.field + self.number, state.orbit)
        return after, StepInfo(columns, proposed, bad=self.number)

    def tune(self, info):
        self.tuned.append(info.history)

    @property
    def parameters(self):
        return {"gain": self.gain}

    @parameters.setter
    def parameters(self, values):
        self.gain = values["gain"]


@pytest.fixture
def kernels():
    return [
        Recorder("one", 1, own=("alone", "both")),
        Recorder("two", 2, own=("both",), proposals=("log_weight",)),
        Recorder("three", 3),
    ]


def test_kernels_step_in_their_order(kernels, generator):
    composite = Composite(kernels)
    state, info = composite.step(composite.start(2, generator(1)), generator(1))
    assert state.field.tolist() == [[1123.0]] * 2
    assert info.bad == 6
    reverse = Composite(kernels[::-1])
    assert reverse.step(reverse.start(1, generator(1)), generator(1))[0].field.tolist() == [[1321.0]]


def test_shared_columns_get_the_name_of_their_kernel(kernels, generator):
    composite = Composite(kernels)
    assert composite.history == {
        "accepted_one": torch.bool,
        "alone": torch.float64,
        "both_one": torch.float64,
        "accepted_two": torch.bool,
        "both_two": torch.float64,
        "accepted_three": torch.bool,
    }
    _, info = composite.step(composite.start(2, generator(1)), generator(1))
    assert set(info.history) == set(composite.history)
    assert info.history["both_one"].tolist() == [1.0, 1.0]
    assert info.history["both_two"].tolist() == [2.0, 2.0]
    assert info.history["accepted_one"].tolist() == [False, False]
    assert composite.proposals == ("log_weight",)
    assert info.proposals["log_weight"].tolist() == [2.0]


def test_every_kernel_is_tuned_with_its_own_columns(kernels, generator):
    composite = Composite(kernels)
    _, info = composite.step(composite.start(1, generator(1)), generator(1))
    composite.tune(info)
    for kernel in kernels:
        (seen,) = kernel.tuned
        assert set(seen) == set(kernel.history)
        assert all(float(values[0]) == kernel.number for name, values in seen.items() if name != "accepted")


def test_parameters_round_trip(kernels):
    composite = Composite(kernels)
    kernels[1].gain = 5.0
    assert composite.parameters == {"one.gain": 1.0, "two.gain": 5.0, "three.gain": 1.0}
    composite.parameters = {"one.gain": 2.0, "two.gain": 3.0, "three.gain": 4.0}
    assert [kernel.gain for kernel in kernels] == [2.0, 3.0, 4.0]


def test_chains_start_as_those_of_the_kernel_that_proposes(kernels, generator):
    assert float(Composite(kernels).start(1, generator(1)).orbit) == 2.0
    assert float(Composite([kernels[2], kernels[0]]).start(1, generator(1)).orbit) == 3.0


@pytest.mark.parametrize("names", [(), ("one",), ("one", "one")])
def test_names_must_be_two_and_different(names):
    with pytest.raises(ValueError, match=r"at least two kernels of different names, got \["):
        Composite([Recorder(name, 1) for name in names])


def test_actions_must_be_equal(kernels):
    kernels[1].action = U1Action(2.0)
    Composite(kernels)
    kernels[1].action = U1Action(3.0)
    with pytest.raises(ValueError, match=r"different actions: .*U1Action\(beta=2.0\), U1Action\(beta=3.0\)"):
        Composite(kernels)


def test_composites_nest(kernels, generator):
    inner = Composite(kernels[:2])
    outer = Composite([inner, kernels[2]])
    state, info = outer.step(outer.start(1, generator(1)), generator(1))
    assert float(state.field) == 1123.0
    assert set(info.history) == set(outer.history)
    outer.parameters = outer.parameters | {"composite.two.gain": 7.0}
    assert kernels[1].gain == 7.0


# ---------------------------------------------------------------- real kernels


def real(action, prior, **settings):
    sampler = FlowSampler(prior, Sequential())
    return Composite(
        [
            HMC(action, prior, **settings),
            Winding(action, prior),
            IndependenceMetropolis(sampler, action, candidates=256),
        ]
    )


def test_columns_of_real_kernels():
    assert real(ACTION, PRIOR).history == {
        "accepted_hmc": torch.bool,
        "delta_h": torch.float64,
        "accepted_winding": torch.bool,
        "accepted_independence": torch.bool,
        "log_q": torch.float64,
        "log_weight": torch.float64,
    }


def test_a_step_is_that_of_the_kernels_one_after_the_other(generator):
    composite, draws = real(ACTION, PRIOR, step_size=0.3), generator(2)
    before = composite.start(16, generator(3))
    after, info = composite.step(before, generator(2))
    state, infos = before, []
    for kernel in composite.kernels:
        state, own = kernel.step(state, draws)
        infos.append(own)
    assert torch.equal(after.field, state.field)
    assert torch.equal(after.log_weight, state.log_weight)
    for name, own in zip(("hmc", "winding", "independence"), infos, strict=True):
        assert torch.equal(info.history[f"accepted_{name}"], own.history["accepted"])
    assert torch.equal(info.history["delta_h"], infos[0].history["delta_h"])
    assert torch.equal(info.proposals["log_weight"], infos[2].proposals["log_weight"])


def test_tuning_changes_the_step_of_hmc(generator):
    composite, draws = real(ACTION, PRIOR, step_size=0.01, integrator="leapfrog"), generator(4)
    state = composite.start(64, draws)
    for _ in range(15):
        state, info = composite.step(state, draws)
        composite.tune(info)
    assert composite.parameters["hmc.tunings"] == 15
    assert 0.15 < composite.parameters["hmc.step_size"] < 0.6
    assert set(composite.parameters) == {"hmc.step_size", "hmc.tunings"}
    other = real(ACTION, PRIOR)
    other.parameters = composite.parameters
    assert other.parameters == composite.parameters


@pytest.mark.parametrize("grid", [None, (2, 3)])
def test_schwinger_model(grid, run_chains):
    """4x4, beta 1, kappa 0.20 (PHYSICS, section 4): 4 standard deviations, both errors combined, 4e-4 for all six."""
    action = SchwingerAction(1.0, 0.20)
    action = HolonomyMarginal(action, grid) if grid else action
    trusted = {
        "plaquette": (0.46005, 0.00035),
        "topological_susceptibility": (0.03881, 0.00013),
        "condensate": (1.960678, 0.000095),
    }
    kernel = real(action, QuenchedU1(1.1, (4, 4)), step_size=0.5, integrator="leapfrog")
    chains = run_chains(kernel, list(trusted), replica=128, steps=12, burn=2, seed=5)
    for name, (value, error) in trusted.items():
        mean, found = chains.mean(name)
        assert abs(mean - value) < 4 * math.hypot(found, error), name
        assert found < 0.05 * value
    for name in ("accepted_hmc", "accepted_winding", "accepted_independence"):
        assert 0.2 < chains.history[name].mean() < 0.95
