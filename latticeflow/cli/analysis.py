"""From the stored ensemble to numbers: means with errors, derived quantities, diagnostics, and what to warn about."""

import numpy as np
from numpy.typing import NDArray

from latticeflow.cli.exact import exact_charges, exact_values
from latticeflow.cli.folder import RunFolder, UsageError
from latticeflow.cli.kernels import kernel_reports, kernel_warnings
from latticeflow.cli.parts import stored_parts
from latticeflow.cli.pieces import stored_pieces
from latticeflow.cli.results import Report, Results, write_report
from latticeflow.cli.sectors import (
    Fraction,
    SectorReport,
    effective_draws,
    judge_sectors,
    sector_fractions,
    unseen_error,
    weighted_fractions,
)
from latticeflow.cli.stopping import finishing
from latticeflow.cli.verifying import check_all
from latticeflow.cli.weighing import (
    ForwardReport,
    stored_weights,
    weigh_forward,
    weight_warnings,
)
from latticeflow.config import Config
from latticeflow.config.building import build_bare_action
from latticeflow.observables import first_index, observable_names
from latticeflow.observables.derived import derived
from latticeflow.stats import (
    GammaResult,
    ess,
    gamma_derived_many,
    gamma_many,
    gamma_method,
    split_r_hat,
    thermalisation_cut,
)
from latticeflow.storage import DataError, Ensemble

DRIFT, WARN_BELOW = 4.0, 100


def analyse(folder: RunFolder, *, skip_damaged: bool = False) -> Report:
    """Analyse the measured ensemble and write the results under /analysis.

    Raises UsageError if nothing is measured, DataError for damage (unless it is skipped) and foreign configurations.
    """
    config = folder.config
    with folder.ensemble("a", skip_damaged=skip_damaged) as ensemble, finishing("analysis") as stop:
        check_all(ensemble, config)
        series = measured(config, ensemble)
        found = {name: analyse_observable(name, values, s=config.analysis.s) for name, values in series.items()}
        functions = derive(config, series)
        proposals, baseline = stored_weights(ensemble, "log_weight"), stored_weights(ensemble, "baseline_log_weight")
        forward = _forward(folder, ensemble)
        sectors = _sectors(folder, ensemble)
        kernels = kernel_reports(ensemble, config.chain)
        report = Report(
            observables={key: result for results in found.values() for key, result in results.items()},
            derived={key: result for results in functions.values() for key, result in results.items()},
            r_hat={key: r_hat for name, values in series.items() for key, r_hat in mixing(name, values).items()},
            kernels=kernels,
            proposals=proposals,
            forward=forward,
            sectors=sectors,
            baseline=baseline,
            baseline_plain=stored_weights(ensemble, "baseline_plain_log_weight"),
            exact=exact_values(config),
            cpu_seconds=folder.cpu_seconds,
            seed=config.run.seed,
            warnings=[],
            pieces=stored_pieces(ensemble),
            parts=stored_parts(config, ensemble),
        )
        report.warnings.extend(_warnings(report, ensemble))
        write_report(ensemble, report, found | functions)
        stop.here()
    return report


def measured(config: Config, ensemble: Ensemble) -> dict[str, NDArray[np.float64]]:
    """Return the measured observables `(chain, draw, ...)` by name.

    Raises UsageError where there are none, DataError for a value that is not finite, naming its place.
    """
    names = ensemble.observable_names
    if not names:
        folder = ensemble.path.parent
        raise UsageError(f"{folder} is not measured yet; run `latticeflow measure {folder}` first")
    known = observable_names(build_bare_action(config))
    series = {name: ensemble.observable(name) for name in known if name in names}
    for name, values in series.items():
        for chain, draw, *own in np.argwhere(~np.isfinite(values))[:1].tolist():
            found = values[chain, draw, *own]
            raise DataError(f"{ensemble.path}: observable {name} is {found} at chain {chain}, draw {draw}")
    return series


def labels(name: str, shape: tuple[int, ...]) -> list[str]:
    """Return the names of the components of an array of this shape, as in `name[1,2]`; a number has just the name."""
    first = first_index(name)
    return [f"{name}[{','.join(str(first + i) for i in index)}]" if index else name for index in np.ndindex(shape)]


def analyse_observable(name: str, values: NDArray[np.float64], *, s: float) -> Results:
    """Return the analysis of each component of an observable `(chain, draw, ...)`, by its name."""
    flat = values.reshape(*values.shape[:2], -1)
    return dict(zip(labels(name, values.shape[2:]), gamma_many(flat, s=s), strict=True))


def mixing(name: str, values: NDArray[np.float64]) -> dict[str, float]:
    """Return the split R-hat of each component of an observable `(chain, draw, ...)`, by its name."""
    columns = np.moveaxis(values.reshape(*values.shape[:2], -1), -1, 0)
    return dict(zip(labels(name, values.shape[2:]), map(split_r_hat, columns), strict=True))


