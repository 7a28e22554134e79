"""Observables: functions of configurations, `(batch, ...) -> (batch, *own_shape)`, and which belong to a theory."""

from latticeflow.observables.derived import Derived, derived, effective_mass, first_index
from latticeflow.observables.measurement import Observable, measure
from latticeflow.observables.registry import observable_names, observables

__all__ = [
    "Derived",
    "Observable",
    "derived",
    "effective_mass",
    "first_index",
    "measure",
    "observable_names",
    "observables",
]
