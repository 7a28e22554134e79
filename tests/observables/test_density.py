"""Observables of densities: their values, which of them are measured, and that nothing is derived from them."""

import pytest
import torch

from latticeflow.actions import Funnel, MultivariateStudentT, synthetic_horseshoe
from latticeflow.observables import derived, measure, observable_names, observables

DEFAULT = ["first_coordinate", "coordinate_mean"]
NAMED = ["coordinates", "coordinates_squared"]


def test_values_by_loops():
    x = torch.randn(600, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    action = Funnel(4)
    found = measure(x, observables(action, observable_names(action)))
    for row in (0, 255, 256, 599):
        values = x[row].tolist()
        assert float(found["first_coordinate"][row]) == values[0]
        assert float(found["coordinate_mean"][row]) == pytest.approx(sum(values) / 4, rel=1e-14, abs=1e-15)
        assert found["coordinates"][row].tolist() == values
        assert found["coordinates_squared"][row].tolist() == [value**2 for value in values]
    assert {name: tuple(array.shape[1:]) for name, array in found.items()} == {
        "first_coordinate": (),
        "coordinate_mean": (),
        "coordinates": (4,),
        "coordinates_squared": (4,),
    }


@pytest.mark.parametrize("action", [Funnel(3), MultivariateStudentT(3), synthetic_horseshoe(4)])
def test_every_density_has_the_same(action):
    assert list(observables(action)) == DEFAULT
    assert observable_names(action) == (*DEFAULT, *NAMED)
    assert list(observables(action, NAMED)) == NAMED
    assert derived(action, (action.dimension,)) == {}
    with pytest.raises(ValueError, match=f"{action.theory} has no observable plaquette; it has first_coordinate, "):
        observables(action, ["plaquette"])
