"""Errors, autocorrelations, importance weights and diagnostics of Monte Carlo histories; arrays in, numbers out.

Throughout, ``tau_int = 1/2 + sum_{t>=1} rho(t)`` and ``n_eff = n / (2 tau_int)``.
"""

from latticeflow.stats.consistency import compare_means, equal_means
from latticeflow.stats.derived import gamma_derived, gamma_derived_many
from latticeflow.stats.diagnostics import split_r_hat, thermalisation_cut
from latticeflow.stats.free_energy import bennett, free_energy_difference
from latticeflow.stats.gamma import gamma_many, gamma_method
from latticeflow.stats.pareto import pareto_k
from latticeflow.stats.rejection import longest_rejection_run, rejection_tau
from latticeflow.stats.resampling import BlockingResult, blocking, jackknife
from latticeflow.stats.result import GammaResult
from latticeflow.stats.weights import (
    ess,
    ess_error,
    forward_ess,
    largest_weight,
    log_z,
    predicted_acceptance,
    reweighted_mean,
)

__all__ = [
    "BlockingResult",
    "GammaResult",
    "bennett",
    "blocking",
    "compare_means",
    "equal_means",
    "ess",
    "ess_error",
    "forward_ess",
    "free_energy_difference",
    "gamma_derived",
    "gamma_derived_many",
    "gamma_many",
    "gamma_method",
    "jackknife",
    "largest_weight",
    "log_z",
    "longest_rejection_run",
    "pareto_k",
    "predicted_acceptance",
    "rejection_tau",
    "reweighted_mean",
    "split_r_hat",
    "thermalisation_cut",
]
