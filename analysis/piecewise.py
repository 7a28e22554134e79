"""Piecewise flows: what they are cut from, their density beside that of one flow, and the measured divergences.

python analysis/piecewise.py [--results runs/benchmarks/results/piecewise.json] [--out analysis/results]

The upper rows show for each target of arXiv:2305.02930 draws by K-means cluster, the density, and those of one MAF and
of a piecewise one, trained here with a fixed seed by a third of the benchmark's steps, the same for both. Grey levels
are those of the density, up to its largest. Below are the divergences that runs/benchmarks/piecewise.py found, means
over trainings with their standard errors, open symbols for the published weights; the table has the numbers.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ensembles import ROOT, markdown, new_figure, publish, tidy
from matplotlib.axes import Axes
from torch import Tensor

from latticeflow.actions.densities import CircleOfGaussians, Density, TwoMoons, TwoRings
from latticeflow.flows import autoregressive_flow
from latticeflow.plots import CURVES, STYLE
from latticeflow.priors import Normal
from latticeflow.samplers import FlowSampler, Sampler, partition, standardised
from latticeflow.streams import stream
from latticeflow.training import LikelihoodSettings, fit, fit_pieces

SEED, SAMPLES, SHOWN, SIDE, POINTS = 1, 20000, 1500, 3.0, 200
TARGETS: dict[str, tuple[Density, int]] = {
    "two moons": (TwoMoons(), 700),
    "circle of Gaussians": (CircleOfGaussians(), 700),
    "two rings": (TwoRings(), 1400),
}
COLUMNS = ("clusters", "target", "single MAF", "piecewise MAF")
MARKERS = ("o", "s", "^", "D", "v", "P")
PUBLISHED = {
    "two moons": {"single MAF": (0.181, 0.048), "piecewise MAF": (0.0096, 0.012)},
    "circle of Gaussians": {"single MAF": (0.506, 0.321), "piecewise MAF": (0.0232, 0.035)},
    "two rings": {"single MAF": (0.674, 0.287), "piecewise MAF": (0.0504, 0.95)},
}
Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = ROOT / "runs" / "benchmarks" / "results" / "piecewise.json"
    parser.add_argument("--results", type=Path, default=results, help="what the benchmark wrote")
    parser.add_argument("--out", type=Path, default=ROOT / "analysis" / "results", help="folder of figure and table")
    options = parser.parse_args()
    rows = json.loads(options.results.read_text())["table"]
    torch.set_num_threads(1)
    figure = new_figure(7.6)
    above, below = figure.subfigures(2, 1, height_ratios=(3.1, 1))
    grid = above.subplots(len(TARGETS), len(COLUMNS), sharex=True, sharey=True)
    for panels, (name, (target, steps)) in zip(grid, TARGETS.items(), strict=True):
        draw_target(panels, target, steps)
        panels[0].set_ylabel(name)
    for panel, title in zip(grid[0], COLUMNS, strict=True):
        panel.set_title(title, **STYLE["label"])
    pair = below.subplots(1, 2, sharey=True)
    for panel, quantity in zip(pair, ("kl_qp", "kl_pq"), strict=True):
        draw_divergences(panel, rows, quantity)
    handles, names = pair[0].get_legend_handles_labels()
    below.legend(handles, names, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    tidy((*grid.flat, *pair))
    publish("piecewise", figure, table(rows), options.out)


def maf(data: Tensor) -> FlowSampler:
    return standardised(autoregressive_flow((2,)), Normal((2,)), data)


def draw_target(panels: np.ndarray, target: Density, steps: int) -> None:
    """Draw the clusters of a target's draws, its density and those of a single and a piecewise flow."""
    data = target.sample(SAMPLES, stream(SEED, "figure"))
    cut = partition(data, seed=SEED)
    torch.manual_seed(SEED)
    single = maf(data)
    settings = {"batch": 512, "learning_rate": 1e-2, "seed": SEED}
    fit(single, data, settings=LikelihoodSettings(steps=steps, **settings))
    own = LikelihoodSettings(steps=steps // cut.pieces, evaluate_every=10, **settings)
    pieces, _ = fit_pieces(lambda _, part: maf(part), data, cut.labels, settings=own)
    colours = np.array(neighbours_apart(data, cut.labels))
    for k in range(cut.pieces):
        x, y = data[:SHOWN][cut.labels[:SHOWN] == k].T
        panels[0].plot(x, y, ".", markersize=1.5, color=CURVES[colours[k]]["color"])
    panels[0].text(0.03, 0.97, f"k = {cut.pieces}", transform=panels[0].transAxes, va="top", **STYLE["small"])
    densities = [density(lambda x: -target(x) - target.log_z), *map(of_sampler, (single, pieces))]
    for panel, values in zip(panels[1:], densities, strict=True):
        settings = {"extent": (-SIDE, SIDE, -SIDE, SIDE), "origin": "lower", "cmap": "Greys", "vmin": 0}
        panel.imshow(values.T, vmax=densities[0].max(), **settings)
    for panel in panels:
        panel.set(aspect="equal", xlim=(-SIDE, SIDE), ylim=(-SIDE, SIDE), xticks=(-2, 0, 2), yticks=(-2, 0, 2))


def neighbours_apart(data: Tensor, labels: Tensor) -> list[int]:
    """Return a colour for each cluster, other than those of its nearest clusters as far as there are enough."""
    centres = torch.stack([data[labels == k].mean(0) for k in range(int(labels.max()) + 1)])
    nearest = torch.cdist(centres, centres).argsort(dim=1)[:, 1:5].tolist()
    colours: list[int] = []
    for k, others in enumerate(nearest):
        near = [j for j in range(k) if j in others or k in nearest[j]]
        free = [c for c in range(len(CURVES)) if c not in [colours[j] for j in near]]
        colours.append(min(free or range(len(CURVES)), key=colours.count))
    return colours


@torch.no_grad()
def density(log_density: Any) -> np.ndarray:
    """Return a density at the centres of the cells of the box, `(points, points)`."""
    line = (torch.arange(POINTS, dtype=torch.float64) + 0.5) * (2 * SIDE / POINTS) - SIDE
    return log_density(torch.cartesian_prod(line, line)).exp().reshape(POINTS, POINTS).numpy()


def of_sampler(sampler: Sampler) -> np.ndarray:
    return density(lambda x: sampler.eval().log_prob(x.float()).double())


def averages(rows: Rows, quantity: str) -> dict[tuple[str, str], tuple[float, float]]:
    """Return mean and standard error over trainings by target and method."""
    found = {}
    for target, method in dict.fromkeys((row["target"], row["method"]) for row in rows):
        values = np.array([row[quantity] for row in rows if (row["target"], row["method"]) == (target, method)])
        error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        found[target, method] = float(values.mean()), float(error)
    return found


def draw_divergences(panel: Axes, rows: Rows, quantity: str) -> None:
    """Draw one divergence for every target and method."""
    found, methods = averages(rows, quantity), list(dict.fromkeys(row["method"] for row in rows))
    for number, method in enumerate(methods):
        colour = CURVES[number % len(CURVES)]["color"]
        style = {"color": colour, "marker": MARKERS[number], "linestyle": "none", "markersize": 4}
        label: str | None = method
        for place, (name, (target, _)) in enumerate(TARGETS.items()):
            height = place + 0.14 * (number - (len(methods) - 1) / 2)
            if (target.theory, method) in found:
                value, error = found[target.theory, method]
                panel.errorbar([value], [height], xerr=[error], elinewidth=0.8, label=label, **style)
                label = None
            if method in PUBLISHED[name]:
                value = PUBLISHED[name][method][quantity == "kl_pq"]
                panel.plot([value], [height], **style, markerfacecolor="white")
    names = {"kl_qp": r"$\mathrm{KL}(q\,\|\,p)$", "kl_pq": r"$\mathrm{KL}(p\,\|\,q)$"}
    panel.set(xscale="log", xlabel=names[quantity], ylim=(len(TARGETS) - 0.5, -0.5))
    panel.set_yticks(range(len(TARGETS)), list(TARGETS))


def table(rows: Rows) -> str:
    """Return the divergences of every target and method with the number of trainings."""
    reverse, forward, sizes = (averages(rows, quantity) for quantity in ("kl_qp", "kl_pq", "ess"))
    lines = []
    for target, method in reverse:
        trainings = sum((row["target"], row["method"]) == (target, method) for row in rows)
        numbers = [shown(*found[target, method]) for found in (reverse, forward, sizes)]
        lines.append([target, method, *numbers, str(trainings)])
    note = "The densities of the figure are those of flows with a third of the steps that these numbers are of."
    return markdown(["target", "method", "KL(q to p)", "KL(p to q)", "ESS/N", "trainings"], lines) + f"\n\n{note}"


def shown(value: float, error: float) -> str:
    return f"{value:.4f}" if math.isnan(error) else f"{value:.4f} ({error:.4f})"


if __name__ == "__main__":
    main()
