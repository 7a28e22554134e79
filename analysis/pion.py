"""Pion and eta mass and the PCAC quark mass against kappa: two-flavour Schwinger model on 16x8 at beta = 2.

python analysis/pion.py [--runs runs/pion] [--out analysis/results]

HMC at five kappa (runs/schwinger-pion.toml), each with its own seed. The masses are means of the effective ones over
the distances of `PLATEAU`, with the error of that function of the correlators (Gamma method). A straight line through
the PCAC masses of the lightest `FITTED` kappa, which are independent, gives the critical kappa where it vanishes, its
error by propagation. The literature's (hep-lat/0510047) is for infinite volume; the free theory has 1/4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ensembles import arguments, ensemble, markdown, new_figure, publish, tidy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.special import chdtrc

from latticeflow.cli.analysis import measured
from latticeflow.cli.report import value_error
from latticeflow.config.building import build_bare_action
from latticeflow.config.loading import parse_config
from latticeflow.exact import CRITICAL_KAPPA
from latticeflow.observables.derived import derived
from latticeflow.plots import CURVES, STYLE
from latticeflow.stats import GammaResult, gamma_derived_many, gamma_many
from latticeflow.storage import Ensemble

Array = NDArray[np.float64]
KAPPAS = (0.20, 0.225, 0.24, 0.255, 0.265)
BETA = 2
FITTED = 3
LOOKS = tuple(
    {"color": color, "marker": marker, "linestyle": "none"}
    for color, marker in zip(("black", "#0060a8", "#d55e00", "0.5", "#702080"), "osD^v", strict=True)
)
PLATEAU = {"pion_effective_mass": (5, 8), "eta_effective_mass": (3, 4), "pcac_mass": (4, 7)}
"""First and last distance of each mass; the eta's signal is lost in noise soon."""


@dataclass(frozen=True)
class Point:
    """One run: the pion's correlator at t = 0..T/2, and the masses by the names in `PLATEAU`, in lattice units."""

    kappa: float
    extent: int
    correlator: list[GammaResult]
    masses: dict[str, GammaResult]


@dataclass(frozen=True)
class Line:
    """`mass = slope (1/kappa - 1/critical)`, fitted; `probability` is that of a larger chi^2."""

    slope: float
    critical: float
    critical_error: float
    probability: float


def main() -> None:
    options = arguments(__doc__, "pion").parse_args()
    points = [
        read(ensemble(options.runs / f"kappa{kappa:g}", "schwinger-pion", {"action.kappa": kappa, "run.seed": seed}))
        for seed, kappa in enumerate(KAPPAS, start=1)
    ]
    line = fit(points[-FITTED:])
    publish("pion", draw(points, line), table(points, line), options.out)


def read(path: Path) -> Point:
    """Return correlator and masses of an ensemble."""
    with Ensemble.open(path) as stored:
        config = parse_config(stored.config, source=str(path))
        series = measured(config, stored)
    quantities = derived(build_bare_action(config), config.lattice.shape)
    masses = {}
    for name, (first, last) in PLATEAU.items():
        inputs = quantities[name].series(*(series[needed] for needed in quantities[name].inputs))
        function = quantities[name].function
        masses[name] = gamma_derived_many(lambda m, f=function, a=first, b=last: f(m)[a - 1 : b].mean(), inputs)[0]
    return Point(config.action.kappa, config.lattice.shape[0], gamma_many(series["pion_correlator"]), masses)


def fit(points: Sequence[Point]) -> Line:
    """Return the straight line through the PCAC masses of independent runs against 1/kappa, and its zero."""
    x, (y, error) = inverse(points), numbers(points, "pcac_mass")
    (slope, offset), covariance = np.polyfit(x, y, 1, w=1 / error, cov="unscaled")
    gradient = np.array([offset / slope**2, -1 / slope])  # of the zero, -offset / slope
    zero, zero_error = -offset / slope, np.sqrt(gradient @ covariance @ gradient)
    chi2 = np.sum(((y - slope * x - offset) / error) ** 2)
    return Line(slope, 1 / zero, zero_error / zero**2, float(chdtrc(len(x) - 2, chi2)))


def inverse(points: Sequence[Point]) -> Array:
    return np.array([1 / point.kappa for point in points])


def numbers(points: Sequence[Point], name: str) -> tuple[Array, Array]:
    """Return means and errors of a mass."""
    results = [point.masses[name] for point in points]
    return np.array([result.mean for result in results]), np.array([result.error for result in results])


