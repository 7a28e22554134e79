"""What a flow trained on 8x8 is worth on 16x16, at beta 2 and kappa 0.276: before and after training there.

    python runs/benchmarks/transfer.py [--proposals 2048] [--threads 1] [--weights DIR] [--only WORD]

Trains runs/schwinger-transfer-8x8.toml, starts runs/schwinger-transfer-16x16.toml from its weights, and trains the
latter from the usual weights for as many steps as well. Every row weighs fresh proposals with the marginal action of
its configuration; the baselines are its prior alone, as it is and tuned. A tuned row has the prior (its coupling and
sector factor) that makes the ESS largest, found on other proposals; the flow stays as it is. Writes
results/transfer.json and results/transfer.md beside this file, row by row, and weights to `--weights` (runs/transfer),
where what is there already is not trained again.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp

from latticeflow.config import Config, load_config
from latticeflow.config.building import build_action, build_sampler, build_trainer
from latticeflow.flows import Sequential, use_nearest_images
from latticeflow.priors import QuenchedU1
from latticeflow.samplers import FlowSampler
from latticeflow.stats import ess, ess_error, log_z, pareto_k
from latticeflow.storage import provenance
from latticeflow.streams import stream
from latticeflow.training.trainer import StepRecord, Trainer
from latticeflow.u1 import plaquette, smooth_charge, topological_charge

RUNS = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
SMALL, LARGE = RUNS / "schwinger-transfer-8x8.toml", RUNS / "schwinger-transfer-16x16.toml"
BATCH = 128
Array = NDArray[np.float64]
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Proposals:
    """Log weights with and without the average over the orbit, charges, and what a prior knows of the latent fields."""

    log_weight: Array
    plain_log_weight: Array
    charge: Array
    cosine: Array
    smooth: Array


@torch.no_grad()
def propose(sampler: FlowSampler, config: Config, name: str, proposals: int) -> Proposals:
    """Weigh fresh proposals."""
    action, generator, columns = build_action(config), stream(1, name), []
    for _ in range(-(-proposals // BATCH)):
        z = sampler.latent(BATCH, generator)
        x, log_det = sampler.flow(z)
        orbit, log_q = action.orbit(x), sampler.prior.log_prob(z) - log_det
        weights = -action.marginal(orbit) - log_q, -orbit.flatten(1)[:, 0] - log_q
        columns.append((*weights, topological_charge(x), torch.cos(plaquette(z)).sum((1, 2)), smooth_charge(z)))
    return Proposals(*(torch.cat(column).numpy() for column in zip(*columns, strict=True)))


def tuned(prior: QuenchedU1, drawn: Proposals) -> QuenchedU1:
    r"""Return the quenched law and smooth sector factor with which this flow would have the largest ESS.

    Draws of a prior q stand for those of another one q' with the ratio `r = q'/q`, the mean of which is 1, and their
    weights become `w / r`; the ESS is then `(sum w)^2 / (n sum w^2 / r)`, so `sum w^2 / r` is to be smallest.
    """
    charge2 = drawn.smooth**2

    def law(point: Array) -> QuenchedU1:
        beta, wide, narrow_c, wide_c = (float(value) for value in point)
        return QuenchedU1(beta, prior.shape, smooth_sector=((1 - wide, narrow_c), (wide, wide_c)))

    def log_density(q: QuenchedU1) -> Array:
        factor = sum(a * np.exp(-c * charge2) for a, c in q.smooth_sector or ((1.0, 0.0),))
        return q.beta * drawn.cosine + np.log(factor) - q.log_normalisation

    old = log_density(prior)

    def spread(point: Array) -> float:
        return float(logsumexp(2 * drawn.log_weight - log_density(law(point)) + old))

    bounds = [(0.8 * prior.beta, 1.2 * prior.beta), (0.02, 0.98), (0.0, 12.0), (0.0, 12.0)]
    (_, narrow_c), (wide, wide_c) = prior.smooth_sector
    options = {"maxfev": 200, "xatol": 1e-3, "fatol": 1e-4}
    found = minimize(spread, [prior.beta, wide, narrow_c, wide_c], method="Nelder-Mead", bounds=bounds, options=options)
    return law(found.x)


def trained(path: Path, config: Config, start: Weights | None) -> tuple[FlowSampler, float, int]:
    """Return the sampler, trained where it is not stored, the CPU seconds and the steps that it took."""
    sampler = build_sampler(config)
    if not path.exists():
        trainer, log = build_trainer(config, sampler), []
        if start is not None:
            trainer.start_from(start)
        started = time.process_time()

        def on_step(_: Trainer, record: StepRecord) -> None:
            log.append((record.step, time.process_time() - started, record.loss, record.ess))
            if record.step % 25 == 0:
                print(path.stem, *(f"{value:.4g}" for value in log[-1]), flush=True)

        trainer.run(on_step)
        kept = {"weights": sampler.state_dict(), "steps": config.training.steps, "log": log}
        torch.save(kept | {"cpu_seconds": time.process_time() - started}, path)
    stored = torch.load(path)
    sampler.load_state_dict(stored["weights"])
    return sampler.double(), stored["cpu_seconds"], stored["steps"]


def nearest_images(weights: Weights) -> Weights:
    """Return the weights of 8x8 as `training.start_from` puts them on a larger lattice."""
    sampler = build_sampler(load_config(SMALL))
    sampler.load_state_dict(weights)
    use_nearest_images(sampler)
    return sampler.state_dict()


def row(case: str, sampler: FlowSampler, config: Config, cost: tuple[float, int], proposals: int, **more: Any) -> dict:
    """Return what the proposals of a sampler are worth."""
    drawn = propose(sampler, config, "transfer", proposals)
    orbits = more.get("orbits", True)
    log_weight = drawn.log_weight if orbits else drawn.plain_log_weight
    value, error = log_z(log_weight)
    return {
        "case": case,
        "cpu_seconds": cost[0],
        "steps": cost[1],
        "prior": [sampler.prior.beta, sampler.prior.smooth_sector],
        "ess": ess(log_weight),
        "ess_error": ess_error(log_weight),
        "std_log_weight": float(log_weight.std()),
        "log_z": value,
        "log_z_error": error,
        "pareto_k": pareto_k(log_weight),
        "sectors": sectors(drawn.charge, log_weight),
    } | more


def sectors(charge: Array, log_weight: Array) -> list[dict[str, float]]:
    """Return how often abs(Q) = 0, 1, 2, 3 is proposed, how often it should be, and the ESS/N within."""
    weight, found = np.exp(log_weight - log_weight.max()), []
    for q in range(4):
        own = np.abs(np.round(charge)) == q
        within = ess(log_weight[own]) if own.sum() > 1 else math.nan
        found.append({"q": q, "drawn": float(own.mean()), "share": float(weight[own].sum() / weight.sum())})
        found[-1]["ess"] = within
    return found


def with_tuned_prior(sampler: FlowSampler, config: Config, proposals: int) -> FlowSampler:
    """Return the same flow on the prior tuned for it."""
    return FlowSampler(tuned(sampler.prior, propose(sampler, config, "tuning", proposals // 2)), sampler.flow)


def cases(options: argparse.Namespace) -> dict[str, Callable[[str], dict]]:
    """Return what makes each row, by name."""
    small, large = load_config(SMALL), load_config(LARGE)
    paths = {name: options.weights / f"{name}.pt" for name in ("8x8", "16x16", "longer", "scratch")}
    options.weights.mkdir(parents=True, exist_ok=True)
    n = options.proposals

    def base() -> FlowSampler:
        return FlowSampler(build_sampler(large).prior, Sequential())

    def learned(name: str) -> tuple[FlowSampler, tuple[float, int]]:
        before, cost, steps = None, 0.0, 0
        if name == "16x16":
            cost, steps = trained(paths["8x8"], small, None)[1:]
            before = nearest_images(torch.load(paths["8x8"])["weights"])
        elif name == "longer":
            cost, steps = learned("16x16")[1]
            before = torch.load(paths["16x16"])["weights"]
        sampler, own, more = trained(paths[name], large, before)
        return sampler, (cost + own, steps + more)

    def placed(*, nearest: bool = True) -> tuple[FlowSampler, tuple[float, int]]:
        _, cost, steps = trained(paths["8x8"], small, None)
        sampler, weights = build_sampler(large), torch.load(paths["8x8"])["weights"]
        sampler.load_state_dict(nearest_images(weights) if nearest else weights)
        return sampler.double(), (cost, steps)

    def on_small(case: str) -> dict:
        sampler, *cost = trained(paths["8x8"], small, None)
        return row(case, sampler, small, cost, n)

    def plain(make: Callable[[], tuple[FlowSampler, tuple[float, int]]], **more: Any) -> Callable[[str], dict]:
        def found(case: str) -> dict:
            sampler, cost = make()
            return row(case, sampler, large, cost, n, **more)

        return found

    def retuned(make: Callable[[], tuple[FlowSampler, tuple[float, int]]], **more: Any) -> Callable[[str], dict]:
        def found(case: str) -> dict:
            sampler, cost = make()
            return row(case, with_tuned_prior(sampler, large, n), large, cost, n, **more)

        return found

    def untrained() -> tuple[FlowSampler, tuple[float, int]]:
        return base(), (0.0, 0)

    return {
        "8x8: trained": on_small,
        "16x16: prior alone, without orbits": plain(untrained, orbits=False),
        "16x16: prior alone, with orbits": plain(untrained),
        "16x16: prior alone, tuned, with orbits": retuned(untrained),
        "16x16: weights of 8x8, not moved to the nearest images": plain(lambda: placed(nearest=False)),
        "16x16: weights of 8x8": plain(placed),
        "16x16: weights of 8x8, prior tuned": retuned(placed),
        "16x16: trained from those of 8x8": plain(lambda: learned("16x16")),
        "16x16: trained from those of 8x8, prior tuned": retuned(lambda: learned("16x16")),
        "16x16: trained on from there, for as long again": plain(lambda: learned("longer")),
        "16x16: trained on from there, for as long again, prior tuned": retuned(lambda: learned("longer")),
        "16x16: trained from the usual weights": plain(lambda: learned("scratch")),
        "16x16: trained from the usual weights, prior tuned": retuned(lambda: learned("scratch")),
    }


def markdown(results: dict[str, Any]) -> str:
    lines = [
        "| case | steps | CPU s | ESS/N | std of log w | log Z | Pareto k | drawn, true share of Q = 0; ESS there |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for r in results["rows"]:
        zero = r["sectors"][0]
        lines.append(
            f"| {r['case']} | {r['steps']} | {r['cpu_seconds']:.0f} | {r['ess']:.3f} +- {r['ess_error']:.3f} "
            f"| {r['std_log_weight']:.2f} | {r['log_z']:.2f} +- {r['log_z_error']:.2f} | {r['pareto_k']:.2f} "
            f"| {zero['drawn']:.2f}, {zero['share']:.2f}; {zero['ess']:.2f} |"
        )
    options = results["options"]
    note = f"{options['proposals']} proposals each, {options['threads']} thread(s); CPU seconds of all training before."
    return "\n".join([*lines, "", note]) + "\n"


def store(own: dict, options: argparse.Namespace, order: list[str]) -> dict[str, Any]:
    """Put a row in its place among the stored ones."""
    stored = RESULTS / "transfer.json"
    old = json.loads(stored.read_text())["rows"] if stored.exists() else []
    rows = [*(r for r in old if r["case"] != own["case"] and r["case"] in order), own]
    machine = {k: v for k, v in provenance().items() if k not in ("host", "command")}
    chosen = {"proposals": options.proposals, "threads": options.threads}
    results = {"rows": sorted(rows, key=lambda r: order.index(r["case"])), "options": chosen, "provenance": machine}
    RESULTS.mkdir(exist_ok=True)
    stored.write_text(json.dumps(results, indent=2) + "\n")
    (RESULTS / "transfer.md").write_text(markdown(results))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proposals", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--weights", type=Path, default=RUNS / "transfer", help="folder (runs/transfer)")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = cases(options)
    for case, make in chosen.items():
        if options.only in case:
            print(json.dumps(store(make(case), options, list(chosen))["rows"]), flush=True)


if __name__ == "__main__":
    main()
