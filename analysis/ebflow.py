"""Energy-based flows: cost of a step, quality against CPU time, and a density of the plane by every loss.

    python analysis/ebflow.py [--results runs/benchmarks/results/ebflow.json] [--out analysis/results]

Draws what runs/benchmarks/ebflow.py measured: CPU time of a gradient against D with the exponents of D >= 512; the nats
of held-out digits against CPU seconds, means over seeds of averaged weights, the score being that of standardised
logits; a density of the plane, exact and learned; and how far a matrix of 1024 variables is from the Gaussian that it
learns, against CPU seconds, each loss with the best of three rates.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from ensembles import ROOT, markdown, new_figure, publish, tidy
from matplotlib.axes import Axes

from latticeflow.plots import CURVES, STYLE

LOSSES = ("likelihood", "sliced", "denoising", "finite_difference", "explicit")
LOOKS = dict(zip(LOSSES, (*CURVES, {"color": "#009e73", "linestyle": "-", "marker": "v"}), strict=True))
SHOWN = ("exact", "likelihood", "sliced", "denoising")
SIDE, LARGE = 10.5, 512
SHARED = ("dense", 0.7, "standard logits")
Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "benchmarks" / "results" / "ebflow.json")
    parser.add_argument("--out", type=Path, default=ROOT / "analysis" / "results")
    options = parser.parse_args()
    results = json.loads(options.results.read_text())
    figure = new_figure(5.2)
    above, below = figure.subfigures(2, 1, height_ratios=(3, 2))
    cost, digits, synthetic = above.subplots(1, 3)
    slopes = draw_cost(cost, results.get("cost", []))
    draw_digits(digits, results.get("digits", []))
    draw_gaps(synthetic, results.get("synthetic", []))
    panels = list(below.subplots(1, len(SHOWN), sharex=True, sharey=True))
    draw_plane(panels, results.get("plane", []))
    above.legend(*cost.get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=7, frameon=False)
    tidy((cost, digits, synthetic, *panels))
    publish("ebflow", figure, table(results.get("cost", []), slopes), options.out)


def draw_cost(panel: Axes, rows: Rows) -> dict[str, float]:
    """Draw milliseconds against D for the smallest batch; return the exponents."""
    slopes: dict[str, float] = {}
    smallest = min((row["batch"] for row in rows), default=0)
    for loss in LOSSES:
        own = [row for row in rows if row["loss"] == loss and row["batch"] == smallest]
        dimensions, times = (np.array([row[key] for row in own], dtype=float) for key in ("D", "milliseconds"))
        large, label = dimensions >= LARGE, loss.replace("_", " ")
        if large.sum() > 1:
            slope, offset = np.polyfit(np.log(dimensions[large]), np.log(times[large]), 1)
            slopes[loss] = float(slope)
            line = np.exp(offset) * dimensions[large] ** slope
            panel.plot(dimensions[large], line, color=LOOKS[loss]["color"], linewidth=0.8)
            label += f", $D^{{{slope:.2f}}}$"
        panel.plot(dimensions, times, **LOOKS[loss] | {"linestyle": "none", "markersize": 4}, label=label)
    panel.set(xscale="log", yscale="log", xlabel=f"D (batch {smallest})", ylabel="CPU ms of a gradient")
    return slopes


def draw_digits(panel: Axes, rows: Rows) -> None:
    """Draw the held-out nats against CPU seconds, means over seeds of both."""
    for loss in LOSSES:
        curves = [row["curve"] for row in rows if row["loss"] == loss and own_settings(row) == SHARED]
        if curves:
            seconds, nats = (np.mean([curve[key] for curve in curves], axis=0) for key in ("seconds", "average"))
            panel.plot(seconds[1:], nats[1:], **LOOKS[loss] | {"marker": "", "linewidth": 1.2})
    panel.set(xscale="log", xlabel="CPU seconds", ylabel="nats, held-out digits")


def own_settings(row: dict[str, Any]) -> tuple[str, float, str]:
    return row["linear"], row["slope"], row["matched"]


def draw_gaps(panel: Axes, rows: Rows) -> None:
    """Draw the gap to the entropy against CPU seconds, for each loss with the rate of the smallest one at the end."""
    best = {row["loss"]: row for row in sorted(rows, key=lambda row: row["curve"]["average"][-1], reverse=True)}
    for row in best.values():
        curve, look = row["curve"], LOOKS[row["loss"]] | {"marker": "", "linewidth": 1.2}
        panel.plot(curve["seconds"][1:], curve["average"][1:], **look)
    title = f" (D = {rows[0]['D']})" if rows else ""
    panel.set(yscale="log", xlabel="CPU seconds", ylabel=f"nats above the entropy{title}")


def draw_plane(panels: list[Axes], rows: Rows) -> None:
    """Draw the stored densities, with one scale of grey."""
    grids = {row["loss"]: row["density"] for row in rows if "density" in row}
    for row in rows:
        if "exact_density" in row:
            grids["exact"] = row["exact_density"]
    exact = as_array(grids["exact"]) if "exact" in grids else np.zeros((1, 1))
    for panel, name in zip(panels, SHOWN, strict=True):
        if name in grids:
            look = {"cmap": "Greys", "vmin": 0, "vmax": 1.2 * exact.max(), "extent": (-SIDE, SIDE, -SIDE, SIDE)}
            panel.imshow(as_array(grids[name]), origin="lower", **look)
        panel.set(xlim=(-8, 8), ylim=(-8, 8), xticks=(), yticks=())
        panel.set_title(name, **STYLE["label"])


def as_array(rows: list[str]) -> np.ndarray:
    return np.array([row.split() for row in rows], dtype=float)


def table(rows: Rows, slopes: dict[str, float]) -> str:
    """Return the exponents, and how much faster than maximum likelihood a gradient is at D = 1024."""
    smallest = min((row["batch"] for row in rows), default=0)
    at = {row["loss"]: row["ratio"] for row in rows if row["D"] == 1024 and row["batch"] == smallest}
    lines = [[loss, f"{slope:.2f}", f"{at[loss]:.2f}" if loss in at else ""] for loss, slope in slopes.items()]
    return markdown(["loss", "exponent, D >= 512", "times faster at D = 1024"], lines)


if __name__ == "__main__":
    main()