def table(points: Sequence[Point], line: Line) -> str:
    """Return one row a kappa, and the critical kappa."""
    header = ["kappa", "1/kappa", "m_pi", "m_pi^2", "m_eta", "PCAC mass", "tau_int of m_pi [draws]"]
    text = markdown(header, map(row, points))
    return (
        f"{text}\n\nCritical kappa from the PCAC masses of the lightest {FITTED}: "
        f"{value_error(line.critical, line.critical_error)}, chi^2 probability {line.probability:.2g}; "
        f"infinite volume (hep-lat/0510047): {CRITICAL_KAPPA[BETA]}."
    )


def row(point: Point) -> list[str]:
    pion, eta, quark = (point.masses[name] for name in PLATEAU)
    shown = [value_error(r.mean, r.error) if np.isfinite(r.mean) else "no signal" for r in (pion, eta, quark)]
    square = value_error(pion.mean**2, 2 * pion.mean * pion.error)
    tau = value_error(pion.tau_int, pion.tau_int_error)
    return [f"{point.kappa:g}", f"{1 / point.kappa:.4f}", shown[0], square, *shown[1:], tau]


def draw(points: Sequence[Point], line: Line) -> Figure:
    """Draw the correlators, the squared masses and the PCAC mass."""
    figure = new_figure(4.2)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.1))
    draw_correlators(left.subplots(), points)
    upper, lower = right.subplots(2, 1, sharex=True)
    draw_squares(upper, points)
    draw_quark_mass(lower, points, line)
    tidy(figure.axes)
    return figure


def draw_correlators(axes: Axes, points: Sequence[Point]) -> None:
    for point, look in zip(points, LOOKS, strict=True):
        t, half = np.arange(len(point.correlator)), point.extent / 2
        means, errors = (np.array([getattr(r, key) for r in point.correlator]) for key in ("mean", "error"))
        axes.errorbar(t, means, errors, label=rf"$\kappa = {point.kappa:g}$", capsize=2, markersize=4, **look)
        curve = np.linspace(1, half, 100)
        cosh = means[-1] * np.cosh(point.masses["pion_effective_mass"].mean * (curve - half))
        axes.plot(curve, cosh, color=look["color"], linewidth=0.9)
    axes.set(xlabel="distance $t/a$", ylabel=r"pion correlator $C(t)$", yscale="log")
    axes.legend(loc="lower left", **STYLE["legend"] | {"handlelength": 1.0})


def draw_squares(axes: Axes, points: Sequence[Point]) -> None:
    for look, (name, label) in zip(
        CURVES, (("eta_effective_mass", r"$\eta$"), ("pion_effective_mass", r"$\pi$")), strict=False
    ):
        mass, error = numbers(points, name)
        style = look | {"linestyle": "none", "markersize": 4.5, "capsize": 2.5}
        axes.errorbar(inverse(points), mass**2, 2 * mass * error, label=label, **style)
    axes.set(ylabel=r"$(a m)^2$", ylim=(0, None))
    axes.legend(loc="upper left", **STYLE["legend"] | {"handlelength": 1.0})


def draw_quark_mass(axes: Axes, points: Sequence[Point], line: Line) -> None:
    x, zero = inverse(points), 1 / line.critical
    inside, outside = np.array([zero, x[-FITTED]]), x[: -FITTED + 1]
    axes.axhline(0, **STYLE["thin"] | {"linestyle": ":"})
    axes.plot(inside, line.slope * (inside - zero), label=f"fit to the lightest {FITTED}", **STYLE["thin"])
    axes.plot(outside, line.slope * (outside - zero), **STYLE["thin"] | {"linestyle": "--"})
    axes.errorbar(x, *numbers(points, "pcac_mass"), linestyle="none", **STYLE["point"])
    found, width = value_error(line.critical, line.critical_error), line.critical_error / line.critical**2
    open_point = STYLE["point"] | {"markerfacecolor": "white"}
    axes.errorbar(zero, 0, xerr=width, linestyle="none", label=rf"$\kappa_c = {found}$", **open_point)
    label = rf"$\kappa_c = {CRITICAL_KAPPA[BETA]}$, infinite volume"
    axes.plot(1 / CRITICAL_KAPPA[BETA], 0, label=label, **STYLE["exact"])
    axes.set(xlabel=r"$1/\kappa$", ylabel=r"PCAC mass $a m$")
    axes.legend(loc="upper left", **STYLE["legend"] | {"handlelength": 1.5})


if __name__ == "__main__":
    main()
