"""ESS/N of the README's model against CPU seconds of training.

    python analysis/curve.py [--results runs/benchmarks/results/curve.json] [--out analysis/results]

The rows of runs/benchmarks/curve.py, one curve for each length of the schedule; open symbols are the weights that a
training keeps. Lines: what tuned quenched draws give without training, and what no flow that is blind to the holonomies
can exceed without the average over their orbits (PHYSICS, section 4).
"""

import argparse
import json
from pathlib import Path
from typing import Any

from ensembles import ROOT, markdown, new_figure, publish, tidy
from matplotlib.axes import Axes

from latticeflow.plots import CURVES, STYLE

LEVELS = {"no training": 0.498, "cap without orbits": 0.68, "aim": 0.75}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "benchmarks" / "results" / "curve.json")
    parser.add_argument("--out", type=Path, default=ROOT / "analysis" / "results")
    options = parser.parse_args()
    results = json.loads(options.results.read_text())
    figure = new_figure(2.8)
    panel = figure.subplots()
    for index, times in enumerate(dict.fromkeys(row["times"] for row in results["rows"])):
        own = [row for row in results["rows"] if row["times"] == times]
        draw(panel, own, f"{times * results['options']['steps']} steps", CURVES[index]["color"])
    for name, level in LEVELS.items():
        panel.axhline(level, color="0.6", linewidth=0.7, linestyle=":", zorder=0)
        panel.annotate(
            name, (1.0, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", **STYLE["small"]
        )
    panel.set(xlabel="CPU seconds of training", ylabel="ESS/N", ylim=(0.45, 0.85))
    panel.set_xlim(left=0)
    panel.legend(loc="lower right", fontsize=7, frameon=False)
    tidy([panel])
    publish("curve", figure, table(results), options.out)


def draw(panel: Axes, rows: list[dict[str, Any]], label: str, colour: str) -> None:
    """Draw the rows of one training."""
    style = {"color": colour, "elinewidth": 0.8, "markersize": 4}
    for kept, marker in ((False, "o-"), (True, "D")):
        own = [row for row in rows if row["kept"] is kept]
        if own:
            values = ([row[name] for row in own] for name in ("cpu_seconds", "ess", "ess_error"))
            face = {"markerfacecolor": "white", "zorder": 3} if kept else {"label": label}
            panel.errorbar(*values, fmt=marker, linewidth=1.0, **style, **face)


def table(results: dict[str, Any]) -> str:
    """Return what is drawn."""
    rows = [
        [
            f"{row['times'] * results['options']['steps']}",
            f"{row['step']}{' kept' * row['kept']}",
            f"{row['cpu_seconds']:.0f}",
            f"{row['ess']:.3f}",
            f"{row['ess_error']:.3f}",
        ]
        for row in results["rows"]
    ]
    return markdown(["schedule", "step", "CPU s", "ESS/N", "error"], rows)


if __name__ == "__main__":
    main()
