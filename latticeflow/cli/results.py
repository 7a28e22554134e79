"""What an analysis found, and how it is stored."""

from dataclasses import dataclass

import numpy as np

from latticeflow.cli.kernels import KernelReport
from latticeflow.cli.parts import PartsReport
from latticeflow.cli.pieces import PieceReport
from latticeflow.cli.sectors import Fraction, SectorReport
from latticeflow.cli.weighing import ForwardReport, WeightReport
from latticeflow.observables import first_index
from latticeflow.stats import GammaResult
from latticeflow.storage import Ensemble

Results = dict[str, GammaResult]
NUMBERS = ("mean", "error", "tau_int", "tau_int_error", "window", "n", "n_eff")


@dataclass(frozen=True)
class Report:
    """Everything that an analysis found.

    `observables` has the stored ones and `derived` functions of their means, the components of arrays by index as in
    `pion_correlator[2]`; `exact` the closed-form values where the theory has them. `cpu_seconds` is by stage.
    """

    observables: Results
    derived: Results
    r_hat: dict[str, float]
    kernels: dict[str, KernelReport]
    proposals: WeightReport | None
    forward: ForwardReport | None
    sectors: SectorReport | None
    baseline: WeightReport | None
    baseline_plain: WeightReport | None
    exact: dict[str, float]
    cpu_seconds: dict[str, float]
    seed: int
    warnings: list[str]
    pieces: PieceReport | None = None
    parts: PartsReport | None = None


def write_report(ensemble: Ensemble, report: Report, found: dict[str, Results]) -> None:
    """Store all results under /analysis; `found` holds those of each observable by its components."""
    for name, results in found.items():
        _write_results(ensemble, name, results, report.r_hat)
    if report.proposals is not None:
        best = report.forward or report.proposals
        ensemble.write_analysis("log_z", {"mean": best.log_z, "error": best.log_z_error})
    tables = {"weights": report.proposals, "baseline": report.baseline, "baseline_plain": report.baseline_plain}
    tables |= {"forward": report.forward} | {f"kernel_{name}": kernel for name, kernel in report.kernels.items()}
    for name, table in tables.items():
        if table is not None:
            numbers = {key: value for key, value in vars(table).items() if isinstance(value, int | float)}
            ensemble.write_analysis(name, numbers)
    if report.sectors is not None:
        _write_sectors(ensemble, report.sectors)
    ensemble.write_analysis("cost", report.cpu_seconds)


def _write_results(ensemble: Ensemble, name: str, results: Results, r_hat: dict[str, float]) -> None:
    """Store a number's analysis as attributes, an array's as data sets of its shape."""
    if name in results:
        result = results[name]
        numbers = {key: getattr(result, key) for key in NUMBERS} | {"ess": result.n_eff / result.n}
        numbers |= {"r_hat": r_hat[name]} if name in r_hat else {}
        ensemble.write_analysis(name, numbers, {"rho": result.rho, "tau_int_of_window": result.tau_int_of_window})
        return
    *_, last = results
    first = first_index(name)
    shape = tuple(int(index) + 1 - first for index in last[len(name) + 1 : -1].split(","))
    columns = {key: np.array([getattr(r, key) for r in results.values()]).reshape(shape) for key in NUMBERS}
    ensemble.write_analysis(name, {}, columns)


def _write_sectors(ensemble: Ensemble, sectors: SectorReport) -> None:
    charges = sorted({*sectors.found, *sectors.expected})
    arrays = {"charge": np.array(charges)}
    for kind, fractions in (("found", sectors.found), ("expected", sectors.expected)):
        chosen = [fractions.get(q, Fraction(0.0, 0.0)) for q in charges]
        arrays[kind] = np.array([fraction.value for fraction in chosen])
        arrays[f"{kind}_error"] = np.array([fraction.error for fraction in chosen])
    ensemble.write_analysis("sectors", {"changes": sectors.changes, "frozen": sectors.frozen}, arrays)
