"""Plaquette and topological susceptibility of pure gauge theory on 8x8 against the exact torus, beta 0.5 to 6.

python analysis/u1_exact.py [--runs runs/u1-exact] [--out analysis/results]

HMC with winding steps from cold starts (runs/u1-topology.toml on 8x8), one run a beta, each with its own seed: the same
random numbers at neighbouring beta would correlate the pulls. Independent as they are, the chi^2 of one observable has
as many degrees of freedom as there are beta.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ensembles import arguments, ensemble, markdown, new_figure, publish, tidy
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from latticeflow.cli.compare import Entry, read_entries
from latticeflow.cli.report import value_error
from latticeflow.exact import u1_plaquette, u1_susceptibility
from latticeflow.plots import STYLE
from latticeflow.stats import compare_means

SHAPE = (8, 8)
BETAS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0)


class Quantity(NamedTuple):
    """A quantity that is `1/scale` of the mean of a stored observable, and its exact value for a beta and a shape."""

    name: str
    label: str
    observable: str
    scale: float
    exact: Callable[[float, Sequence[int]], float]


QUANTITIES = (
    Quantity("plaquette", r"$\langle\cos P\rangle$", "plaquette", 1.0, u1_plaquette),
    Quantity(
        "susceptibility", r"$\chi_t = \langle Q^2\rangle / V$", "topological_charge2", prod(SHAPE), u1_susceptibility
    ),
)


@dataclass(frozen=True)
class Comparison:
    """Means, errors and exact values of a quantity by beta, their pulls, and the probability of a larger chi^2."""

    quantity: Quantity
    means: np.ndarray
    errors: np.ndarray
    exact: np.ndarray
    pulls: np.ndarray
    chi2: float
    probability: float


def main() -> None:
    options = arguments(__doc__, "u1-exact").parse_args()
    entries = [read_entries([make(options.runs, beta)])[0] for beta in BETAS]
    found = [compare(entries, quantity) for quantity in QUANTITIES]
    publish("u1_exact", draw(found), table(found), options.out)


def make(runs: Path, beta: float) -> Path:
    """Return the ensemble of one beta."""
    changes = {"lattice.shape": SHAPE, "action.beta": beta, "baseline.beta": beta, "chain.kernels": ["hmc", "winding"]}
    return ensemble(runs / f"beta{beta:g}", "u1-topology", changes | {"run.seed": 100 + BETAS.index(beta)})


def compare(entries: Sequence[Entry], quantity: Quantity) -> Comparison:
    """Return one quantity of all runs beside its exact values."""
    results = [entry.results[quantity.observable] for entry in entries]
    means, errors = (np.array([getattr(r, key) for r in results]) / quantity.scale for key in ("mean", "error"))
    exact = np.array([quantity.exact(beta, SHAPE) for beta in BETAS])
    return Comparison(quantity, means, errors, exact, *compare_means(means, errors, reference=exact))


def table(found: Sequence[Comparison]) -> str:
    """Return one row a beta, with the pulls, and chi^2."""
    header = ["beta"] + [f"{c.quantity.name} | exact | pull" for c in found]
    rows = [
        [f"{beta:g}"]
        + [f"{value_error(c.means[i], c.errors[i])} | {c.exact[i]:.6g} | {c.pulls[i]:+.2f}" for c in found]
        for i, beta in enumerate(BETAS)
    ]
    columns = [part for entry in header for part in entry.split(" | ")]
    sums = [f"{c.quantity.name}: chi^2 = {c.chi2:.1f} of {len(BETAS)}, probability {c.probability:.2g}" for c in found]
    return markdown(columns, rows) + "\n\n" + "; ".join(sums) + "."


def draw(found: Sequence[Comparison]) -> Figure:
    """Draw curves and points above, pulls below, an observable a column."""
    figure = new_figure(4.0)
    grid = figure.subplots(2, len(found), sharex=True, height_ratios=(2.4, 1), squeeze=False)
    for (upper, lower), one in zip(grid.T, found, strict=True):
        draw_values(upper, one)
        draw_pulls(lower, one)
    grid[1, 0].set_ylabel(r"$(\mathrm{MC} - \mathrm{exact})/\sigma$")
    tidy(figure.axes)
    return figure


def draw_values(axes: Axes, one: Comparison) -> None:
    fine = np.linspace(0.0, BETAS[-1] + 0.3, 120)
    axes.plot(fine, [one.quantity.exact(beta, SHAPE) for beta in fine], label="exact", **STYLE["thin"])
    axes.errorbar(BETAS, one.means, one.errors, linestyle="none", label="HMC + winding", **STYLE["point"])
    axes.set(ylabel=one.quantity.label, ylim=(0, None))
    axes.legend(loc="best", **STYLE["legend"])


def draw_pulls(axes: Axes, one: Comparison) -> None:
    axes.axhspan(-1, 1, color="0.9", linewidth=0)
    axes.axhline(0, **STYLE["thin"])
    axes.errorbar(BETAS, one.pulls, 1, linestyle="none", **STYLE["point"])
    axes.set_title(rf"$\chi^2 = {one.chi2:.1f}$ of {len(BETAS)}, $p = {one.probability:.2g}$", **STYLE["small"])
    reach = max(3.2, np.abs(one.pulls).max() + 1.2)
    axes.set(xlabel=r"$\beta$", ylim=(-reach, reach), xlim=(0, BETAS[-1] + 0.3))


if __name__ == "__main__":
    main()
