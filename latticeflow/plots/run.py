"""Training, weights, autocorrelation, charge and comparison of runs."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from latticeflow import stats
from latticeflow.plots.style import CURVES, STYLE, WIDTH, Array, axis_range, draw_line, finish, thinned
from latticeflow.stats import GammaResult
from latticeflow.stats.series import check_values

COLUMNS = 3
SHADES = (0.2, 0.8)
"""The ends of the colour map that the parts of a flow take."""


class Learner(NamedTuple):
    """Who learned: its name, its steps `(steps,)`, and how its lines look."""

    label: str
    own: NDArray[np.bool_]
    look: dict[str, Any]


def training_curve(
    step: ArrayLike, loss: ArrayLike, ess: ArrayLike, *, part: ArrayLike | None = None, log_z: float | None = None
) -> Figure:
    """Draw the loss `-<log w> >= -log Z` of every step with its running median, and the running ESS/N below it.

    All three are `(steps,)`; `log_z` adds the bound. The median is over a fiftieth of the steps. The axis spans the
    bulk of the losses, and the legend counts those outside it or not finite. `part`, `(steps,)`, is the part of the
    flow that learned, counted from 1, or 0 for all end to end: each has lines of its own, medians over its own
    steps. Raises ValueError for other shapes.
    """
    steps, losses, sizes = (np.asarray(column, dtype=np.float64) for column in (step, loss, ess))
    parts = None if part is None else np.asarray(part)
    if steps.ndim != 1 or steps.size == 0 or not steps.shape == losses.shape == sizes.shape:
        raise ValueError(f"step, loss and ess must be (steps,), found {steps.shape}, {losses.shape}, {sizes.shape}")
    if parts is not None and parts.shape != steps.shape:
        raise ValueError(f"part must be {steps.shape} as step, found {parts.shape}")
    learners = (
        [Learner("", np.full(steps.shape, fill_value=True), STYLE["line"])] if parts is None else _learners(parts)
    )
    figure = Figure(figsize=(WIDTH, 4.4), **STYLE["figure"])
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    _draw_loss(upper, steps, losses, learners, bound=[] if log_z is None else [-log_z])
    for label, own, look in learners:
        draw_line(lower, steps[own], sizes[own], label=label or None, clip_on=False, **look)
    lower.set(xlabel="training step", ylabel=r"running ESS$/N$", ylim=(0, 1))
    lower.xaxis.set_major_locator(MaxNLocator(nbins=8, **STYLE["integers"]))
    return finish(figure, columns=3)


def charge_history(charge: ArrayLike, *, exact: Mapping[int, float] | None = None) -> Figure:
    """Draw the topological charge of up to four chains against the draw, and its distribution over all chains.

    `charge` is `(chain, draw)`, integer up to 0.01; `exact` maps `Q` to `P(Q)`, shown above a thousandth of its peak.
    Error bars are from the Gamma method, at each `Q` where that converges. Raises ValueError for another shape and for
    a charge that is not an integer.
    """
    charges = _integers(charge)
    shown, every = charges[: len(CURVES)], thinned(charges[0]).step
    figure = Figure(figsize=(WIDTH, 3.6), **STYLE["figure"])
    histories, distribution = figure.subfigures(1, 2, width_ratios=(3, 2))
    panels = histories.subplots(len(shown), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for number, (panel, history) in enumerate(zip(panels, shown, strict=True)):
        draw_line(panel, np.arange(history.size), history, drawstyle="steps-mid", **STYLE["thin"])
        panel.set_title(f"chain {number} of {len(charges)}", loc="right", pad=2, **STYLE["small"])
        panel.set(ylabel="$Q$", xlim=(-0.5, history.size - 0.5))
        panel.yaxis.set_major_locator(MaxNLocator(nbins=4, **STYLE["integers"]))
    panels[-1].set_xlabel("draw" if every == 1 else f"draw (one in {every} shown)")
    panels[-1].xaxis.set_major_locator(MaxNLocator(nbins=6, **STYLE["integers"]))
    _draw_charge_distribution(distribution.subplots(), charges, exact or {})
    return finish(figure, columns=2)


def autocorrelation(result: GammaResult | Mapping[str, GammaResult], *, name: str = "") -> Figure:
    """Draw `rho(t)` and `tau_int(W) = 1/2 + sum_{t=1}^{W} rho(t)` with its error, both with the chosen window marked.

    `(d tau)^2 = (4/N) (W + 1/2 - tau) tau^2`, hep-lat/0306017; the mark is above the curve where a slow mode is added.
    `result` is one, called `name`, or one to four by name, titled `name`. Raises ValueError for another number.
    """
    single = isinstance(result, GammaResult)
    results = {name: result} if single else dict(result)
    if not 1 <= len(results) <= len(CURVES):
        raise ValueError(f"result must hold 1 to {len(CURVES)} results, found {len(results)}")
    figure = Figure(figsize=(WIDTH, 3.0 + 0.15 * len(results)), **STYLE["figure"])
    left, right = figure.subplots(1, 2)
    for curve, (key, entry) in zip(CURVES, results.items(), strict=False):
        _draw_autocorrelation(left, right, entry, curve, _describe(key, entry))
    sizes = [entry.rho.size for entry in results.values()]
    shared = {"xlim": (0, max(*sizes, 2) - 1), "xscale": "symlog" if max(sizes) > 10 * min(sizes) else "linear"}
    left.set(xlabel="lag $t$ [draws]", ylabel=r"$\rho(t) = \Gamma(t)/\Gamma(0)$", **shared)
    right.set(xlabel="window $W$ [draws]", ylabel=r"$\tau_{\rm int}(W) = 1/2 + \sum_{t=1}^{W}\,\rho(t)$", **shared)
    left.axhline(0, **STYLE["thin"])
    return finish(figure, title="" if single else name)


def weight_histogram(
    log_weights: ArrayLike,
    *,
    baseline: ArrayLike | None = None,
    ess: float | None = None,
    baseline_ess: float | None = None,
) -> Figure:
    """Draw the histogram of `log w - log <w>` of the flow's proposals and, if given, of the training-free baseline.

    Any shape is pooled; each `<w>` is over all samples of its set. Zero weights (`-inf`) and outliers in the lower
    tail are counted in the legend; an ESS/N that is not given is computed. Raises ValueError as `stats.ess` does.
    """
    sets = [("flow proposals", log_weights, ess, STYLE["fill"])]
    if baseline is not None:
        sets.append(("training-free baseline", baseline, baseline_ess, STYLE["outline"]))
    relative = [np.ravel(logs) - stats.log_z(logs)[0] for _, logs, _, _ in sets]
    ranges = [axis_range(values[np.isfinite(values)], values.max()) for values in relative]
    edges = np.linspace(min(low for low, _ in ranges), max(high for _, high in ranges), 62)
    figure = Figure(figsize=(WIDTH, 3.4), **STYLE["figure"])
    axes = figure.subplots()
    for values, (name, _, fraction, look) in zip(relative, sets, strict=True):
        _draw_weights(axes, values, edges, name, fraction, **look)
    axes.axvline(0, linestyle=":", label=r"$w = \langle w\rangle$", **STYLE["thin"])
    axes.set(xlabel=r"$\log w - \log\langle w\rangle$,   $w = e^{-S}/q$", ylabel="proposals per bin", yscale="log")
    axes.set_ylim(0.5, max(axes.get_ylim()[1], 20))
    return finish(figure)


def comparison(
    labels: Sequence[str],
    means: Mapping[str, Sequence[tuple[float, float]]],
    rates: Mapping[str, Sequence[float]],
    *,
    exact: Mapping[str, float] | None = None,
) -> Figure:
    """Draw the means of several ensembles with their errors, a panel for each observable, and their efficiency.

    `means` and `rates` hold, by observable, one `(mean, error)` and one number of effective samples per CPU second for
    each label; what is not finite is left out. `exact` values are lines. Raises ValueError where their numbers differ,
    and for more than four observables in `rates`.
    """
    if len(rates) > len(CURVES):
        raise ValueError(f"rates must hold at most {len(CURVES)} observables, found {len(rates)}")
    if not means or any(len(values) != len(labels) for table in (means, rates) for values in table.values()):
        raise ValueError(f"means and rates must hold {len(labels)} values for each observable, and means at least one")
    panels = len(means) + bool(rates)
    rows = -(-panels // COLUMNS)
    figure = Figure(figsize=(WIDTH, (0.9 + 0.22 * len(labels)) * rows + 0.6), **STYLE["figure"])
    grid = figure.subplots(rows, COLUMNS, sharey=True, squeeze=False).ravel()
    places = np.arange(len(labels))[::-1]
    known = {name: value for name, value in (exact or {}).items() if name in means}
    for axes, (name, values) in zip(grid, means.items(), strict=False):
        label = "exact" if name == next(iter(known), None) else None
        _draw_means(axes, places, np.array(values, dtype=np.float64), name, known.get(name), label)
    if rates:
        _draw_rates(grid[len(means)], places, rates)
    for axes in grid[panels:]:
        axes.set_visible(False)
    for axes in grid[::COLUMNS]:
        axes.set_yticks(places, labels)
        axes.set_ylim(-0.6, len(labels) - 0.4)
    return finish(figure, columns=4)


def _draw_means(axes: Axes, places: Array, values: Array, name: str, exact: float | None, label: str | None) -> None:
    shown = np.isfinite(values).all(axis=1)
    axes.errorbar(values[shown, 0], places[shown], xerr=values[shown, 1], linestyle="none", **STYLE["point"])
    if exact is not None:
        axes.axvline(exact, linestyle="--", label=label, **STYLE["thin"])
    axes.set_title(name, pad=3, **STYLE["small"])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3))


def _draw_rates(axes: Axes, places: Array, rates: Mapping[str, Sequence[float]]) -> None:
    for curve, (name, values) in zip(CURVES, rates.items(), strict=False):
        axes.plot(values, places, label=name, **{**curve, "linestyle": "none", "markersize": 4})
    axes.set_title("effective samples per CPU second", pad=3, **STYLE["small"])
    known = np.array(list(rates.values()))
    known = known[np.isfinite(known)]
    if known.size and known.max() > 10 * known.min():
        axes.set_xscale("log")


def _learners(parts: NDArray[np.integer]) -> list[Learner]:
    """Return those that learned, the parts first, from dark to light, and the whole in black."""
    numbers = np.unique(parts[parts > 0]).tolist()
    colors = colormaps["viridis"](np.linspace(*SHADES, len(numbers)))
    styles = cycle(curve["linestyle"] for curve in CURVES)
    found = [
        Learner(f"part {k}", parts == k, {**STYLE["line"], "color": color, "linestyle": style})
        for k, color, style in zip(numbers, colors, styles, strict=False)
    ]
    return found + [Learner("end to end", parts == 0, STYLE["line"])] * bool(np.any(parts == 0))


def _draw_loss(axes: Axes, steps: Array, losses: Array, learners: Sequence[Learner], *, bound: list[float]) -> None:
    finite = np.isfinite(losses)
    low, high = axis_range(losses[finite], *bound)
    outside = losses.size - int(np.sum((losses >= low) & (losses <= high)))
    note = f" ({outside} of {losses.size} outside)" if outside else ""
    every = thinned(losses)
    single = len(learners) == 1 and not learners[0].label
    name = "each step" if single else "each step, lines: running median"
    axes.plot(steps[every], np.where(finite, losses, np.nan)[every], label=name + note, **STYLE["cloud"])
    for _, own, look in learners:
        shown = own & finite
        median = _running_median(steps[shown], losses[shown])
        draw_line(axes, *median, label="running median" if single else None, **look)
    for level in bound:
        axes.axhline(level, linestyle="--", label=r"bound $-\log Z$", **STYLE["thin"])
    axes.set(ylabel=r"loss $-\langle\log w\rangle$", ylim=(low, high))


def _draw_charge_distribution(axes: Axes, charges: Array, exact: Mapping[int, float]) -> None:
    values, counts = np.unique(charges, return_counts=True)
    edges = np.arange(values[0], values[-1] + 2) - 0.5
    axes.stairs(np.histogram(charges, edges)[0] / charges.size, edges, label="all chains", **STYLE["fill"])
    errors = [_frequency_error(charges == q) for q in values]
    axes.errorbar(values, counts / charges.size, errors, fmt="none", ecolor="black", elinewidth=1)
    expected = {q: p for q, p in exact.items() if p > 1e-3 * max(exact.values())}
    if expected:
        axes.plot(list(expected), list(expected.values()), label="exact", **STYLE["exact"])
    ends = (min([values[0], *expected]) - 1, max([values[-1], *expected]) + 1)
    axes.set(xlabel="topological charge $Q$", ylabel="$P(Q)$", xlim=ends, ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, **STYLE["integers"]))


def _draw_autocorrelation(left: Axes, right: Axes, result: GammaResult, curve: Mapping[str, Any], label: str) -> None:
    lags, tau, window = np.arange(result.rho.size), result.tau_int_of_window, result.window
    error = tau * np.sqrt(4 / result.n * np.maximum(lags + 0.5 - tau, 0))
    right.fill_between(lags, tau - error, tau + error, color=curve["color"], alpha=0.2, linewidth=0)
    for axes, values in ((left, result.rho), (right, tau)):
        draw_line(axes, lags, values, **curve)
        axes.axvline(window, **{**STYLE["thin"], **curve, "marker": ""})
    mark = {**curve, "markersize": 5, "clip_on": False, "zorder": 3}
    left.plot(window, result.rho[window], **mark)
    right.errorbar(window, result.tau_int, result.tau_int_error, label=label, capsize=2.5, **mark)


def _draw_weights(axes: Axes, relative: Array, edges: Array, name: str, fraction: float | None, **look: Any) -> None:
    fraction = stats.ess(relative) if fraction is None else fraction
    left_out = {"at $w = 0$": np.isneginf(relative), "left of the axis": np.isfinite(relative) & (relative < edges[0])}
    notes = "".join(f", {hits.sum()} {where}" for where, hits in left_out.items() if hits.any())
    label = f"{name}: ESS$/N$ = {fraction:.3g}, $N$ = {relative.size}{notes}"
    axes.stairs(np.histogram(relative, edges)[0], edges, baseline=0.5, label=label, **look)


def _describe(name: str, result: GammaResult) -> str:
    value, error = result.tau_int, result.tau_int_error
    decimals = max(0, 1 - int(np.floor(np.log10(error)))) if error > 0 else 2
    tau = rf"$\tau_{{\rm int}}$ = {value:.{decimals}f} ± {error:.{decimals}f}, $W$ = {result.window}"
    return (f"{name}: " if name else "") + tau + ("" if result.converged else ", not converged")


def _running_median(x: Array, y: Array) -> tuple[Array, Array]:
    centres = np.unique(np.linspace(0, x.size - 1, min(x.size, 400)).astype(int))
    half = x.size // 100
    return x[centres], np.array([np.median(y[max(i - half, 0) : i + half + 1]) for i in centres])


def _frequency_error(hits: NDArray[np.bool_]) -> float:
    result = stats.gamma_method(hits.astype(np.float64)) if hits.shape[1] >= 4 else None
    return result.error if result is not None and result.converged else np.nan


def _integers(charge: ArrayLike) -> Array:
    charges = np.asarray(charge, dtype=np.float64)
    if charges.ndim != 2 or charges.size == 0:
        raise ValueError(f"charge must be (chain, draw), found shape {charges.shape}")
    nearest = np.rint(charges)
    check_values(charges, "charge", legal=lambda q: np.isfinite(q) & np.isclose(q, nearest, rtol=0, atol=0.01))
    return nearest
