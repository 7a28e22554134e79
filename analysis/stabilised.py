"""Stabilised flows against others: ELBO and log Z by target and method, ESS against depth, cost of a step against D.

python analysis/stabilised.py [--results runs/benchmarks/results/stabilised.json] [--out analysis/results]

Draws what runs/benchmarks/stabilised.py measured. The upper panels have one row per method and one column per target:
how far the ELBO is below log Z (exact where it is known, else by HMC or annealed importance sampling, whichever has
the smaller error, else that of the flow with the largest ELBO), and the deviation of log Z with the spread of its 20
repeats. Triangles at an edge are beyond it, or not finite.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from ensembles import ROOT, markdown, new_figure, publish, tidy
from matplotlib.axes import Axes

from latticeflow.plots import CURVES, STYLE

LARGEST_GAP, LARGEST_DEVIATION = 30.0, 1.0
Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = ROOT / "runs" / "benchmarks" / "results" / "stabilised.json"
    parser.add_argument("--results", type=Path, default=results, help="what the benchmark wrote")
    parser.add_argument("--out", type=Path, default=ROOT / "analysis" / "results", help="folder of figure and table")
    options = parser.parse_args()
    found = json.loads(options.results.read_text())
    ablated = ("no path gradient", "normal base")
    flows = [row for row in found["table"] if row["layers"] and not row["method"].endswith(ablated)]
    known = known_log_z(found["table"])
    figure = new_figure(6.6)
    above, below = figure.subfigures(2, 1, height_ratios=(3, 2))
    gap, deviation = above.subplots(1, 2, sharey=True)
    draw_targets(gap, flows, known, quantity="elbo")
    draw_targets(deviation, flows, known, quantity="log_z")
    gap.invert_yaxis()
    names = dict(zip(*reversed(gap.get_legend_handles_labels()), strict=True))
    above.legend(names.values(), names.keys(), loc="outside upper center", ncols=4, fontsize=7, frameon=False)
    depth, cost = below.subplots(1, 2)
    draw_depth(depth, found.get("depth", []))
    draw_cost(cost, found.get("cost", []))
    tidy((gap, deviation, depth, cost))
    publish("stabilised", figure, table(flows, known), options.out)


def known_log_z(rows: Rows) -> dict[str, float]:
    """Return log Z of each target: exact, else by HMC or AIS, else that of the flow with the largest ELBO."""
    flows = [row for row in rows if row["layers"]]
    others = [row for row in rows if row["method"] in ("HMC", "AIS")]
    known = {row["target"]: row["log_z"] for row in sorted(flows, key=lambda row: row["elbo"])}
    known |= {row["target"]: row["log_z"] for row in sorted(others, key=lambda row: -row["log_z_spread"])}
    return known | {row["target"]: row["exact"] for row in rows if row["exact"] is not None}


def draw_targets(panel: Axes, rows: Rows, known: dict[str, float], *, quantity: str) -> None:
    """Draw the ELBO's gap or log Z's deviation for every target, one symbol per method."""
    targets, methods = list(known_order(rows)), list(dict.fromkeys(row["method"] for row in rows))
    for number, method in enumerate(methods):
        style = {**CURVES[number % len(CURVES)], "linestyle": "none", "markersize": 4}
        if number >= len(CURVES):
            style["markerfacecolor"] = "white"
        label = method
        for row in (row for row in rows if row["method"] == method):
            place = targets.index(row["target"]) + 0.1 * (number - len(methods) / 2)
            value = row[quantity] - known[row["target"]]
            x = max(-value, 1e-3) if quantity == "elbo" else value
            limit = LARGEST_GAP if quantity == "elbo" else LARGEST_DEVIATION
            if not math.isfinite(x) or abs(x) > limit:
                edge, marker = (-limit, "<") if x < 0 and quantity == "log_z" else (limit, ">")
                panel.plot([edge], [place], **style | {"marker": marker, "markersize": 5}, clip_on=False)
                continue
            error = row["log_z_spread"] if quantity == "log_z" else None
            panel.errorbar([x], [place], xerr=error, elinewidth=0.8, label=label, **style)
            label = None
    panel.set_yticks(range(len(targets)), targets, fontsize=7)
    if quantity == "elbo":
        panel.set(xscale="log", xlim=(1e-3, LARGEST_GAP), xlabel="log Z - ELBO")
    else:
        panel.axvline(0, color="0.6", linewidth=0.8)
        panel.set(xlim=(-LARGEST_DEVIATION, LARGEST_DEVIATION), xlabel="estimated - known log Z")


def known_order(rows: Rows) -> dict[str, None]:
    """Return the targets in the order of the table."""
    return dict.fromkeys(row["target"] for row in rows)


def draw_depth(panel: Axes, rows: Rows) -> None:
    """Draw the ESS against the number of layers, and how many steps were skipped."""
    for style, method in zip(CURVES, dict.fromkeys(row["method"] for row in rows), strict=False):
        chosen = [row for row in rows if row["method"] == method]
        layers, sizes = [row["layers"] for row in chosen], [max(row["ess"], 1e-5) for row in chosen]
        panel.plot(layers, sizes, label=method, **style | {"markersize": 4})
        for row, size in zip(chosen, sizes, strict=True):
            if row["skipped"]:
                panel.annotate(f"{row['skipped']} skipped", (row["layers"], size), fontsize=6)
    panel.set(xscale="log", yscale="log", xlabel="layers (student-t, D = 50)", ylabel="ESS$/N$")
    panel.set_xticks([row["layers"] for row in rows], labels=[str(row["layers"]) for row in rows])
    panel.minorticks_off()
    panel.legend(**STYLE["legend"] | {"fontsize": 7})


def draw_cost(panel: Axes, rows: Rows) -> None:
    """Draw the CPU seconds of a step against the dimension, with a line of slope 1 through the last point."""
    dimensions, seconds = (np.array([row[key] for row in rows], dtype=float) for key in ("D", "seconds"))
    panel.plot(dimensions, seconds, **CURVES[0] | {"markersize": 4})
    if len(rows):
        panel.plot(dimensions, seconds[-1] * dimensions / dimensions[-1], color="0.6", linewidth=0.8, linestyle=":")
    panel.set(xscale="log", yscale="log", xlabel="D (horseshoe, 64 layers, batch 16)", ylabel="CPU seconds a step")


def table(rows: Rows, known: dict[str, float]) -> str:
    """Return for every target the method with the largest ELBO, beside those of the rest."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = []
    for target in known_order(rows):
        elbo = {row["method"]: row["elbo"] for row in rows if row["target"] == target}
        best = max(elbo, key=elbo.__getitem__)
        shown = [f"**{elbo[m]:.3f}**" if m == best else f"{elbo[m]:.3f}" if m in elbo else "" for m in methods]
        lines.append([target, f"{known[target]:.3f}", *shown])
    return markdown(["target", "log Z", *(f"ELBO, {method}" for method in methods)], lines)


if __name__ == "__main__":
    main()
