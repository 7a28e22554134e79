"""Training by parts: quality against CPU time for every schedule, and what a local step costs and keeps.

    python analysis/parts.py [--results runs/benchmarks/results/parts.json] [--out analysis/results]

Each panel is a target of runs/benchmarks/parts.py: means over seeds with standard errors, filled symbols for two parts,
open ones for three; the grey band is what counts as equal to end to end, 0.02 bits/dim or 5% of its ESS/N. The last
panel has the memory that a local step keeps for its backward pass against its CPU time, averages over the parts in
units of an end-to-end step, and crosses for the model: backward passes cost two forward passes.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ensembles import ROOT, markdown, new_figure, publish, tidy
from matplotlib.axes import Axes

from latticeflow.plots import CURVES, STYLE

SCHEDULES = ("end_to_end", "sequential", "alternate", "simultaneous")
MARKERS = dict(zip(SCHEDULES, ("D", "s", "o", "^"), strict=True))
EQUAL = {"bits/dim": lambda value: 0.02, "ESS/N": lambda value: 0.05 * value}
Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "benchmarks" / "results" / "parts.json")
    parser.add_argument("--out", type=Path, default=ROOT / "analysis" / "results")
    options = parser.parse_args()
    results = json.loads(options.results.read_text())
    problems = list(dict.fromkeys(row["problem"] for row in results["table"]))
    figure = new_figure(5.0)
    panels = list(figure.subplots(2, 3).flat)
    for panel, problem in zip(panels, problems, strict=False):
        draw_problem(panel, [row for row in results["table"] if row["problem"] == problem])
        panel.set_title(problem, **STYLE["label"])
    draw_costs(panels[-1], results["cost"])
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7, frameon=False
    )
    tidy(panels)
    publish("parts", figure, table(results["cost"]), options.out)


def draw_problem(panel: Axes, rows: Rows) -> None:
    """Draw quality against CPU seconds."""
    unit = rows[0]["unit"]
    for schedule, parts in dict.fromkeys((row["schedule"], row["parts"]) for row in rows):
        own = [row for row in rows if (row["schedule"], row["parts"]) == (schedule, parts)]
        quality, seconds = ([row[name] for row in own] for name in ("quality", "seconds"))
        error = stdev(quality) / len(quality) ** 0.5 if len(quality) > 1 else None
        colour = CURVES[SCHEDULES.index(schedule)]["color"]
        face = colour if parts < 3 else "white"
        label = schedule.replace("_", " ") if parts < 3 else None
        style = {"color": colour, "marker": MARKERS[schedule], "markerfacecolor": face, "markersize": 4}
        panel.errorbar(
            [mean(seconds)], [mean(quality)], yerr=error, linestyle="none", elinewidth=0.8, label=label, **style
        )
        if schedule == SCHEDULES[0]:
            width = EQUAL[unit](mean(quality))
            panel.axhspan(mean(quality) - width, mean(quality) + width, color="0.92", zorder=0)
    panel.set(xlabel="CPU seconds", ylabel=unit)
    panel.set_xlim(0, 1.08 * max(row["seconds"] for row in rows))


def draw_costs(panel: Axes, rows: Rows) -> None:
    """Draw memory against time of local steps."""
    for row in rows:
        face = "black" if row["parts"] == 2 else "white"
        panel.plot(row["mean"], mean(row["kept"]), "o", color="black", markerfacecolor=face, markersize=4)
    for parts, model in dict.fromkeys((row["parts"], row["model"]) for row in rows):
        panel.plot(model, 1 / parts, "x", color=CURVES[1]["color"], markersize=6)
    panel.plot(1, 1, "D", color=CURVES[0]["color"], markersize=4)
    panel.set(xlabel="CPU time of a local step", ylabel="kept for its backward pass", xlim=(0, 1.1), ylim=(0, 1.1))
    panel.set_title("of an end-to-end step", **STYLE["label"])


def table(rows: Rows) -> str:
    """Return the costs."""
    lines = [
        [row["problem"], str(row["parts"]), f"{row['mean']:.2f}", f"{row['model']:.2f}", f"{mean(row['kept']):.2f}"]
        for row in rows
    ]
    return markdown(["target", "parts", "CPU time of a local step", "model", "kept for its backward pass"], lines)


if __name__ == "__main__":
    main()
