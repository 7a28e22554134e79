"""Which observables belong to a theory: a cheap set that is always measured, and those that are measured when named."""

import difflib
from collections.abc import Sequence

from latticeflow.actions import Action, HolonomyMarginal, SchwingerAction
from latticeflow.observables import density, fermion, gauge, scalar
from latticeflow.observables.measurement import Measurement, Observable, members, single

POLYAKOV = tuple(f"polyakov_{mu}_{part}" for mu in ("time", "space") for part in ("real", "imaginary", "abs"))
MESONS = ("pion_correlator", "axial_correlator", "eta_disconnected")


def observables(action: Action, names: Sequence[str] | None = None) -> dict[str, Observable]:
    """Return observables of the action's theory by name: the cheap ones, or those in `names`.

    Raises ValueError naming the ones that the theory does not have, and those that it has.
    """
    default, others = _of_theory(action)
    found = default | others
    wanted = default if names is None else names
    unknown = [name for name in wanted if name not in found]
    if unknown:
        raise ValueError(
            f"{action.theory} has no observable {', '.join(unknown)}{_suggestion(unknown, list(found))}; "
            f"it has {', '.join(found)}"
        )
    return {name: found[name] for name in wanted}


def observable_names(action: Action) -> tuple[str, ...]:
    """Return the names of all observables of the action's theory, the cheap ones first."""
    default, others = _of_theory(action)
    return (*default, *others)


def _suggestion(unknown: Sequence[str], known: Sequence[str]) -> str:
    close = [match for name in unknown for match in difflib.get_close_matches(name, known, n=1)]
    return f" (did you mean {', '.join(close)}?)" if close else ""


def _of_theory(action: Action) -> tuple[dict[str, Observable], dict[str, Observable]]:
    bare = action.action if isinstance(action, HolonomyMarginal) else action
    if bare.field_name == "phi":
        return _scalar()
    if bare.field_name == "x":
        return _density()
    default, others = _gauge()
    if isinstance(bare, SchwingerAction):
        cheap, costly = _fermions(bare.kappa)
        return default | cheap, others | costly
    return default, others


def _scalar() -> tuple[dict[str, Observable], dict[str, Observable]]:
    default = members(
        single("magnetisation", scalar.magnetisation),
        single("abs_magnetisation", scalar.abs_magnetisation),
        single("magnetisation_squared", scalar.magnetisation_squared),
        single("phi_squared", scalar.phi_squared),
        single("phi_fourth", scalar.phi_fourth),
        single("phi_neighbour", scalar.phi_neighbour),
        single("momentum_min", scalar.momentum_min),
    )
    return default, members(single("momentum_zero", scalar.momentum_zero), single("two_point", scalar.two_point))


def _density() -> tuple[dict[str, Observable], dict[str, Observable]]:
    default = members(
        single("first_coordinate", density.first_coordinate),
        single("coordinate_mean", density.coordinate_mean),
    )
    others = members(
        single("coordinates", density.coordinates),
        single("coordinates_squared", density.coordinates_squared),
    )
    return default, others


def _gauge() -> tuple[dict[str, Observable], dict[str, Observable]]:
    default = members(
        single("plaquette", gauge.plaquette),
        single("topological_charge", gauge.charge),
        single("topological_charge2", gauge.charge_squared),
        single("topological_susceptibility", gauge.susceptibility),
    )
    others = members(
        single("wilson_loops", gauge.wilson_loops, _lines_memory),
        Measurement(POLYAKOV, gauge.polyakov_loops),
        single("polyakov_correlator", gauge.polyakov_correlator),
    )
    return default, others


def _fermions(kappa: float) -> tuple[dict[str, Observable], dict[str, Observable]]:
    default = members(
        single("condensate", lambda links: fermion.condensate(links, kappa), _determinant_memory),
        single("log_det", lambda links: fermion.log_det(links, kappa), _determinant_memory),
    )
    others = members(
        Measurement(MESONS, lambda links: fermion.correlators(links, kappa), _propagator_memory),
        single(
            "chiral_susceptibility_connected",
            lambda links: fermion.chiral_susceptibility_connected(links, kappa),
            _second_derivative_memory,
        ),
    )
    return default, others


def _lines_memory(shape: tuple[int, ...]) -> int:
    _, extent_time, extent = shape
    return 8 * extent_time * extent * (16 + extent_time + extent)


def _determinant_memory(shape: tuple[int, ...]) -> int:
    _, extent_time, extent = shape
    return 25 * 16 * extent_time * extent**2


def _second_derivative_memory(shape: tuple[int, ...]) -> int:
    return 3 * _determinant_memory(shape)


def _propagator_memory(shape: tuple[int, ...]) -> int:
    _, extent_time, extent = shape
    return 12 * 16 * extent_time * (2 * extent) ** 2
