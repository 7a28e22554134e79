"""Everything about one chain, from its ensemble alone.

python analysis/chain_diagnostics.py [RUN] [--runs runs/chain-diagnostics] [--out analysis/results]

History of the action with the proposed thermalisation cut, autocorrelation functions and tau_int with their windows,
blocking curves beside the error of the Gamma method, acceptance of every replica; delta_h against the Gaussian whose
mean is half its variance, as `<exp(-delta_h)> = 1` demands of one (a jittered step makes a mixture, with more weight in
peak and tails), where HMC ran; weights and runs of rejections where a sampler proposes; history of the charge where
there is one. Without RUN, a folder or an ensemble file, the example is made: flow proposals and HMC in turn for the
Schwinger model on 4x4 (runs/schwinger-4x4.toml).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ensembles import arguments, ensemble, markdown, new_figure, publish, tidy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.special import erfc

from latticeflow.cli.figures import SHOWN
from latticeflow.cli.folder import ensemble_path
from latticeflow.cli.report import value_error
from latticeflow.config.loading import parse_config
from latticeflow.plots import CURVES, STYLE
from latticeflow.stats import (
    GammaResult,
    blocking,
    ess,
    gamma_many,
    gamma_method,
    log_z,
    rejection_tau,
    thermalisation_cut,
)
from latticeflow.stats.rejection import rejection_runs
from latticeflow.storage import Ensemble

Array = NDArray[np.float64]
EXAMPLE = {"chain.kernels": ["independence", "hmc"], "chain.draws": 512, "chain.hmc.trajectory_length": 1.5}
REPLICA = 3
COLUMNS = 3


@dataclass(frozen=True)
class Chain:
    """What an ensemble holds; all arrays are `(chain, draw)`. `observables` and `results` have the same names."""

    kernels: tuple[str, ...]
    action: Array
    accepted: Mapping[str, NDArray[np.bool_]]
    delta_h: Mapping[str, Array]
    observables: Mapping[str, Array]
    results: Mapping[str, GammaResult]
    charge: Array | None
    log_weight: Array | None

    @property
    def cut(self) -> int:
        """Return the proposed thermalisation cut, from the mean action of the replica."""
        return thermalisation_cut(self.action.mean(axis=0))

    @property
    def proposed(self) -> NDArray[np.bool_] | None:
        """Return which of the sampler's proposals were accepted, None where there is no sampler."""
        return self.accepted.get("independence")


def main() -> None:
    parser = arguments(__doc__, "chain-diagnostics")
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help="run folder or ensemble file")
    options = parser.parse_args()
    example = options.runs / "schwinger-4x4"
    path = ensemble_path(options.run) if options.run else ensemble(example, "schwinger-4x4", EXAMPLE)
    chain = read(path)
    publish("chain_diagnostics", draw(chain), table(chain), options.out)


def read(path: Path) -> Chain:
    """Return what the diagnostics need of an ensemble."""
    with Ensemble.open(path) as stored:
        config = parse_config(stored.config, source=str(path))
        names, kernels = stored.history_names, config.chain.kernels
        observables = {name: stored.observable(name) for name in SHOWN if name in stored.observable_names}
        observables["action"] = stored.history("action")
        charge = stored.observable("topological_charge") if "topological_charge" in stored.observable_names else None
        columns = {
            kind: {k: stored.history(n) for k in kernels if (n := column(names, kind, k))}
            for kind in ("accepted", "delta_h")
        }
        log_weight = stored.proposals("log_weight") if "log_weight" in stored.proposal_names else None
    results = gamma_many(np.stack(list(observables.values()), axis=-1), s=config.analysis.s)
    found = dict(zip(observables, results, strict=True))
    history = observables["action"], columns["accepted"], columns["delta_h"]
    return Chain(kernels, *history, observables, found, charge, log_weight)


def column(names: list[str], kind: str, kernel: str) -> str | None:
    """Return the name of a kernel's column, which has the kernel's name where several kernels have one like it."""
    if kind == "delta_h" and kernel not in ("hmc", "flow_hmc"):
        return None
    return next((name for name in (f"{kind}_{kernel}", kind) if name in names), None)


def table(chain: Chain) -> str:
    """Return a table of the observables and one of the kernels."""
    header = ["observable", "mean", "tau_int [draws]", "window", "error: Gamma", "error: blocking", "converged"]
    rows = [kernel_row(name, chain) for name in chain.kernels]
    kernels = markdown(["kernel", "acceptance", "of the replica", "more"], rows)
    replica, draws = chain.action.shape
    return (
        f"{replica} replica of {draws} draws; proposed thermalisation cut: {chain.cut} draws.\n\n"
        f"{markdown(header, [observable_row(chain, name) for name in chain.results])}\n\n{kernels}"
    )


