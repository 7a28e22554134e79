"""Where the rows of ebflow.py are kept, by several runs at a time, and the tables that are made of them."""

import fcntl
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from ebflow_training import LOSSES

from latticeflow.storage import atomic_write_text, provenance

Row = dict[str, Any]
KEYS: dict[str, tuple[str, ...]] = {
    "cost": ("batch", "D", "loss"),
    "digits": ("linear", "slope", "loss", "matched", "seed"),
    "plane": ("target", "loss", "seed"),
    "gaussian": ("loss", "width", "seed"),
    "modes": ("separation", "loss", "width", "seed"),
    "linear": ("linear", "rate", "seed"),
    "synthetic": ("D", "rate", "loss", "seed"),
}
LARGE, AT = 512, 1024
"""Exponents are fitted from LARGE on, ratios are those at AT."""


def keep(folder: Path, part: str, row: Row) -> None:
    """Put a row into the results, in place of an older one of its kind."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "ebflow.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = folder / "ebflow.json"
        results = json.loads(file.read_text()) if file.exists() else {}
        rows = {place(part, old): old for old in results.get(part, [])} | {place(part, row): row}
        results[part] = [rows[each] for each in sorted(rows)]
        results["provenance"] = {k: v for k, v in provenance().items() if k not in ("host", "command")}
        atomic_write_text(file, json.dumps(results, indent=1) + "\n")
        atomic_write_text(folder / "ebflow.md", markdown(results))


def place(part: str, row: Row) -> tuple[Any, ...]:
    """Return where a row comes in its table: by its keys, losses in their order."""
    own = {"loss": LOSSES.index, "width": lambda width: width or 0.0}
    return tuple(own.get(key, lambda value: value)(row[key]) for key in KEYS[part])


def markdown(results: Row) -> str:
    """Return all tables."""
    lines: list[str] = []
    if rows := results.get("cost"):
        lines += aligned(["CPU ms of a gradient", *LOSSES], cost_cells(rows))
    if rows := results.get("digits"):
        head = "digits, W|loss|score of|nats, averaged weights|best|last weights|best|CPU s|skipped|seeds"
        lines += aligned(head.split("|"), digit_cells(rows))
    if rows := results.get("plane"):
        lines += aligned(
            ["plane", "loss", "KL(p to q)", "Fisher", "abs(mass - 1)", "CPU s", "seeds"], planar_cells(rows)
        )
    if rows := results.get("gaussian"):
        head = "Gaussian, minimised by|width|its KL(p to q)|found|largest error of the precision|from the exact one"
        lines += aligned(head.split("|"), gaussian_cells(rows))
    if rows := results.get("modes"):
        head = "distance of the modes|loss|width|weight of the left one (0.3)|KL(p to q)|of p smoothed|Fisher"
        lines += aligned(head.split("|"), mode_cells(rows))
    if rows := results.get("linear"):
        head = "free field 8x8, W is|rate|steps|largest error of the spectrum|ESS/N|CPU s|seeds"
        lines += aligned(head.split("|"), linear_cells(rows))
    if rows := results.get("synthetic"):
        head = "D|loss|rate|steps|CPU s|gap, averaged weights|last|gap at the time that all had"
        lines += aligned(head.split("|"), synthetic_cells(rows))
    note = (
        "CPU seconds of steps alone, one thread, float32, Adam with a cosine to 0 (synthetic: constant rate), weights "
        "averaged with a decay of 0.999; in brackets standard errors over seeds. Nats are of continuous grey levels. "
        f"Fisher is 1/2 E_p|s_p - s_q|^2. Exponents are from D >= {LARGE}; torch {results['provenance']['torch']}."
    )
    return "\n".join([*lines, note]) + "\n"


def aligned(columns: list[str], rows: Iterable[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)] + [""]


def groups(rows: list[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Return the rows that agree in these keys, in their order."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def average(values: Iterable[float], digits: str = ".3f") -> str:
    """Return the mean, and in brackets its standard error where there is one."""
    numbers = list(values)
    error = f" ({stdev(numbers) / math.sqrt(len(numbers)):{digits}})" if len(numbers) > 1 else ""
    return f"{mean(numbers):{digits}}{error}"


def exponent(rows: list[Row]) -> float | None:
    """Return the slope of log time against log D, None for fewer than two D that are large."""
    large = [row for row in rows if row["D"] >= LARGE]
    if len(large) < 2:
        return None
    return float(np.polyfit(*(np.log([row[key] for row in large]) for key in ("D", "milliseconds")), 1)[0])


def cost_cells(rows: list[Row]) -> Iterator[list[str]]:
    for (batch,), own in groups(rows, "batch").items():
        for (dimension,), line in groups(own, "D").items():
            taken = {row["loss"]: f"{row['milliseconds']:.2f}" for row in line}
            yield [f"batch {batch}, D = {dimension}", *(taken.get(loss, "") for loss in LOSSES)]
        by_loss = {loss: found for (loss,), found in groups(own, "loss").items()}
        slopes = {loss: exponent(found) for loss, found in by_loss.items()}
        if any(slopes.values()):
            cells = (f"{slopes[loss]:.2f}" if slopes.get(loss) is not None else "" for loss in LOSSES)
            yield [f"batch {batch}, exponent", *cells]
        ratios = {row["loss"]: f"{row['ratio']:.2f}" for row in own if row["D"] == AT}
        if ratios:
            yield [f"batch {batch}, times faster at D = {AT}", *(ratios.get(loss, "") for loss in LOSSES)]


def digit_cells(rows: list[Row]) -> Iterator[list[str]]:
    for (linear, slope, loss, matched), own in groups(rows, "linear", "slope", "loss", "matched").items():
        nats = [
            average(value(row["curve"][which]) for row in own)
            for which in ("average", "last")
            for value in (lambda curve: curve[-1], min)
        ]
        seconds, skipped = f"{mean(row['seconds'] for row in own):.0f}", str(sum(row["skipped"] for row in own))
        yield [
            f"{linear}, slope {slope:g}",
            loss,
            matched if loss != LOSSES[0] else "",
            *nats,
            seconds,
            skipped,
            str(len(own)),
        ]


def planar_cells(rows: list[Row]) -> Iterator[list[str]]:
    for (target, loss), own in groups(rows, "target", "loss").items():
        numbers = [average((row[name] for row in own), ".4f") for name in ("kl", "fisher")]
        outside = max(abs(row["mass"] - 1) for row in own)
        seconds = f"{mean(row['seconds'] for row in own):.0f}"
        yield [target, loss, *numbers, f"{outside:.1g}", seconds, str(len(own))]


def gaussian_cells(rows: list[Row]) -> Iterator[list[str]]:
    for (loss, width), own in groups(rows, "loss", "width").items():
        numbers = [f"{mean(row[name] for row in own):.4f}" for name in ("predicted_kl", "kl")]
        errors = [f"{mean(row[name] for row in own):.3f}" for name in ("error", "bias")]
        yield [loss, f"{width:g}" if width else "", *numbers, *errors]


def mode_cells(rows: list[Row]) -> Iterator[list[str]]:
    for (separation, loss, width), own in groups(rows, "separation", "loss", "width").items():
        weight, kl, fisher = (average((row[name] for row in own), ".4f") for name in ("left", "kl", "fisher"))
        smoothed = f"{own[0]['smoothed_kl']:.4f}" if own[0]["smoothed_kl"] is not None else ""
        yield [f"{separation:g}", loss, f"{width:g}" if width else "", weight, kl, smoothed, fisher]


def linear_cells(rows: list[Row]) -> Iterator[list[str]]:
    for (linear, rate), own in groups(rows, "linear", "rate").items():
        error, steps = f"{max(row['error'] for row in own):.2g}", str(own[0]["steps"])
        size, seconds = average(row["ess"] for row in own), f"{mean(row['seconds'] for row in own):.0f}"
        yield [linear, f"{rate:g}", steps, error, size, seconds, str(len(own))]


def synthetic_cells(rows: list[Row]) -> Iterator[list[str]]:
    for (dimension, seed), own in groups(rows, "D", "seed").items():
        shared = min(row["curve"]["seconds"][-1] for row in own)
        for row in own:
            curve = row["curve"]
            gaps = [f"{curve[which][-1]:.2f}" for which in ("average", "last")]
            there = np.interp(shared, curve["seconds"], curve["average"])
            name = f"{dimension}" if seed == 1 else f"{dimension}, seed {seed}"
            settings = [row["loss"], f"{row['rate']:g}", str(row["steps"]), f"{row['seconds']:.0f}"]
            yield [name, *settings, *gaps, f"{there:.2f} at {shared:.0f} s"]
