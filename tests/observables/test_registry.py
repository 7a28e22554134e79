"""Which observables a theory has, and their evaluation in chunks."""

import re

import pytest
import torch

from latticeflow.actions import HolonomyMarginal, ScalarAction, SchwingerAction, U1Action
from latticeflow.observables import fermion, gauge, measure, observable_names, observables, scalar
from latticeflow.observables.fermion import condensate, log_det
from latticeflow.observables.measurement import BUDGET, CHUNK
from latticeflow.priors import HaarUniform, Normal

SCALAR = [
    "magnetisation",
    "abs_magnetisation",
    "magnetisation_squared",
    "phi_squared",
    "phi_fourth",
    "phi_neighbour",
    "momentum_min",
]
SCALAR_NAMED = ["momentum_zero", "two_point"]
GAUGE = ["plaquette", "topological_charge", "topological_charge2", "topological_susceptibility"]
GAUGE_NAMED = [
    "wilson_loops",
    "polyakov_time_real",
    "polyakov_time_imaginary",
    "polyakov_time_abs",
    "polyakov_space_real",
    "polyakov_space_imaginary",
    "polyakov_space_abs",
    "polyakov_correlator",
]
FERMION = ["condensate", "log_det"]
MESONS = ["pion_correlator", "axial_correlator", "eta_disconnected"]
FERMION_NAMED = [*MESONS, "chiral_susceptibility_connected"]
NAMED = {
    "scalar": SCALAR_NAMED,
    "u1": GAUGE_NAMED,
    "schwinger": GAUGE_NAMED + FERMION_NAMED,
    "u1 marginal": GAUGE_NAMED,
    "schwinger marginal": GAUGE_NAMED + FERMION_NAMED,
}
THEORIES = {
    "scalar": (ScalarAction(-4.0, 8.0), SCALAR),
    "u1": (U1Action(2.0), GAUGE),
    "schwinger": (SchwingerAction(2.0, 0.25), GAUGE + FERMION),
    "u1 marginal": (HolonomyMarginal(U1Action(2.0), (2, 2)), GAUGE),
    "schwinger marginal": (HolonomyMarginal(SchwingerAction(2.0, 0.25), (2, 2)), GAUGE + FERMION),
}