def observable_row(chain: Chain, name: str) -> list[str]:
    result, (_, errors, _) = chain.results[name], blocked(chain.observables[name])
    tau = value_error(result.tau_int, result.tau_int_error)
    spread = [f"{result.error:.2g}", f"{errors[-1]:.2g}"]
    return [name, value_error(result.mean, result.error), tau, str(result.window), *spread, str(result.converged)]


def kernel_row(name: str, chain: Chain) -> list[str]:
    accepted, notes = chain.accepted[name], ""
    rates = accepted.mean(axis=1)
    if name in chain.delta_h:
        delta_h = chain.delta_h[name]
        violation, mean = gamma_method(np.exp(-delta_h)), gamma_method(delta_h)
        notes = (
            f"<exp(-delta_h)> = {value_error(violation.mean, violation.error)}, "
            f"<delta_h> = {value_error(mean.mean, mean.error)}, half its variance {delta_h.var() / 2:.3g}, "
            f"erfc(sqrt(<delta_h>) / 2) = {erfc(np.sqrt(max(mean.mean, 0)) / 2):.3f}"
        )
    if name == "independence":
        notes = f"tau_int from runs of rejections {rejection_tau(accepted):.2f}"
    return [name, f"{accepted.mean():.4f}", f"{rates.min():.3f} to {rates.max():.3f}", notes]


def blocked(values: Array) -> tuple[Array, Array, Array]:
    """Return block sizes, errors of the mean over all replica from blocks within each, and their errors."""
    curves = [blocking(replica) for replica in values]
    errors = np.sqrt(np.mean([curve.error**2 for curve in curves], axis=0) / len(curves))
    relative = curves[0].error_error / np.where(curves[0].error > 0, curves[0].error, 1) / np.sqrt(len(curves))
    return curves[0].block.astype(float), errors, errors * relative


