"""Closed-form answers to compare a run with."""

import numpy as np

from latticeflow.config import Config
from latticeflow.config.building import build_bare_action
from latticeflow.config.theories import ScalarSettings, SchwingerSettings, U1Settings
from latticeflow.exact import (
    scalar_free_log_z,
    scalar_free_phi_squared,
    u1_charge_distribution,
    u1_log_z,
    u1_plaquette,
    u1_susceptibility,
    u1_wilson_loop,
)
from latticeflow.observables.derived import creutz_ratios


def exact_values(config: Config) -> dict[str, float]:
    """Return closed-form expectations by observable, `log_z` among them; empty where there are none."""
    action, shape = config.action, config.lattice.shape
    if isinstance(action, ScalarSettings):
        identity = {"schwinger_dyson": 0.0}
        if action.lam > 0:
            return identity
        free = {"phi_squared": scalar_free_phi_squared(action.m2, shape), "log_z": scalar_free_log_z(action.m2, shape)}
        return identity | free
    if not _is_pure_gauge(config):
        log_z = getattr(build_bare_action(config), "log_z", None)
        return {} if log_z is None else {"log_z": log_z}
    susceptibility = u1_susceptibility(action.beta, shape)
    return _exact_loops(action.beta, shape) | {
        "plaquette": u1_plaquette(action.beta, shape),
        "topological_charge": 0.0,
        "topological_charge2": susceptibility * shape[0] * shape[1],
        "topological_susceptibility": susceptibility,
        "log_z": u1_log_z(action.beta, shape),
    }


def _exact_loops(beta: float, shape: tuple[int, ...]) -> dict[str, float]:
    """Return the exact Wilson loops and Creutz ratios by component, sides from 1 to half the extents."""
    sides = [np.arange(1, max(1, extent // 2) + 1) for extent in shape]
    loops = u1_wilson_loop(beta, shape, np.outer(*sides))
    tables = {"wilson_loops": loops, "creutz_ratios": creutz_ratios(loops)}
    return {
        f"{name}[{r0 + 1},{r1 + 1}]": float(value)
        for name, table in tables.items()
        for (r0, r1), value in np.ndenumerate(table)
        if np.isfinite(value)
    }


def exact_charges(config: Config) -> dict[int, float] | None:
    """Return P(Q) of pure gauge theory (also as kappa = 0), None for other theories."""
    if not _is_pure_gauge(config):
        return None
    charges, probabilities = u1_charge_distribution(config.action.beta, config.lattice.shape)
    return dict(zip(charges.tolist(), probabilities.tolist(), strict=True))


def _is_pure_gauge(config: Config) -> bool:
    action = config.action
    return isinstance(action, U1Settings) or (isinstance(action, SchwingerSettings) and action.kappa == 0)
