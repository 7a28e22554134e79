"""Which observables a theory has, and their evaluation in chunks."""

import pytest
import torch

from latticeflow.actions import HolonomyMarginal, ScalarAction, SchwingerAction, U1Action
from latticeflow.observables import gauge, measure, observables, scalar
from latticeflow.observables.fermion import condensate, log_det
from latticeflow.priors import HaarUniform, Normal

SCALAR = [
    "magnetisation",
    "abs_magnetisation",
    "magnetisation_squared",
    "phi_squared",
    "phi_fourth",
    "phi_neighbour",
]
GAUGE = ["plaquette", "topological_charge", "topological_charge2", "topological_susceptibility"]
FERMION = ["condensate", "log_det"]
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


@pytest.mark.parametrize("theory", THEORIES)
def test_names_stand_for_their_functions(theory):
    action, names = THEORIES[theory]
    field = sample(action, 5)
    functions = dict(
        zip(GAUGE, (gauge.plaquette, gauge.charge, gauge.charge_squared, gauge.susceptibility), strict=True)
    )
    functions |= {name: getattr(scalar, name) for name in SCALAR}
    functions |= {"condensate": lambda x: condensate(x, 0.25), "log_det": lambda x: log_det(x, 0.25)}
    for name, values in measure(field, observables(action)).items():
        assert torch.equal(values, functions[name](field))
        assert values.shape == (5,)
    assert set(names) <= set(functions)


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


@pytest.mark.parametrize("theory", THEORIES)
@pytest.mark.parametrize("unknown", [["pion"], ["pion", "plaquet"]])
def test_unknown_names_are_listed_with_the_known_ones(theory, unknown):
    action, names = THEORIES[theory]
    with pytest.raises(ValueError, match=f"{action.theory} has no observable {', '.join(unknown)}; it has") as caught:
        observables(action, [names[0], *unknown])
    assert str(caught.value).endswith(", ".join(names))


def test_pure_gauge_theory_has_no_condensate():
    with pytest.raises(ValueError, match="u1 has no observable condensate"):
        observables(U1Action(2.0), ["condensate"])


def test_the_kappa_is_that_of_the_action():
    field = sample(U1Action(1.0), 3)
    for kappa in (0.1, 0.2):
        values = observables(SchwingerAction(1.0, kappa))["condensate"](field)
        assert torch.equal(values, condensate(field, kappa))
