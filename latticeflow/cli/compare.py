"""The same observables from several ensembles, side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from latticeflow import plots
from latticeflow.cli.analysis import analyse_observable, derive, measured
from latticeflow.cli.exact import exact_values
from latticeflow.cli.folder import UsageError, ensemble_path
from latticeflow.cli.report import aligned, value_error
from latticeflow.cli.results import Results
from latticeflow.cli.verifying import open_checked
from latticeflow.config import Config
from latticeflow.stats import GammaResult, equal_means

MOST_PANELS, LONGEST_LABEL = 11, 18
TRAINING, CHAIN = ("training",), ("thermalising", "sampling")
COSTED = ("plaquette", "topological_charge2", "condensate", "magnetisation_squared", "phi_squared")


@dataclass(frozen=True)
class Entry:
    """One ensemble of a comparison: its results by observable, and the CPU seconds that it took."""

    label: str
    config: Config
    actions: NDArray[np.float64]
    results: Results
    training_seconds: float
    chain_seconds: float

    def rate(self, name: str, *, training: bool) -> float:
        """Return effective samples per CPU second, NaN where the error or the time is not known."""
        result, seconds = self.results[name], self.chain_seconds + training * self.training_seconds
        return result.n_eff / seconds if result.converged and seconds > 0 else float("nan")


def read_entries(paths: Sequence[Path]) -> list[Entry]:
    """Return the entries of run folders or ensemble files.

    Raises UsageError where one is not there, not measured, or of another theory than the first; DataError for damage.
    """
    entries = [_read(ensemble_path(path), label=str(path)) for path in paths]
    for one, other in combinations(entries, 2):
        if np.array_equal(one.actions, other.actions):
            raise UsageError(
                f"{one.label} and {other.label} hold the same configurations; a comparison needs independent ones"
            )
    for other in entries[1:]:
        different = entries[0].config.theory_differences(other.config)
        if different:
            raise UsageError(
                f"{entries[0].label} and {other.label} are of different theories: they differ in {', '.join(different)}"
            )
    if not shared(entries):
        raise UsageError(f"{', '.join(entry.label for entry in entries)} have no observable in common")
    return entries


def shared(entries: Sequence[Entry]) -> list[str]:
    """Return the names that all entries have, in the order of the first."""
    return [name for name in entries[0].results if all(name in entry.results for entry in entries)]


def comparison(entries: Sequence[Entry]) -> str:
    """Return the tables: means with differences from the first in sigma, then effective samples per CPU second.

    `p` is the chi^2 probability that all means are one, for each observable by itself.
    """
    exact, several = exact_values(entries[0].config), len(entries) > 1
    numbers = [str(i + 1) for i in range(len(entries))]
    header = [
        "observable",
        *numbers,
        *[f"{i}-1 [sigma]" for i in numbers[1:]],
        *["p"] * several,
        *["exact"] * bool(exact),
    ]
    rows = [header]
    for name in shared(entries):
        results = [entry.results[name] for entry in entries]
        row = [name, *(value_error(r.mean, r.error) if np.isfinite(r.mean) else "undefined" for r in results)]
        row += [_difference(result, results[0]) for result in results[1:]]
        row += [_probability(results)] if several else []
        row += [f"{exact[name]:.6g}" if name in exact else ""] * bool(exact)
        rows.append(row)
    names = [f"{number}: {entry.label}" for number, entry in zip(numbers, entries, strict=True)]
    return "\n".join([*names, "", *aligned(rows), "", *aligned(_costs(entries, numbers))])


def draw_comparison(entries: Sequence[Entry], path: Path) -> None:
    """Draw the means of the shared observables, and the effective samples per CPU second, into one figure."""
    names = [name for name in shared(entries) if "[" not in name] or shared(entries)[:MOST_PANELS]
    means = {name: [(entry.results[name].mean, entry.results[name].error) for entry in entries] for name in names}
    rates = {name: [entry.rate(name, training=True) for entry in entries] for name in _costed(entries)}
    figure = plots.comparison(_short_labels(entries), means, rates, exact=exact_values(entries[0].config))
    plots.save(figure, path)


def _read(path: Path, *, label: str) -> Entry:
    ensemble, config = open_checked(path)
    with ensemble:
        series, cost = measured(config, ensemble), ensemble.analysis().get("cost", {})
        actions = ensemble.history("action")
    found = [analyse_observable(name, values, s=config.analysis.s) for name, values in series.items()]
    results = {key: result for part in [*found, *derive(config, series).values()] for key, result in part.items()}
    training, chain = (sum(cost.get(stage, 0.0) for stage in stages) for stages in (TRAINING, CHAIN))
    return Entry(label, config, actions, results, training, chain)


def _short_labels(entries: Sequence[Entry]) -> list[str]:
    """Return the last parts of the paths where they tell the ensembles apart, else their numbers in the table."""
    names = [Path(entry.label).name for entry in entries]
    return (
        names
        if len(set(names)) == len(names) and max(map(len, names)) <= LONGEST_LABEL
        else [str(number + 1) for number in range(len(entries))]
    )


def _difference(result: GammaResult, first: GammaResult) -> str:
    error = np.hypot(result.error, first.error)
    return f"{(result.mean - first.mean) / error:+.1f}" if error > 0 else ""


def _probability(results: Sequence[GammaResult]) -> str:
    """Return the chi^2 probability that the means agree with their weighted mean."""
    means, errors = (np.array([getattr(r, key) for r in results]) for key in ("mean", "error"))
    if not (np.isfinite(means).all() and (errors > 0).all()):
        return ""
    return f"{equal_means(means, errors):.2g}"


def _costed(entries: Sequence[Entry]) -> list[str]:
    return [name for name in COSTED if name in shared(entries)]


def _costs(entries: Sequence[Entry], numbers: Sequence[str]) -> list[list[str]]:
    names = _costed(entries)
    rows = [["CPU seconds", "training", "chain", *(f"N_eff/s (with training) {name}" for name in names)]]
    for number, entry in zip(numbers, entries, strict=True):
        rates = (f"{entry.rate(n, training=False):.3g} ({entry.rate(n, training=True):.3g})" for n in names)
        rows.append([number, f"{entry.training_seconds:.0f}", f"{entry.chain_seconds:.0f}", *rates])
    return rows
