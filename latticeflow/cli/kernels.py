"""What the stored history says about each kernel of the chain."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latticeflow.config.schema import ChainSettings
from latticeflow.stats import gamma_method, longest_rejection_run
from latticeflow.storage import Ensemble

SIGMAS = 4.0
OFF_TARGET = 0.2
HAMILTONIAN = ("hmc", "flow_hmc")
MOVING = ("independence", *HAMILTONIAN)
"""The kernels without which a chain stands still; a winding step may well be rejected for long."""


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
    target_acceptance: float | None = None


def kernel_reports(ensemble: Ensemble, chain: ChainSettings) -> dict[str, KernelReport]:
    """Return the report on every kernel by its name."""
    return {name: _report(ensemble, chain, name) for name in chain.kernels}


def kernel_warnings(reports: dict[str, KernelReport], *, draws: int) -> list[str]:
    """Return what the user should know, in plain sentences."""
    found = []
    for name, report in reports.items():
        if name in MOVING and report.longest_rejection_run > draws // 4:
            found.append(f"{name}: one replica stood still for {report.longest_rejection_run} of {draws} draws")
        if report.target_acceptance is not None and report.acceptance < report.target_acceptance - OFF_TARGET:
            found.append(
                f"{name}: the acceptance {report.acceptance:.2f} is far below the {report.target_acceptance:g} that it "
                "was tuned to: raise chain.thermalisation"
            )
        if report.exp_minus_delta_h is not None and not _creutz_holds(report):
            found.append(
                f"{name}: <exp(-delta_h)> = {report.exp_minus_delta_h:.4g} is more than {SIGMAS:g} sigma from 1: "
                "the chains have not thermalised, or the step is too long"
            )
    return found


def _report(ensemble: Ensemble, chain: ChainSettings, name: str) -> KernelReport:
    accepted = _column(ensemble, "accepted", name)
    common = float(accepted.mean()), longest_rejection_run(accepted)
    if name not in HAMILTONIAN:
        return KernelReport(*common)
    result = gamma_method(np.exp(-_column(ensemble, "delta_h", name)))
    tuned = ensemble.analysis()["tuned"]
    step_size = tuned.get(f"{name}.step_size", tuned.get("step_size"))
    target = getattr(chain, name).target_acceptance
    return KernelReport(*common, result.mean, result.error, step_size, target)


def _column(ensemble: Ensemble, column: str, kernel: str) -> NDArray:
    """Return a kernel's column, which has the kernel's name where several kernels have one like it."""
    stored = f"{column}_{kernel}"
    return ensemble.history(stored if stored in ensemble.history_names else column)


def _creutz_holds(report: KernelReport) -> bool:
    return abs(report.exp_minus_delta_h - 1) <= SIGMAS * max(report.exp_minus_delta_h_error, 1e-12)
