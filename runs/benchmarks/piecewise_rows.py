"""Where the rows of piecewise.py are kept, by several runs at a time, and the tables that are made of them."""

import fcntl
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from latticeflow.storage import provenance
from latticeflow.storage.atomic import atomic_write_text

PUBLISHED = {
    "two_moons": {"single MAF": ("1", 0.181, 0.048), "piecewise MAF": ("2", 0.0096, 0.012)},
    "circle_of_gaussians": {"single MAF": ("1", 0.506, 0.321), "piecewise MAF": ("8", 0.0232, 0.035)},
    "two_rings": {"single MAF": ("1", 0.674, 0.287), "piecewise MAF": ("14-18", 0.0504, 0.95)},
}
Row = dict[str, Any]


def key(row: Row) -> tuple[str, str, int]:
    return row["target"], row["method"], row["training"]


def stored(folder: Path) -> Row:
    """Return the rows so far by part, and their provenance."""
    file = folder / "piecewise.json"
    return json.loads(file.read_text()) if file.exists() else {}


def keep(folder: Path, part: str, row: Row, order: list[str]) -> None:
    """Put a row in the place of that of the same target, method and training; sort by the order of the names."""

    def place(row: Row) -> tuple[Any, ...]:
        return *(order.index(name) for name in key(row)[:2]), row["training"]

    with _alone(folder):
        results = stored(folder)
        rows = {key(old): old for old in results.get(part, [])} | {key(row): row}
        results[part] = sorted(rows.values(), key=place)
        results["provenance"] = {k: v for k, v in provenance().items() if k not in ("host", "command")}
        atomic_write_text(folder / "piecewise.json", json.dumps(results, indent=1) + "\n")
        atomic_write_text(folder / "piecewise.md", markdown(results))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Have other runs of the script wait."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def mean(rows: list[Row], name: str, digits: int = 4) -> str:
    """Return the mean over trainings, and its standard error where there are two or more."""
    values = np.array([row[name] for row in rows])
    error = f" ({values.std(ddof=1) / math.sqrt(len(values)):.{digits}f})" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{error}"


def cells(target: str, method: str, rows: list[Row]) -> list[str]:
    if "failed" in rows[0]:
        return [target, method, rows[0]["failed"], *[""] * 9]
    pieces = sorted({row["k"] for row in rows})
    coarse = max(abs(row["coarse"][name] - row[name]) for row in rows for name in ("kl_qp", "kl_pq"))
    outside = max(abs(row["mass"] - 1) for row in rows)
    return [
        target,
        method,
        str(pieces[0]) if len(pieces) == 1 else f"{pieces[0]}-{pieces[-1]}",
        *(mean(rows, name) for name in ("kl_qp", "kl_pq")),
        mean(rows, "ess", 3),
        *(f"{value:.1g}" for value in (coarse, outside)),
        *(f"{np.mean([row[name] for row in rows]):.0f}" for name in ("taken", "seconds", "clustering")),
        str(len(rows)),
    ]


def summary(rows: list[Row], *, published: bool) -> list[list[str]]:
    """Return the cells of every target and method, and those of the published weights after each target."""
    found = []
    for target in dict.fromkeys(row["target"] for row in rows):
        own = [row for row in rows if row["target"] == target]
        for method in dict.fromkeys(row["method"] for row in own):
            found.append(cells(target, method, [row for row in own if row["method"] == method]))
        for method, (pieces, *numbers) in PUBLISHED[target].items() if published else ():
            found.append([target, f"{method}, published", pieces, *map(str, numbers), *[""] * 7])
    return found


def markdown(results: Row) -> str:
    columns = "k|KL(q to p)|KL(p to q)|ESS/N|coarser grid|abs(mass - 1)|steps|CPU s|clustering, CPU s|trainings"
    lines = []
    for part, name in (("table", "method"), ("clusterers", "clusterer")):
        if part in results:
            lines += aligned(["target", name, *columns.split("|")], summary(results[part], published=part == "table"))
    if "processes" in results:
        walls = [[*key(row)[:2], f"{row['wall']:.1f}", str(row["steps"])] for row in results["processes"]]
        lines += aligned(["circle_of_gaussians in", "", "wall s", "steps of each piece"], walls)
    row = next(results[part][0] for part in ("table", "clusterers", "processes") if part in results)
    lines.append(
        f"KL(q to p) is <log q - log p> over q. Means over trainings, in brackets their standard errors. "
        f"{row['samples']} draws, batch {row['batch']}, Adam {row['learning_rate']:g} with a cosine to 0, float32, a "
        f"grid of {row['grid']}^2 points, for single flows of {2 * row['grid']}^2; coarser grid: the largest change of "
        "a KL by taking every other point; mass: the integral of q over the grid; one thread, torch "
        f"{results['provenance']['torch']}. Published: the trained weights of arXiv:2305.02930, on a grid too (samples "
        "in boxes: importance weights are unbounded there)."
    )
    return "\n".join(lines) + "\n"


def aligned(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows]] + [""]
