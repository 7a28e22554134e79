"""Observables: functions of configurations, `(batch, ...) -> (batch,)`, and which of them belong to a theory."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from latticeflow.actions import Action, HolonomyMarginal, SchwingerAction
from latticeflow.observables import fermion, gauge, scalar

Observable = Callable[[Tensor], Tensor]
CHUNK = 256


def observables(action: Action, names: Sequence[str] | None = None) -> dict[str, Observable]:
    """Return the observables of the action's theory by name: all, or those in `names`.

    Raises ValueError naming the ones that the theory does not have, and those that it has.
    """
    found = _all(action.action if isinstance(action, HolonomyMarginal) else action)
    wanted = found if names is None else names
    unknown = [name for name in wanted if name not in found]
    if unknown:
        raise ValueError(f"{action.theory} has no observable {', '.join(unknown)}; it has {', '.join(found)}")
    return {name: found[name] for name in wanted}


def _all(action: Action) -> dict[str, Observable]:
    if action.field_name == "phi":
        return {
            "magnetisation": scalar.magnetisation,
            "abs_magnetisation": scalar.abs_magnetisation,
            "magnetisation_squared": scalar.magnetisation_squared,
            "phi_squared": scalar.phi_squared,
            "phi_fourth": scalar.phi_fourth,
            "phi_neighbour": scalar.phi_neighbour,
        }
    found: dict[str, Observable] = {
        "plaquette": gauge.plaquette,
        "topological_charge": gauge.charge,
        "topological_charge2": gauge.charge_squared,
        "topological_susceptibility": gauge.susceptibility,
    }
    if isinstance(action, SchwingerAction):
        found["condensate"] = lambda links: fermion.condensate(links, action.kappa)
        found["log_det"] = lambda links: fermion.log_det(links, action.kappa)
    return found


def measure(field: Tensor, wanted: dict[str, Observable]) -> dict[str, Tensor]:
    """Evaluate observables on `(n, ...)` configurations in chunks, so that memory stays bounded."""
    chunks = field.split(CHUNK)
    return {name: torch.cat([observable(chunk) for chunk in chunks]) for name, observable in wanted.items()}


__all__ = ["Observable", "measure", "observables"]