def derive(config: Config, series: dict[str, NDArray[np.float64]]) -> dict[str, Results]:
    """Return the derived quantities whose inputs are measured, by name, each component by its own."""
    found = {}
    for name, quantity in derived(build_bare_action(config), config.lattice.shape).items():
        if all(needed in series for needed in quantity.inputs):
            inputs = quantity.series(*(series[needed] for needed in quantity.inputs))
            shape = np.shape(quantity.function(np.array([values.mean() for values in inputs])))
            results = gamma_derived_many(quantity.function, inputs, s=config.analysis.s)
            found[name] = dict(zip(labels(name, shape), results, strict=True))
    return found


def _warnings(report: Report, ensemble: Ensemble) -> list[str]:
    found = [f"{name}: {text}" for name, result in report.observables.items() for text in _of_number(name, result)]
    found += _of_arrays(report.observables)
    found += () if report.sectors is None else report.sectors.warnings
    found += weight_warnings(report.proposals, report.forward, report.baseline)
    found += kernel_warnings(report.kernels, draws=ensemble.n_committed)
    bad = ensemble.analysis().get("rejected", {}).get("bad_proposals", 0)
    found += _skipped(ensemble.training())
    found += [f"{bad} proposals had a non-finite action or log q and were rejected"] if bad else []
    found += [f"{ensemble.skipped} draws of every chain are left out: damaged"] if ensemble.skipped else []
    return found + drift(ensemble.history("action"))


def _skipped(training: dict[str, NDArray]) -> list[str]:
    """Return a warning where training steps were skipped; fits of pieces count those between two evaluations."""
    skipped = training.get("skipped", np.zeros(0))
    if not skipped.any():
        return []
    pieces = training.get("piece")
    steps = skipped.size if pieces is None else sum(training["step"][pieces == k].max() for k in np.unique(pieces))
    return [f"{skipped.sum()} of {steps} training steps had a non-finite loss or gradient: skipped"]


def _of_number(name: str, result: GammaResult) -> tuple[str, ...]:
    return () if "[" in name else result.warnings


def _of_arrays(results: Results) -> list[str]:
    """Return one line for each array that has components without a good error; some are constant by construction."""
    parts: dict[str, list[bool]] = {}
    for name, result in results.items():
        if "[" in name and result.error != 0:
            parts.setdefault(name.partition("[")[0], []).append(result.converged)
    return [
        f"{name}: {good.count(False)} of {len(good)} components have an error that is not to be trusted"
        for name, good in parts.items()
        if not all(good)
    ]


def drift(action: NDArray[np.float64]) -> list[str]:
    """Return a warning if the action, averaged over the replica, has not settled from the first draw `(chain, draw)`.

    The thermalisation cut is only a proposal: it counts where what it leaves out lies more than four standard
    deviations off what it keeps, and what it keeps is long enough to tell.
    """
    if action.shape[1] < 8:
        return []
    cut = thermalisation_cut(action.mean(axis=0))
    if cut == 0:
        return []
    kept = gamma_method(action[:, cut:])
    deviation = abs(action[:, :cut].mean() - kept.mean)
    error = kept.error * np.hypot(1, np.sqrt(kept.n / (action.shape[0] * cut)))
    if kept.n < WARN_BELOW * kept.tau_int or deviation <= DRIFT * error:
        return []
    return [f"the action drifts over the first {cut} draws: raise chain.thermalisation by at least that"]


def _forward(folder: RunFolder, ensemble: Ensemble) -> ForwardReport | None:
    """Return the forward report, from the reference if there is one, else from a chain that HMC moves as well."""
    if "log_weight" not in ensemble.proposal_names:
        return None
    proposed, s = ensemble.proposals("log_weight"), folder.config.analysis.s
    reference = ensemble.analysis().get("reference", {}).get("log_weight")
    if reference is not None:
        return weigh_forward(proposed, reference, source=str(folder.config.analysis.reference), s=s)
    if {"hmc", "winding"} & set(folder.config.chain.kernels):
        return weigh_forward(proposed, ensemble.history("log_weight"), source="this chain", s=s)
    return None


def _sectors(folder: RunFolder, ensemble: Ensemble) -> SectorReport | None:
    """Return the report on the sectors against the exact fractions, the reference's, or those of quenched draws."""
    if "topological_charge" not in ensemble.observable_names:
        return None
    charge, stored = ensemble.observable("topological_charge"), ensemble.analysis().get("reference", {})
    exact = exact_charges(folder.config)
    if exact is not None:
        return judge_sectors(charge, {q: Fraction(p, 0.0) for q, p in exact.items()}, "the exact distribution")
    if "charge" in stored:
        fractions, draws = sector_fractions(stored["charge"]), effective_draws(stored["charge"])
        return judge_sectors(charge, fractions, "the reference", unseen=unseen_error(draws))
    if "baseline_charge" in ensemble.proposal_names:
        drawn, log_weight = (ensemble.proposals(f"baseline_{name}").ravel() for name in ("charge", "log_weight"))
        unseen = unseen_error(drawn.size * ess(log_weight))
        return judge_sectors(charge, weighted_fractions(drawn, log_weight), "reweighted quenched draws", unseen=unseen)
    return judge_sectors(charge, {}, "")
