"""What the stored history says about each kernel of the chain."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latticeflow.stats import gamma_method, longest_rejection_run
from latticeflow.storage import Ensemble

SIGMAS = 4.0
HAMILTONIAN = ("hmc", "flow_hmc")


@dataclass(frozen=True)
class KernelReport:
    """Acceptance and longest run of rejections.

    For HMC also `<exp(-delta_h)>`, which is 1 in equilibrium, its error, and the step size as it was tuned.
    """

    acceptance: float
    longest_rejection_run: int
    exp_minus_delta_h: float | None = None
    exp_minus_delta_h_error: float | None = None
    step_size: float | None = None


def kernel_reports(ensemble: Ensemble, kernels: Sequence[str]) -> dict[str, KernelReport]:
    """Return the report on every kernel by its name."""
    return {name: _report(ensemble, name) for name in kernels}


def kernel_warnings(reports: dict[str, KernelReport], *, draws: int) -> list[str]:
    """Return what the user should know, in plain sentences."""
    found = []
    for name, report in reports.items():
        if report.longest_rejection_run > draws // 4:
            found.append(f"{name}: one replica stood still for {report.longest_rejection_run} of {draws} draws")
        if report.exp_minus_delta_h is not None and not _creutz_holds(report):
            found.append(
                f"{name}: <exp(-delta_h)> = {report.exp_minus_delta_h:.4g} is more than {SIGMAS:g} sigma from 1: "
                "the chains have not thermalised, or the step is too long"
            )
    return found


def _report(ensemble: Ensemble, name: str) -> KernelReport:
    accepted = _column(ensemble, "accepted", name)
    common = float(accepted.mean()), longest_rejection_run(accepted)
    if name not in HAMILTONIAN:
        return KernelReport(*common)
    result = gamma_method(np.exp(-_column(ensemble, "delta_h", name)))
    tuned = ensemble.analysis()["tuned"]
    step_size = tuned.get(f"{name}.step_size", tuned.get("step_size"))
    return KernelReport(*common, result.mean, result.error, step_size)


def _column(ensemble: Ensemble, column: str, kernel: str) -> NDArray:
    """Return a kernel's column, which has the kernel's name where several kernels have one like it."""
    stored = f"{column}_{kernel}"
    return ensemble.history(stored if stored in ensemble.history_names else column)


def _creutz_holds(report: KernelReport) -> bool:
    return abs(report.exp_minus_delta_h - 1) <= SIGMAS * max(report.exp_minus_delta_h_error, 1e-12)
