"""From the stored ensemble to numbers: means with errors, weights, diagnostics, and what to warn about."""

from dataclasses import dataclass

import numpy as np

from latticeflow.cli.folder import RunFolder, UsageError
from latticeflow.config import Config
from latticeflow.config.building import build_bare_action
from latticeflow.config.schema import ScalarSettings, SchwingerSettings, U1Settings
from latticeflow.exact import (
    scalar_free_log_z,
    scalar_free_phi_squared,
    u1_charge_distribution,
    u1_log_z,
    u1_plaquette,
    u1_susceptibility,
)
from latticeflow.observables import observables
from latticeflow.stats import (
    GammaResult,
    ess,
    ess_error,
    gamma_method,
    largest_weight,
    log_z,
    longest_rejection_run,
    pareto_k,
    predicted_acceptance,
    split_r_hat,
)
from latticeflow.storage import Ensemble

PARETO_LIMIT = 0.7


@dataclass(frozen=True)
class WeightReport:
    """What a set of log weights says: ESS/N and log Z with errors, the acceptance it predicts, the weight tail."""

    samples: int
    ess: float
    ess_error: float
    log_z: float
    log_z_error: float
    predicted_acceptance: float
    largest_weight: float
    pareto_k: float


@dataclass(frozen=True)
class Report:
    """Everything that an analysis found; `exact` holds closed-form values where the theory has them."""

    observables: dict[str, GammaResult]
    r_hat: dict[str, float]
    flow: WeightReport
    acceptance: float
    longest_rejection_run: int
    baseline: WeightReport | None
    baseline_plain: WeightReport | None
    exact: dict[str, float]
    seed: int
    warnings: list[str]


def analyse(folder: RunFolder) -> Report:
    """Analyse the measured ensemble and write the results under /analysis. Raises UsageError if nothing is measured."""
    with folder.ensemble("a") as ensemble:
        wanted = observables(build_bare_action(folder.config))
        names = [name for name in wanted if name in ensemble.observable_names]
        if not names:
            raise UsageError(f"{folder.path} is not measured yet; run `latticeflow measure {folder.path}` first")
        series = {name: ensemble.observable(name) for name in names}
        results = {name: gamma_method(values, s=folder.config.analysis.s) for name, values in series.items()}
        accepted = ensemble.history("accepted")
        report = Report(
            observables=results,
            r_hat={name: split_r_hat(values) for name, values in series.items()},
            flow=weigh(ensemble.proposals("log_weight").ravel()),
            acceptance=float(accepted.mean()),
            longest_rejection_run=longest_rejection_run(accepted),
            baseline=_stored_weights(ensemble, "baseline_log_weight"),
            baseline_plain=_stored_weights(ensemble, "baseline_plain_log_weight"),
            exact=exact_values(folder.config),
            seed=folder.config.run.seed,
            warnings=[],
        )
        report.warnings.extend(_warnings(report, draws=ensemble.n_committed))
        _write(ensemble, report)
    return report


def weigh(log_weight: np.ndarray) -> WeightReport:
    """Return the report on one set of independent log weights `(n,)`."""
    value, error = log_z(log_weight)
    return WeightReport(
        samples=log_weight.size,
        ess=ess(log_weight),
        ess_error=ess_error(log_weight),
        log_z=value,
        log_z_error=error,
        predicted_acceptance=predicted_acceptance(log_weight),
        largest_weight=largest_weight(log_weight),
        pareto_k=pareto_k(log_weight),
    )


def exact_values(config: Config) -> dict[str, float]:
    """Return closed-form expectations by observable, `log_z` among them; empty where there are none."""
    action, shape = config.action, config.lattice.shape
    if isinstance(action, SchwingerSettings) and action.kappa > 0:
        return {}
    if isinstance(action, ScalarSettings):
        if action.lam > 0:
            return {}
        return {"phi_squared": scalar_free_phi_squared(action.m2, shape), "log_z": scalar_free_log_z(action.m2, shape)}
    susceptibility = u1_susceptibility(action.beta, shape)
    return {
        "plaquette": u1_plaquette(action.beta, shape),
        "topological_charge": 0.0,
        "topological_charge2": susceptibility * shape[0] * shape[1],
        "topological_susceptibility": susceptibility,
        "log_z": u1_log_z(action.beta, shape),
    }


def exact_charges(config: Config) -> dict[int, float] | None:
    """Return P(Q) of pure gauge theory, None for other theories."""
    if not isinstance(config.action, U1Settings):
        return None
    charges, probabilities = u1_charge_distribution(config.action.beta, config.lattice.shape)
    return dict(zip(charges.tolist(), probabilities.tolist(), strict=True))


def _stored_weights(ensemble: Ensemble, name: str) -> WeightReport | None:
    return weigh(ensemble.proposals(name).ravel()) if name in ensemble.proposal_names else None


def _warnings(report: Report, *, draws: int) -> list[str]:
    flow, found = report.flow, []
    found += [f"{name}: {text}" for name, result in report.observables.items() for text in result.warnings]
    if flow.pareto_k > PARETO_LIMIT:
        found.append(
            f"the weights have a heavy tail, Pareto k = {flow.pareto_k:.2f} > {PARETO_LIMIT}: do not trust ESS"
        )
    if report.longest_rejection_run > draws // 4:
        found.append(f"one replica stood still for {report.longest_rejection_run} of {draws} draws")
    if report.baseline is not None and flow.ess < report.baseline.ess:
        found.append(f"the proposals (ESS/N {flow.ess:.3f}) do not beat quenched draws ({report.baseline.ess:.3f})")
    return found


def _write(ensemble: Ensemble, report: Report) -> None:
    for name, result in report.observables.items():
        numbers = {key: getattr(result, key) for key in ("mean", "error", "tau_int", "tau_int_error", "window", "n")}
        arrays = {"rho": result.rho, "tau_int_of_window": result.tau_int_of_window}
        extra = {"n_eff": result.n_eff, "r_hat": report.r_hat[name], "ess": result.n_eff / result.n}
        ensemble.write_analysis(name, numbers | extra, arrays)
    chain = {"acceptance": report.acceptance, "longest_rejection_run": report.longest_rejection_run}
    ensemble.write_analysis("log_z", {"mean": report.flow.log_z, "error": report.flow.log_z_error})
    ensemble.write_analysis("weights", vars(report.flow) | chain)
    for name, weights in (("baseline", report.baseline), ("baseline_plain", report.baseline_plain)):
        if weights is not None:
            ensemble.write_analysis(name, vars(weights))