def sample(action, n, *, seed=1):
    prior = Normal((3, 4)) if action.field_name == "phi" else HaarUniform((3, 4))
    return prior.sample(n, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("theory", THEORIES)
def test_names_of_each_theory(theory):
    action, names = THEORIES[theory]
    assert list(observables(action)) == names
    for name in names:
        assert list(observables(action, [name])) == [name]
    assert list(observables(action, names[::-1])) == names[::-1]
    every = [*names, *NAMED[theory]]
    assert observable_names(action) == tuple(every)
    assert list(observables(action, every[::-1])) == every[::-1]


@pytest.mark.parametrize("theory", THEORIES)
def test_names_stand_for_their_functions(theory):
    action, names = THEORIES[theory]
    field = sample(action, 5)
    functions = dict(
        zip(GAUGE, (gauge.plaquette, gauge.charge, gauge.charge_squared, gauge.susceptibility), strict=True)
    )
    functions |= {name: getattr(scalar, name) for name in SCALAR}
    functions |= {name: getattr(scalar, name) for name in SCALAR_NAMED}
    functions |= {name: getattr(gauge, name) for name in ("wilson_loops", "polyakov_correlator")}
    functions |= {name: lambda x, name=name: gauge.polyakov_loops(x)[name] for name in GAUGE_NAMED[1:-1]}
    functions |= {"condensate": lambda x: condensate(x, 0.25), "log_det": lambda x: log_det(x, 0.25)}
    functions |= {name: lambda x, name=name: getattr(fermion, name)(x, 0.25) for name in FERMION_NAMED}
    every = observable_names(action)
    for name, values in measure(field, observables(action, every)).items():
        assert torch.equal(values, functions[name](field))
        assert torch.equal(values, observables(action, [name])[name](field))
        assert values.dtype == torch.float64
        assert values.shape == (5,) or name not in names
        assert len(values) == 5
    assert set(every) <= set(functions)


@pytest.mark.parametrize("theory", THEORIES)
@pytest.mark.parametrize("n", [1, 255, 256, 257, 600])
def test_chunks_change_nothing(theory, n):
    action, names = THEORIES[theory]
    field = sample(action, n)
    wanted = observables(action)
    found = measure(field, wanted)
    assert list(found) == names
    for name, observable in wanted.items():
        assert found[name].shape == (n,)
        torch.testing.assert_close(found[name], observable(field), rtol=1e-12, atol=1e-12)


def test_chunks_are_bounded():
    sizes = []

    def spy(field):
        sizes.append(len(field))
        return field[:, 0]

    field = torch.arange(2000.0)[:, None]
    assert torch.equal(measure(field, {"first": spy})["first"], field[:, 0])
    assert len(sizes) > 1
    assert max(sizes) <= 512


@pytest.mark.parametrize("members", [MESONS, MESONS[1:2], [MESONS[2], "plaquette", MESONS[0]]])
def test_what_is_computed_together_is_computed_once(monkeypatch, members):
    calls = []
    original = fermion.correlators
    monkeypatch.setattr(fermion, "correlators", lambda *args: calls.append(len(args[0])) or original(*args))
    action, _ = THEORIES["schwinger"]
    assert list(measure(sample(action, 5), observables(action, members))) == members
    assert calls == [5]


@pytest.mark.parametrize("shape", [(2, 2), (16, 16), (32, 32), (128, 128)])
def test_configurations_at_once_fit_in_memory(monkeypatch, shape):
    """A configuration at a time where even one is too large; the propagator of one source slice and a few factors."""
    sizes = []

    def spy(links, kappa):
        sizes.append(len(links))
        return dict.fromkeys(MESONS, links[:, 0, 0, 0])

    monkeypatch.setattr(fermion, "correlators", spy)
    links = torch.zeros(1, 2, 1, 1, dtype=torch.float64).expand(300, 2, *shape)
    measure(links, observables(THEORIES["schwinger"][0], MESONS))
    assert sum(sizes) == 300
    slice_columns = 16 * shape[0] * (2 * shape[1]) ** 2
    assert max(sizes) == 1 or max(sizes) * slice_columns <= BUDGET / 8
    assert max(sizes) <= CHUNK
    assert (max(sizes) == 1) == (shape == (128, 128))


@pytest.mark.parametrize("theory", THEORIES)
@pytest.mark.parametrize("unknown", [["pi"], ["pi", "chi"]])
def test_unknown_names_are_listed_with_the_known_ones(theory, unknown):
    action, names = THEORIES[theory]
    with pytest.raises(ValueError, match=f"{action.theory} has no observable {', '.join(unknown)}; it has") as caught:
        observables(action, [names[0], *unknown])
    assert str(caught.value).endswith(", ".join([*names, *NAMED[theory]]))


@pytest.mark.parametrize(
    ("theory", "unknown", "close"),
    [
        ("u1", ["plaquet"], "plaquette"),
        ("schwinger", ["pion_corelator", "x", "wilson_loop"], "pion_correlator, wilson_loops"),
        ("scalar", ["magnetization"], "magnetisation"),
    ],
)
def test_close_names_are_suggested(theory, unknown, close):
    action, _ = THEORIES[theory]
    expected = f"has no observable {', '.join(unknown)} (did you mean {close}?); it has"
    with pytest.raises(ValueError, match=re.escape(expected)):
        observables(action, unknown)


@pytest.mark.parametrize("name", FERMION + FERMION_NAMED)
def test_pure_gauge_theory_has_no_fermions(name):
    with pytest.raises(ValueError, match=f"u1 has no observable {name}"):
        observables(U1Action(2.0), [name])


def test_the_kappa_is_that_of_the_action():
    field = sample(U1Action(1.0), 3)
    for kappa in (0.1, 0.2):
        values = observables(SchwingerAction(1.0, kappa))["condensate"](field)
        assert torch.equal(values, condensate(field, kappa))
