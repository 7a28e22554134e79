"""Do HMC, flow chain, composite, flow HMC and reweighted quenched draws sample the same distribution?

    python runs/benchmarks/agreement.py [--case 4x4] [--case 8x8] [--threads 1]

The two-flavour Schwinger model on 4x4 (beta 1, kappa 0.20) and on 8x8 (beta 2, kappa 0.276). Every observable of every
method stands beside the trusted value (reweighted quenched draws of other origin). The methods are compared with one
another by one chi^2: all share a vector of means, which generalised least squares finds; the covariance of a chain's
means is that of its independent replica. Writes results/agreement.json and results/agreement.md beside this file.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import chi2

from latticeflow.actions import HolonomyMarginal, SchwingerAction
from latticeflow.cli.report import value_error
from latticeflow.flows import gauge_flow
from latticeflow.mcmc import HMC, Composite, FlowHMC, IndependenceMetropolis, Kernel, Winding
from latticeflow.observables import measure, observables
from latticeflow.priors import QuenchedU1
from latticeflow.samplers import FlowSampler
from latticeflow.stats import gamma_many, reweighted_mean
from latticeflow.storage import provenance
from latticeflow.streams import stream
from latticeflow.training import train

NAMES = ("plaquette", "topological_susceptibility", "condensate", "pion_correlator")
RESULTS = Path(__file__).parent / "results"
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """A target with its trusted values, the flow's prior and training, and how much is drawn."""

    shape: tuple[int, int]
    beta: float
    kappa: float
    grid: tuple[int, int]
    prior: QuenchedU1
    quenched: QuenchedU1
    training_steps: int
    draws: int
    every: int
    quenched_draws: int
    trusted: tuple[tuple[float, float], ...]


CASES = {
    "4x4": Case(
        shape=(4, 4),
        beta=1.0,
        kappa=0.20,
        grid=(3, 2),
        prior=QuenchedU1(1.05, (4, 4)),
        quenched=QuenchedU1(1.05, (4, 4)),
        training_steps=150,
        draws=600,
        every=2,
        quenched_draws=60000,
        trusted=((0.46005, 0.00035), (0.03881, 0.00013), (1.960678, 0.000095)),
    ),
    "8x8": Case(
        shape=(8, 8),
        beta=2.0,
        kappa=0.276,
        grid=(6, 3),
        prior=QuenchedU1(2.38, (8, 8), smooth_sector=[(0.79, 4.1), (0.21, 0.4)]),
        quenched=QuenchedU1(2.35, (8, 8), sector=0.6),
        training_steps=400,
        draws=320,
        every=2,
        quenched_draws=40000,
        trusted=(
            (0.75629, 0.00049),
            (0.003827, 0.000062),
            (1.5016, 0.0011),
            *((2.397, 0.008), (1.103, 0.006), (0.727, 0.005), (0.567, 0.004), (0.520, 0.004)),
        ),
    ),
}
REPLICA, THERMALISATION = 128, 100


@dataclass(frozen=True)
class Result:
    """The means of one method, their errors and covariance, integrated autocorrelation times, CPU seconds."""

    mean: Array
    error: Array
    covariance: Array
    tau: Array
    seconds: float


def measured(fields: torch.Tensor, action: SchwingerAction) -> Array:
    """Return all observables of fields `(n, ...)` side by side, `(n, K)`."""
    values = measure(fields, observables(action, NAMES))
    return torch.cat([values[name].reshape(len(fields), -1) for name in NAMES], dim=1).numpy()


def run_chain(kernel: Kernel, action: SchwingerAction, case: Case, seed: int) -> Result:
    """Thermalise and draw; measure every few draws."""
    started = time.process_time()
    generator = stream(seed, "agreement")
    state = kernel.start(REPLICA, generator)
    for _ in range(THERMALISATION):
        state, info = kernel.step(state, generator)
        kernel.tune(info)
    kept = []
    draws = case.draws // 4 if isinstance(kernel, FlowHMC) else case.draws  # each costs ten times as much
    for draw in range(draws):
        state, _ = kernel.step(state, generator)
        kept += [state.field] if draw % case.every == 0 else []
    seconds = time.process_time() - started
    series = np.stack([measured(fields, action) for fields in kept], axis=1)
    results = gamma_many(series)
    replica = series.mean(axis=1)
    unbias = (REPLICA - 1) / (REPLICA - replica.shape[1] - 2)  # of the inverse of an estimated covariance
    return Result(
        mean=replica.mean(axis=0),
        error=np.array([r.error for r in results]),
        covariance=np.cov(replica.T) / REPLICA * unbias,
        tau=np.array([r.tau_int for r in results]),
        seconds=seconds,
    )


