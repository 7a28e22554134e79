"""Closed-form answers: U(1) on a two-dimensional torus, free Wilson fermions, free scalars. NumPy and SciPy only."""

from latticeflow.exact.scalar import (
    khat_squared,
    scalar_free_log_z,
    scalar_free_phi_squared,
    schwinger_dyson_residual,
)
from latticeflow.exact.u1_charge import u1_charge_distribution, u1_charge_log_z, u1_susceptibility
from latticeflow.exact.u1_functional import u1_gaussian_log_mean
from latticeflow.exact.u1_torus import u1_log_z, u1_plaquette, u1_wilson_loop
from latticeflow.exact.wilson import (
    CRITICAL_KAPPA,
    hopping_log_det,
    wilson_free_condensate,
    wilson_free_log_det,
)

__all__ = [
    "CRITICAL_KAPPA",
    "hopping_log_det",
    "khat_squared",
    "scalar_free_log_z",
    "scalar_free_phi_squared",
    "schwinger_dyson_residual",
    "u1_charge_distribution",
    "u1_charge_log_z",
    "u1_gaussian_log_mean",
    "u1_log_z",
    "u1_plaquette",
    "u1_susceptibility",
    "u1_wilson_loop",
    "wilson_free_condensate",
    "wilson_free_log_det",
]