def draw(chain: Chain) -> Figure:
    """Draw the panels for which the ensemble has data."""
    panels: list[Callable[[Axes, Chain], None]] = [draw_action, draw_correlation, draw_times, draw_blocking]
    panels += [draw_acceptance]
    panels += [draw_energy] if chain.delta_h else []
    panels += [draw_rejections, draw_weights] if chain.proposed is not None else []
    panels += [draw_charge] if chain.charge is not None else []
    rows = -(-len(panels) // COLUMNS)
    figure = new_figure(2.2 * rows)
    grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        panel(axes, chain)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    tidy(figure.axes)
    return figure


def draw_action(axes: Axes, chain: Chain) -> None:
    for look, history in zip(CURVES[1:], chain.action[:REPLICA], strict=False):
        axes.plot(history, color=look["color"], linewidth=0.4, alpha=0.6)
    axes.plot(chain.action.mean(axis=0), color="black", linewidth=1, label="mean of replica")
    axes.axvline(chain.cut, color="black", linestyle="--", linewidth=1, label=f"proposed cut: {chain.cut}")
    low, high = chain.action[:REPLICA].min(), chain.action[:REPLICA].max()
    axes.set(xlabel="draw", ylabel="action $S$", ylim=(low - 0.05 * (high - low), high + 0.4 * (high - low)))
    axes.set_xlim(-0.02 * chain.action.shape[1], chain.action.shape[1])
    axes.legend(loc="upper right", **STYLE["legend"] | {"fontsize": 7})


def draw_correlation(axes: Axes, chain: Chain) -> None:
    for look, (name, result) in zip(CURVES, chain.results.items(), strict=False):
        axes.plot(result.rho, label=name, **look | {"marker": ""}, linewidth=1)
        axes.plot(result.window, result.rho[result.window], **look, markersize=4)
    axes.axhline(0, **STYLE["thin"])
    axes.set(xlabel="lag $t$ [draws]", ylabel=r"$\rho(t)$", xlim=(0, lags(chain)))
    axes.legend(loc="upper right", **STYLE["legend"] | {"fontsize": 7})


def draw_times(axes: Axes, chain: Chain) -> None:
    for look, result in zip(CURVES, chain.results.values(), strict=False):
        tau, windows = result.tau_int_of_window, np.arange(result.rho.size)
        error = tau * np.sqrt(4 / result.n * np.maximum(windows + 0.5 - tau, 0))  # hep-lat/0306017, eq. 42
        axes.plot(windows, tau, **look | {"marker": ""}, linewidth=1)
        axes.fill_between(windows, tau - error, tau + error, color=look["color"], alpha=0.15, linewidth=0)
        axes.errorbar(result.window, result.tau_int, result.tau_int_error, **look, markersize=4, capsize=2)
    axes.set(xlabel="window $W$ [draws]", ylabel=r"$\tau_{\rm int}(W)$ [draws]", xlim=(0, lags(chain)))


def lags(chain: Chain) -> float:
    """Return the largest lag that is shown: twice the largest window."""
    return 2.0 * max(result.window for result in chain.results.values()) + 4


def draw_blocking(axes: Axes, chain: Chain) -> None:
    for look, (name, values) in zip(CURVES, chain.observables.items(), strict=False):
        sizes, errors, uncertainties = blocked(values)
        scale = chain.results[name].error or 1.0
        style = look | {"markersize": 3.5, "linewidth": 1, "capsize": 1.5}
        axes.errorbar(sizes, errors / scale, uncertainties / scale, **style)
    axes.axhline(1, **STYLE["thin"])
    axes.set(xlabel="block size [draws]", ylabel="blocked error / Gamma error", xscale="log", ylim=(0, None))


def draw_acceptance(axes: Axes, chain: Chain) -> None:
    for look, (name, accepted) in zip(CURVES, chain.accepted.items(), strict=False):
        rates = accepted.mean(axis=1)
        axes.plot(rates, label=f"{name}: {rates.mean():.3f}", **look | {"linestyle": "none"}, markersize=3)
        axes.axhline(rates.mean(), color=look["color"], linewidth=0.7)
    axes.set(xlabel="replica", ylabel="acceptance", ylim=(0, 1.35))
    axes.set_yticks(np.arange(0, 1.1, 0.25))
    axes.legend(loc="upper left", **STYLE["legend"] | {"fontsize": 7, "handlelength": 1.0})


def draw_energy(axes: Axes, chain: Chain) -> None:
    for name, values in chain.delta_h.items():
        finite = values[np.isfinite(values)]
        mean, edges = finite.mean(), np.linspace(*np.quantile(finite, (0.001, 0.999)), 50)
        axes.stairs(
            np.histogram(finite, edges, density=True)[0], edges, label=f"{name}, mean {mean:.3g}", **STYLE["fill"]
        )
        if mean > 0:
            gauss = np.exp(-((edges - mean) ** 2) / (4 * mean)) / np.sqrt(4 * np.pi * mean)
            axes.plot(edges, gauss, label="Gaussian, variance 2 mean", **STYLE["line"] | {"linestyle": "--"})
    axes.set(xlabel=r"$\Delta H$ (99.8% of the draws)", ylabel="density", ylim=(0, 1.4 * axes.get_ylim()[1]))
    axes.legend(loc="upper left", **STYLE["legend"] | {"fontsize": 7, "handlelength": 1.5})


def draw_rejections(axes: Axes, chain: Chain) -> None:
    runs = np.concatenate([rejection_runs(replica) for replica in chain.proposed])
    lengths, counts = np.unique(runs, return_counts=True)
    axes.plot(lengths, counts, **CURVES[0] | {"linestyle": "none", "markersize": 3.5})
    slowest = max(result.tau_int for result in chain.results.values())
    title = rf"$\tau$ of the runs {rejection_tau(chain.proposed):.2f}, largest $\tau_{{\rm int}}$ {slowest:.2f}"
    axes.set_title(title, **STYLE["small"])
    axes.set(xlabel="rejections in a row", ylabel="times", yscale="log", ylim=(0.5, None))


def draw_weights(axes: Axes, chain: Chain) -> None:
    relative = chain.log_weight - log_z(chain.log_weight)[0]
    finite = relative[np.isfinite(relative)]
    edges = np.linspace(np.quantile(finite, 0.001), finite.max(), 50)
    axes.stairs(np.histogram(finite, edges)[0], edges, baseline=0.5, **STYLE["fill"])
    axes.axvline(0, **STYLE["thin"] | {"linestyle": ":"})
    axes.set_title(f"proposals: ESS$/N$ = {ess(chain.log_weight):.3f}", **STYLE["small"])
    axes.set(xlabel=r"$\log w - \log\langle w\rangle$", ylabel="proposals per bin", yscale="log", ylim=(0.5, None))


def draw_charge(axes: Axes, chain: Chain) -> None:
    shown = chain.charge[:REPLICA]
    shifts = (np.ptp(shown) + 1) * np.arange(len(shown))
    for look, history, shift in zip(CURVES, shown, shifts, strict=False):
        axes.plot(history + shift, color=look["color"], linewidth=0.6, drawstyle="steps-mid")
        axes.axhline(shift, color="0.7", linewidth=0.5, zorder=0)
    axes.set_yticks(shifts, ["$Q = 0$"] * len(shifts))
    axes.set(xlabel="draw", ylabel="charge of some replica")


if __name__ == "__main__":
    main()