def run_quenched(action: SchwingerAction, case: Case, seed: int) -> Result:
    """Reweight independent quenched draws."""
    started = time.process_time()
    links = case.quenched.sample(case.quenched_draws, stream(seed, "agreement"))
    chunks = links.split(256)
    log_weight = torch.cat([-action(x) - case.quenched.log_prob(x) for x in chunks]).numpy()
    seconds = time.process_time() - started
    series = np.concatenate([measured(x, action) for x in chunks])
    mean, error = np.array([reweighted_mean(column, log_weight) for column in series.T]).T
    weight = np.exp(log_weight - log_weight.max())
    influence = weight[:, None] * (series - mean) / weight.sum()
    return Result(mean, error, influence.T @ influence, np.full(len(mean), 0.5), seconds)


def methods(case: Case, action: SchwingerAction) -> dict[str, Callable[[int], Result]]:
    """Return what to run, by name; the flow is trained once and shared."""
    marginal = HolonomyMarginal(action, case.grid)
    torch.manual_seed(1)
    sampler = FlowSampler(case.prior, gauge_flow(case.shape, layers=8, hidden=(32, 32)))
    train(sampler, HolonomyMarginal(action, (3, 2)), estimator="path", steps=case.training_steps, batch=64, seed=1)
    kernels = {
        "HMC": HMC(action, case.prior, trajectory_length=2.0),
        "flow": IndependenceMetropolis(sampler, marginal),
        "HMC + winding + flow": Composite(
            [HMC(marginal, case.prior), Winding(marginal, case.prior), IndependenceMetropolis(sampler, marginal)]
        ),
        "flow HMC": FlowHMC(action, sampler),
    }
    chains = {name: (lambda seed, k=k: run_chain(k, action, case, seed)) for name, k in kernels.items()}
    return {"quenched, reweighted": lambda seed: run_quenched(action, case, seed), **chains}


def common_mean(results: dict[str, Result]) -> tuple[float, int, float]:
    """Return chi^2, degrees of freedom and probability of all methods having one vector of means."""
    inverses = [np.linalg.inv(r.covariance) for r in results.values()]
    means = [r.mean for r in results.values()]
    best = np.linalg.solve(sum(inverses), sum(w @ m for w, m in zip(inverses, means, strict=True)))
    value = float(sum((m - best) @ w @ (m - best) for w, m in zip(inverses, means, strict=True)))
    freedom = (len(means) - 1) * len(best)
    return value, freedom, float(chi2.sf(value, freedom))


def table(case: Case, results: dict[str, Result]) -> tuple[list[str], float]:
    """Return the lines of the Markdown table, and the largest deviation from a trusted value in sigma."""
    labels = [*NAMES[:3], *(f"pion_correlator[{t}]" for t in range(case.shape[0] // 2 + 1))]
    lines = ["| observable | trusted | " + " | ".join(results) + " |", "|---" * (len(results) + 2) + "|"]
    worst = 0.0
    for k, label in enumerate(labels):
        known = case.trusted[k] if k < len(case.trusted) else None
        row = [label, value_error(*known) if known else ""]
        for result in results.values():
            cell = value_error(result.mean[k], result.error[k])
            if known:
                pull = (result.mean[k] - known[0]) / np.hypot(result.error[k], known[1])
                cell, worst = f"{cell} {pull:+.1f}", max(worst, abs(pull))
            row.append(cell)
        lines.append("| " + " | ".join(row) + " |")
    taus = [f"{result.tau[:3].max():.2g}" for result in results.values()]
    lines.append("| largest tau_int (measurements) | | " + " | ".join(taus) + " |")
    return lines, worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    text, record = [], {"provenance": provenance()}
    for name in options.case or CASES:
        case = CASES[name]
        action = SchwingerAction(case.beta, case.kappa)
        results = {}
        for seed, (method, run) in enumerate(methods(case, action).items(), start=11):
            results[method] = run(seed)
            print(method, f"{results[method].seconds:.0f} s", flush=True)
        value, freedom, probability = common_mean(results)
        lines, worst = table(case, results)
        text += [f"{name}, beta {case.beta:g}, kappa {case.kappa:g}; deviations from the trusted values in sigma.", ""]
        verdict = f"chi^2 = {value:.1f} for {freedom} degrees of freedom, probability {probability:.2f}."
        text += [*lines, "", f"Largest deviation from a trusted value: {worst:.1f} sigma."]
        text += [f"All methods, one vector of means: {verdict}", ""]
        record[name] = {
            "chi2": value,
            "degrees_of_freedom": freedom,
            "probability": probability,
            "largest_deviation": worst,
            "methods": {
                method: {key: np.asarray(item).tolist() for key, item in vars(result).items()}
                for method, result in results.items()
            },
        }
    text.append(f"{REPLICA} replica; every second draw measured.")
    print("\n".join(text))
    (RESULTS / "agreement.md").write_text("\n".join(text) + "\n")
    (RESULTS / "agreement.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
