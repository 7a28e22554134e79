"""What a flow trained on 8x8 is worth on 16x16, at beta 2 and kappa 0.276: before and after training there.

    python runs/benchmarks/transfer.py [--proposals 8192] [--threads 1] [--weights DIR] [--only WORD]

Trains runs/schwinger-8x8.toml, starts runs/schwinger-transfer-16x16.toml from its weights, as `training.start_from`
does, and trains the latter from the usual weights for as many steps as well. Every row weighs fresh proposals with the
marginal action of its configuration; the baseline is its prior alone. Writes results/transfer.json and
results/transfer.md beside this file, row by row, and weights to `--weights` (runs/transfer); what is there already is
not trained again.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rows import worth

from latticeflow.config import Config, load_config
from latticeflow.config.building import build_action, build_sampler, build_trainer
from latticeflow.flows import Sequential, weights_for
from latticeflow.samplers import FlowSampler
from latticeflow.stats import ess
from latticeflow.storage import provenance
from latticeflow.streams import stream
from latticeflow.training.trainer import StepRecord, Trainer
from latticeflow.u1 import topological_charge

RUNS = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
SMALL, LARGE = RUNS / "schwinger-8x8.toml", RUNS / "schwinger-transfer-16x16.toml"
BATCH = 128
Array = NDArray[np.float64]
Weights = dict[str, torch.Tensor]


@torch.no_grad()
def propose(sampler: FlowSampler, config: Config, proposals: int, *, orbits: bool) -> tuple[Array, Array]:
    """Return the log weights of fresh proposals, with or without the average over the orbit, and their charges."""
    action, generator, columns = build_action(config), stream(1, "transfer"), []
    for _ in range(-(-proposals // BATCH)):
        x, log_q = sampler.sample(BATCH, generator)
        orbit = action.orbit(x)
        value = action.marginal(orbit) if orbits else orbit.flatten(1)[:, 0]
        columns.append((-value - log_q, topological_charge(x)))
    log_weight, charge = (torch.cat(column).numpy() for column in zip(*columns, strict=True))
    return log_weight, charge


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


def row(
    case: str, sampler: FlowSampler, config: Config, cost: Sequence[float], proposals: int, *, orbits: bool
) -> dict[str, Any]:
    """Return what the proposals of a sampler are worth."""
    log_weight, charge = propose(sampler, config, proposals, orbits=orbits)
    return {
        "case": case,
        "cpu_seconds": cost[0],
        "steps": cost[1],
        **worth(log_weight),
        "sectors": sectors(charge, log_weight),
    }


def sectors(charge: Array, log_weight: Array) -> list[dict[str, float]]:
    """Return how often abs(Q) = 0, 1, 2, 3 is proposed, how often it should be, and the ESS/N within."""
    weight, found = np.exp(log_weight - log_weight.max()), []
    for q in range(4):
        own = np.abs(np.round(charge)) == q
        within = ess(log_weight[own]) if own.sum() > 1 else math.nan
        found.append({"q": q, "drawn": float(own.mean()), "share": float(weight[own].sum() / weight.sum())})
        found[-1]["ess"] = within
    return found


def cases(options: argparse.Namespace) -> dict[str, Callable[[str], dict]]:
    """Return what makes each row, by name."""
    small, large = load_config(SMALL, [f"run.threads={options.threads}"]), load_config(LARGE)
    options.weights.mkdir(parents=True, exist_ok=True)

    def prior() -> tuple[FlowSampler, float, int]:
        return FlowSampler(build_sampler(large).prior, Sequential()), 0.0, 0

    def on_small() -> tuple[FlowSampler, float, int]:
        return trained(options.weights / "8x8.pt", small, None)

    def placed() -> tuple[FlowSampler, float, int]:
        learned, *cost = on_small()
        sampler = build_sampler(large)
        sampler.load_state_dict(weights_for(sampler, learned))
        return sampler.double(), *cost

    def transferred() -> tuple[FlowSampler, float, int]:
        before, cost, steps = placed()
        sampler, own, more = trained(options.weights / "16x16.pt", large, before.state_dict())
        return sampler, cost + own, steps + more

    def from_scratch() -> tuple[FlowSampler, float, int]:
        return trained(options.weights / "scratch.pt", large, None)

    def case(
        make: Callable[[], tuple[FlowSampler, float, int]], config: Config, *, orbits: bool = True
    ) -> Callable[[str], dict]:
        def found(name: str) -> dict:
            sampler, *cost = make()
            return row(name, sampler, config, cost, options.proposals, orbits=orbits)

        return found

    return {
        "8x8: trained": case(on_small, small),
        "16x16: prior alone, without orbits": case(prior, large, orbits=False),
        "16x16: prior alone": case(prior, large),
        "16x16: weights of 8x8": case(placed, large),
        "16x16: trained from those of 8x8": case(transferred, large),
        "16x16: trained from the usual weights": case(from_scratch, large),
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
    parser.add_argument("--proposals", type=int, default=8192)
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
