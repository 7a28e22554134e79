"""Topological charge: how HMC freezes as beta grows, and what winding steps and a flow do about it.

python analysis/topology.py [--runs runs/topology] [--out analysis/results]

Pure gauge theory on 16x16 (runs/u1-topology.toml) by HMC and by HMC with winding steps, all from cold starts, beside
the exact distribution of Q, and where its ESS allows by a flow from the Haar-uniform prior after 100 steps of training;
then the two-flavour Schwinger model on 8x8 at kappa = 0.25 (runs/schwinger-topology.toml) by the same two and by a flow
after 150 steps. That flow starts from exact quenched draws, whose charges never freeze: what it shows is that fermions
can be added at a tau_int that does not grow, not that a flow has learned to tunnel. The table has the ESS/N of flows
beside that of the best quenched draws, which need no training and do as well at this kappa.

HMC's tau_int cannot be measured where the Gamma method does not converge, or where the sectors are not those known from
elsewhere. The figure then has a lower bound: `<Q^2>` over the rate of `(change of Q)^2` per draw, which is tau_int of
Q^2 if Q walks at random, and more if it goes back and forth, as HMC does; the rate is the largest that is compatible
with the changes seen (95%, Poisson).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ensembles import arguments, ensemble, markdown, new_figure, publish, tidy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from scipy.special import chdtri

from latticeflow.cli.report import value_error
from latticeflow.plots import CURVES, STYLE
from latticeflow.stats import GammaResult, gamma_method
from latticeflow.storage import Ensemble

KERNELS = {"HMC": ["hmc"], "HMC + winding": ["hmc", "winding"], "flow": ["independence"]}
BETAS = {
    ("u1", "HMC"): (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0),
    ("u1", "HMC + winding"): (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0),
    ("schwinger", "HMC"): (2.0, 4.0, 6.0),
    ("schwinger", "HMC + winding"): (2.0, 4.0, 6.0),
    ("schwinger", "flow"): (2.0, 4.0, 6.0),
    ("u1", "flow"): (1.0, 2.0),
}
TITLES = {"u1": r"pure gauge theory, 16$\times$16", "schwinger": r"Schwinger model, 8$\times$8, $\kappa = 0.25$"}
LOOKS = dict(zip(KERNELS, CURVES, strict=False))
FROM_DRAWS = {"chain.start": "draws", "chain.thermalisation": 0}
FLOW = {
    "u1": FROM_DRAWS | {"chain.draws": 128},
    "schwinger": FROM_DRAWS | {"action.holonomies": [6, 3]},
}
CONFIDENCE = 0.95
PRIOR_SHIFT = 0.2
SHIFTS = (-0.06, 0.0, 0.06)
"""Displacement of the three algorithms along beta in the figure."""


@dataclass(frozen=True)
class Point:
    """One run: charges `(chain, draw)`, P(Q) as known from elsewhere, tau_int of Q^2 or its lower bound."""

    theory: str
    beta: float
    algorithm: str
    charge: NDArray[np.float64]
    expected: Mapping[int, float]
    squared: GammaResult
    measurable: bool
    bound: float
    note: str


def main() -> None:
    options = arguments(__doc__, "topology").parse_args()
    points = [
        read(make(options.runs, theory, algorithm, beta), theory, algorithm, beta)
        for (theory, algorithm), betas in BETAS.items()
        for beta in betas
    ]
    publish("topology", draw(points), table(points), options.out)


def make(runs: Path, theory: str, algorithm: str, beta: float) -> Path:
    """Return the ensemble of one theory, algorithm and beta."""
    kernels = KERNELS[algorithm]
    changes: dict[str, Any] = {"action.beta": beta, "chain.kernels": kernels}
    changes |= {"baseline.beta": beta} if theory == "u1" else {"sampler.prior.beta": beta + PRIOR_SHIFT}
    if algorithm == "flow":
        changes |= FLOW[theory]
    return ensemble(runs / f"{theory}-beta{beta:g}-{'-'.join(kernels)}", f"{theory}-topology", changes)


def read(path: Path, theory: str, algorithm: str, beta: float) -> Point:
    """Return what the ensemble says about the charge."""
    with Ensemble.open(path) as stored:
        charge, found = stored.observable("topological_charge"), stored.analysis()
    sectors, note = found["sectors"], algorithm
    if algorithm == "flow":
        note += f" (ESS/N {found['weights']['ess']:.2g}; untrained {found['baseline']['ess']:.2g})"
    expected = dict(zip(sectors["charge"].tolist(), sectors["expected"].tolist(), strict=True))
    squared = gamma_method(charge**2)
    measurable = squared.converged and not sectors["frozen"]
    bound = float("nan") if algorithm == "flow" else walk_bound(charge, expected)
    return Point(theory, beta, algorithm, charge, expected, squared, measurable, bound, note)


def walk_bound(charge: NDArray[np.float64], expected: Mapping[int, float]) -> float:
    """Return the lower bound of tau_int of Q^2, in draws, of a charge that walks at random."""
    changes = np.diff(charge, axis=1)
    largest = chdtri(2 * (np.sum(changes**2) + 1), 1 - CONFIDENCE) / 2
    return mean_square(expected) * changes.size / largest


def mean_square(fractions: Mapping[int, float]) -> float:
    return sum(q**2 * p for q, p in fractions.items()) / sum(fractions.values())


def table(points: Sequence[Point]) -> str:
    """Return one row a run, and where the expected values are from."""
    header = ["theory", "beta", "algorithm", "changes of Q per draw", "<Q^2>", "expected", "tau_int of Q^2 [draws]"]
    rows = map(row, sorted(points, key=lambda point: (point.theory != "u1", point.beta)))
    source = (
        "Expected: exact for u1; for schwinger from 1024 reweighted quenched draws of each run, good to some per cent."
    )
    return f"{markdown(header, rows)}\n\n{source}"


def row(point: Point) -> list[str]:
    squared, rate = point.squared, np.mean(np.diff(point.charge, axis=1) != 0)
    tau = value_error(squared.tau_int, squared.tau_int_error)
    mean = value_error(squared.mean, squared.error)
    if not point.measurable:
        mean, tau = f"{squared.mean:.3g}, not converged", "not measurable"
        tau += f", above {point.bound:.2g}" if np.isfinite(point.bound) else ""
    known = f"{mean_square(point.expected):.4g}"
    return [point.theory, f"{point.beta:g}", point.note, f"{rate:.2g}", mean, known, tau]


def draw(points: Sequence[Point]) -> Figure:
    """Draw histories and histogram at the largest beta of pure gauge theory, and tau_int of Q^2 against beta."""
    figure = new_figure(5.6)
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    left, right = upper.subfigures(1, 2, width_ratios=(1.7, 1))
    largest = {point.algorithm: point for point in points if (point.theory, point.beta) == ("u1", 7.0)}
    draw_histories(left.subplots(2, 1, sharex=True, sharey=True), list(largest.values()))
    draw_histogram(right.subplots(), list(largest.values()))
    panels = lower.subplots(1, 2, sharey=True)
    for axes, theory in zip(panels, TITLES, strict=True):
        draw_times(axes, [point for point in points if point.theory == theory])
        axes.set_title(TITLES[theory], **STYLE["label"])
    panels[0].set(ylabel=r"$\tau_{\rm int}(Q^2)$ [draws]", ylim=(0.35, 1e4))
    panels[0].text(7, 0.53, "independent draws", ha="right", va="bottom", **STYLE["small"])
    panels[1].legend(loc="upper left", **STYLE["legend"])
    tidy(figure.axes)
    return figure


def draw_histories(panels: Sequence[Axes], points: Sequence[Point]) -> None:
    for axes, point in zip(panels, points, strict=True):
        axes.plot(point.charge[0], drawstyle="steps-mid", **STYLE["thin"] | {"color": LOOKS[point.algorithm]["color"]})
        title = f"{point.algorithm}, $\\beta = {point.beta:g}$, 16$\\times$16, one replica of {len(point.charge)}"
        axes.set_title(title, loc="right", pad=3, **STYLE["small"])
        axes.set(ylabel="$Q$", xlim=(0, point.charge.shape[1]))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, **STYLE["integers"]))
    panels[-1].set_xlabel("draw (one trajectory each)")


def draw_histogram(axes: Axes, points: Sequence[Point]) -> None:
    charges = np.arange(-4, 5)
    for shift, point in zip((-0.18, 0.18), points, strict=True):
        hits = [point.charge == q for q in charges]
        errors = [gamma_method(hit.astype(float)).error if point.measurable else 0.0 for hit in hits]
        look = {"width": 0.36, "edgecolor": "black", "linewidth": 0.6, "capsize": 1.5, "error_kw": {"linewidth": 0.8}}
        grey = "0.85" if point.measurable else "0.35"
        axes.bar(
            charges + shift, np.mean(hits, axis=(1, 2)), yerr=errors, facecolor=grey, label=point.algorithm, **look
        )
    exact = [points[0].expected.get(int(q), 0.0) for q in charges]
    axes.plot(charges, exact, label="exact", **STYLE["exact"])
    axes.set(
        xlabel="topological charge $Q$", ylabel="$P(Q)$, all replica", ylim=(0, 1.25), yticks=[0, 0.2, 0.4, 0.6, 0.8]
    )
    axes.xaxis.set_major_locator(MaxNLocator(**STYLE["integers"]))
    axes.legend(loc="upper left", **STYLE["legend"] | {"handlelength": 1.0})


def draw_times(axes: Axes, points: Sequence[Point]) -> None:
    for (algorithm, look), shift in zip(LOOKS.items(), SHIFTS, strict=True):
        chosen = [point for point in points if point.algorithm == algorithm]
        good = [point for point in chosen if point.measurable]
        beta, tau, error = np.array([(p.beta, p.squared.tau_int, p.squared.tau_int_error) for p in good]).T
        axes.errorbar(beta + shift, tau, error, label=algorithm, capsize=2.5, markersize=4.5, linewidth=1, **look)
        for point in chosen:
            if not point.measurable and np.isfinite(point.bound):
                draw_bound(axes, point.beta + shift, point.bound, look["color"])
    axes.plot(
        [], [], label="lower bound", **STYLE["line"] | {"linestyle": "none", "marker": "$\\uparrow$", "markersize": 8}
    )
    axes.axhline(0.5, **STYLE["thin"] | {"linestyle": ":"})
    axes.set(xlabel=r"$\beta$", yscale="log", xticks=range(1, 8), xlim=(0.6, 7.4))


def draw_bound(axes: Axes, beta: float, bound: float, color: str) -> None:
    arrow = {"arrowstyle": "-|>", "color": color, "linewidth": 1.2, "shrinkA": 0}
    axes.annotate("", (beta, 3 * bound), (beta, bound), arrowprops=arrow)
    axes.plot(beta, bound, marker="_", markersize=9, color=color)


if __name__ == "__main__":
    main()
