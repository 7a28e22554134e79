"""The tables of training_step.py, and its ratios against what was asked for."""

from collections.abc import Iterator
from itertools import product
from statistics import mean
from typing import Any

from rows import Row, Tables, aligned, measured_on

KEYS = {
    "plain": ("device", "dtype", "L"),
    "estimators": ("device", "dtype", "L", "determinant"),
    "rate": ("device", "dtype", "threads", "L", "implementation"),
    "variance": ("model", "stage", "estimator"),
    "time": ("L", "estimator", "budget", "seed"),
}
PLAIN = ("elements", "blocks", "vectorised")
OURS = ("package", "compiled")
ASKED = (
    ("REINFORCE, plain of ours", 8, "reinforce, elements", "reinforce, {}", ">=", 4.0),
    ("REINFORCE, plain of ours", 16, "reinforce, elements", "reinforce, {}", ">=", 6.0),
    ("reparametrisation, plain of ours", 16, "reparametrisation, elements", "reparametrisation, {}", ">=", 10.0),
    ("reparametrisation of REINFORCE, ours", 16, "reparametrisation, {}", "reinforce, {}", "<=", 1.6),
)


def markdown(tables: Tables) -> str:
    lines: list[str] = []
    if rows := tables.get("plain"):
        head = (
            "device|dtype|L|estimator|package, ms|compiled|plain, ms: elements|blocks|vectorised|of package|of compiled"
        )
        lines += aligned(f"{head}|package, MB|compiled|plain, MB: elements|blocks|vectorised", plain_cells(rows))
    if rows := tables.get("estimators"):
        head = "device|dtype|L|determinant|estimator|ms|of REINFORCE|flow|action|its gradient|backward|MB"
        lines += aligned(head, estimator_cells(rows))
    if rows := tables.get("rate"):
        head = (
            "device|dtype|L|networks|product of 1024^2, GFlop/s|forward, GFlop|GFlop/s|of product|forward and backward"
        )
        lines += aligned(f"{head}|of product|whole step|of product", map(rate_cells, rows))
    if rows := tables.get("variance"):
        head = "model|trained|ESS/N|estimator|trace of covariance / squared mean|typical squared norm / squared mean"
        lines += aligned(f"{head}|ms a gradient|noise times ms, of path", variance_cells(rows))
    if rows := tables.get("time"):
        lines += aligned("L|estimator|CPU s|steps|ESS/N|Pareto k|skipped|trainings", time_cells(rows))
    note = (
        "Times are medians per step, one gradient of the paper's model, all methods of a row in turn; CPU time, on a "
        "GPU the wall's. MB: peak in a process of its own above what it holds between steps. flow: what the estimator "
        "does but for the action and its gradient. Noise and typical norm refer to the mean of the least noisy "
        "estimator. " + measured_on(tables)
    )
    return "\n".join([*lines, *verdicts(tables), "", note]) + "\n"


def milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.4g}"


def plain_cells(rows: list[Row]) -> Iterator[list[Any]]:
    for row in sorted(rows, key=lambda row: (row["device"], row["dtype"], row["L"])):
        for estimator in ("reinforce", "reparametrisation"):
            names = (*OURS, *PLAIN)
            own, peaks = (
                {name: row[what].get(f"{estimator}, {name}") for name in names} for what in ("seconds", "megabytes")
            )
            ratios = [", ".join(f"{own[name] / own[ours]:.1f}" for name in PLAIN if own[name]) for ours in OURS]
            memory = ["" if peaks[name] is None else f"{peaks[name]:.0f}" for name in names]
            times = [milliseconds(own[name]) for name in names]
            yield [row["device"], row["dtype"], row["L"], estimator, *times, *ratios, *memory]


def estimator_cells(rows: list[Row]) -> Iterator[list[Any]]:
    for row in sorted(rows, key=lambda row: (row["device"], row["dtype"], row["determinant"], row["L"])):
        for name, seconds in row["seconds"].items():
            parts = row["split"][name]
            shares = [milliseconds(parts[part]) for part in ("flow", "action", "action_gradient", "backward")]
            ratio = f"{seconds / row['seconds']['reinforce']:.2f}"
            where = [row["device"], row["dtype"], row["L"], row["determinant"], name]
            yield [*where, milliseconds(seconds), ratio, *shares, f"{row['megabytes'][name]:.0f}"]


def rate_cells(row: Row) -> list[Any]:
    found = {name: row["operations"][name] / row["seconds"][name] for name in ("forward", "gradient", "step")}
    cells = [row["device"], row["dtype"], row["L"], row["implementation"], f"{row['product'] / 1e9:.1f}"]
    cells.append(f"{row['operations']['forward'] / 1e9:.2f}")
    for rate in found.values():
        cells += [f"{rate / 1e9:.1f}", f"{rate / row['product']:.2f}"]
    return cells


def variance_cells(rows: list[Row]) -> Iterator[list[Any]]:
    costs = {(row["model"], row["stage"]): row["trace"] * row["seconds"] for row in rows if row["estimator"] == "path"}
    for row in rows:
        squared = row["trace"] / row["relative"] if row["relative"] else None
        relative, typical = (f"{row[x] / squared:.3g}" if squared else "" for x in ("trace", "typical"))
        path = costs.get((row["model"], row["stage"]))
        cost = row["trace"] * row["seconds"] / path if path else None
        where = [row["model"], f"{row['stage'] * row['steps']:.0f} steps", f"{row['ess']:.3f}", row["estimator"]]
        yield [*where, relative, typical, milliseconds(row["seconds"]), "" if cost is None else f"{cost:.3g}"]


def time_cells(rows: list[Row]) -> Iterator[list[Any]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["L"], row["budget"], row["estimator"]), []).append(row)
    for (size, budget, estimator), group in sorted(groups.items(), key=lambda item: item[0][:2]):
        quality = f"{mean(row['ess'] for row in group):.3f} +- {max(row['ess_error'] for row in group):.3f}"
        steps, skipped = (f"{mean(row[name] for row in group):.0f}" for name in ("steps", "skipped"))
        worst = f"{max(row['pareto_k'] for row in group):.2f}"
        yield [size, estimator, f"{budget:.0f}", steps, quality, worst, skipped, len(group)]


def verdicts(tables: Tables) -> list[str]:
    """Return a line for each ratio that was asked for and is measured."""
    lines = []
    for row in tables.get("plain", []):
        for (name, size, *pair, sense, bound), ours in product(ASKED, OURS):
            seconds, (above, below) = row["seconds"], (work.format(ours) for work in pair)
            if row["L"] == size and above in seconds and below in seconds:
                ratio = seconds[above] / seconds[below]
                met = ratio >= bound if sense == ">=" else ratio <= bound
                where = f"{ours}, {size}x{size}, {row['dtype']}, {row['device']}"
                lines.append(f"* {name}, {where}: {ratio:.2f}, asked {sense} {bound:g}: {'met' if met else 'not met'}")
    return lines
