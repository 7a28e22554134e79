"""CPU seconds for 10,000 effective samples, training included: flow, HMC and quenched draws on 8x8 and 16x16.

    python runs/benchmarks/ensembles.py [--scale 1] [--threads 1] [--curve DIR] [--transfer DIR] [--only WORD]

The two-flavour Schwinger model at beta 2, kappa 0.276. Every method runs for a moderate length; cost per draw and
effective samples per draw are extrapolated linearly. Chains: draws / (2 tau_int), tau_int by the Gamma method of the
slowest of plaquette, Q^2 and condensate; beside it, for flows, what repeated states alone give. Reweighted draws: the
ESS of their weights. What comes before the draws is training, or thermalisation, which --scale does not change;
measuring observables is not counted. The trained samplers are those of runs/benchmarks/curve.py and
runs/benchmarks/transfer.py (folders `--curve` and `--transfer`); quenched draws are the priors of their configurations.
`--scale` multiplies the numbers of draws. Writes results/ensembles.json and results/ensembles.md beside this file, row
by row.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from latticeflow.config import Config, load_config
from latticeflow.config.building import build_action, build_bare_action, build_kernel, build_sampler
from latticeflow.flows import Sequential
from latticeflow.mcmc import IndependenceMetropolis, Kernel
from latticeflow.observables import measure, observables
from latticeflow.samplers import FlowSampler
from latticeflow.stats import ess, gamma_method, rejection_tau
from latticeflow.storage import provenance
from latticeflow.streams import stream

RUNS = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
CONFIGS = {
    "8x8": RUNS / "schwinger-8x8.toml",
    "16x16": RUNS / "schwinger-transfer-16x16.toml",
}
HMC = ["chain.hmc.trajectory_length=2.0", "chain.hmc.jitter=0.2"]
BARE = ["action.holonomies=[1,1]", "training.holonomies=[1,1]"]
OBSERVABLES = ("plaquette", "topological_charge2", "condensate")
WANTED = 10_000
LENGTHS = {
    "8x8": {"reweighted": 8192, "replica": 32, "flow": 256, "hmc": 256, "thermalisation": 20},
    "16x16": {"reweighted": 2048, "replica": 16, "flow": 128, "hmc": 64, "thermalisation": 15},
}
"""Draws to reweight; chains and draws of each, by flow and by HMC; trajectories before."""
Row = dict[str, Any]


def quenched(lattice: str, config: Config, _: argparse.Namespace) -> tuple[FlowSampler, float]:
    """Return quenched draws as a sampler, and the CPU seconds before."""
    return FlowSampler(build_sampler(config).prior, Sequential()), 0.0


def flow(lattice: str, config: Config, options: argparse.Namespace) -> tuple[FlowSampler, float]:
    """Return the trained sampler, and the CPU seconds of its training."""
    stages = [options.curve / "times1.pt", *([options.transfer / "16x16.pt"] if lattice == "16x16" else [])]
    stored, sampler = [torch.load(path) for path in stages], build_sampler(config)
    sampler.load_state_dict(stored[-1]["weights"])
    return sampler.double(), sum(stage["cpu_seconds"] for stage in stored)


@torch.no_grad()
def reweighted(lattice: str, changes: list[str], make: Callable, options: argparse.Namespace) -> Row:
    """Draw and weigh."""
    config = load_config(CONFIGS[lattice], changes)
    sampler, before = make(lattice, config, options)
    action, generator, parts = build_action(config), stream(1, "ensembles"), []
    n = round(options.scale * LENGTHS[lattice]["reweighted"])
    started = time.process_time()
    for _ in range(-(-n // 128)):
        x, log_q = sampler.sample(128, generator)
        parts.append(-action(x) - log_q)
    log_weight = torch.cat(parts).numpy()
    cost = (time.process_time() - started) / len(log_weight)
    return {
        "before": before,
        "cost": cost,
        "effective": ess(log_weight),
        "draws": len(log_weight),
        "slowest": "weights",
    }


def chain(lattice: str, kernel: Kernel, steps: int, options: argparse.Namespace, before: float) -> Row:
    """Run chains, thermalising where they are HMC, and analyse the observables of their fields."""
    lengths, generator, accepted = LENGTHS[lattice], stream(1, "ensembles"), []
    config = load_config(CONFIGS[lattice])
    wanted = observables(build_bare_action(config), OBSERVABLES)
    started = time.process_time()
    state = kernel.start(lengths["replica"], generator)
    if not isinstance(kernel, IndependenceMetropolis):
        for _ in range(lengths["thermalisation"]):
            state, info = kernel.step(state, generator)
            kernel.tune(info)
    before += time.process_time() - started
    seconds, values = 0.0, []
    for _ in range(steps):
        started = time.process_time()
        state, info = kernel.step(state, generator)
        seconds += time.process_time() - started
        values.append(measure(state.field, wanted))
        accepted.append(next(v for k, v in info.history.items() if k.startswith("accepted")))
    found = {name: gamma_method(torch.stack([v[name] for v in values], 1).double().numpy()) for name in OBSERVABLES}
    slowest = max(found, key=lambda name: found[name].tau_int)
    tau = found[slowest].tau_int
    taken = torch.stack(accepted, 1).numpy()
    return {
        "before": before,
        "cost": seconds / taken.size,
        "effective": 1 / (2 * tau),
        "draws": taken.size,
        "length": steps,
        "slowest": slowest,
        "tau_int": {name: (result.tau_int, result.tau_int_error) for name, result in found.items()},
        "means": {name: (result.mean, result.error) for name, result in found.items()},
        "acceptance": float(taken.mean()),
        "rejection_tau": rejection_tau(taken) if isinstance(kernel, IndependenceMetropolis) else None,
    }


def flow_chain(lattice: str, changes: list[str], options: argparse.Namespace) -> Row:
    config = load_config(CONFIGS[lattice], changes)
    sampler, before = flow(lattice, config, options)
    kernel = IndependenceMetropolis(sampler, build_action(config), candidates=512)
    return chain(lattice, kernel, round(options.scale * LENGTHS[lattice]["flow"]), options, before)


def hmc_chain(lattice: str, changes: list[str], options: argparse.Namespace) -> Row:
    config = load_config(CONFIGS[lattice], [*HMC, *changes])
    steps = round(options.scale * LENGTHS[lattice]["hmc"])
    return chain(lattice, build_kernel(config, build_sampler(config)), steps, options, 0.0)


METHODS: dict[str, Callable[[str, argparse.Namespace], Row]] = {
    "quenched draws, reweighted": lambda lattice, o: reweighted(lattice, BARE, quenched, o),
    "quenched draws, reweighted, orbits": lambda lattice, o: reweighted(lattice, [], quenched, o),
    "flow, reweighted": lambda lattice, o: reweighted(lattice, BARE, flow, o),
    "flow, reweighted, orbits": lambda lattice, o: reweighted(lattice, [], flow, o),
    "flow chain": lambda lattice, o: flow_chain(lattice, BARE, o),
    "flow chain, orbits": lambda lattice, o: flow_chain(lattice, [], o),
    "HMC": lambda lattice, o: hmc_chain(lattice, ['chain.kernels=["hmc"]', *BARE], o),
    "HMC + winding": lambda lattice, o: hmc_chain(lattice, ['chain.kernels=["hmc","winding"]', *BARE], o),
    "HMC + winding, orbits": lambda lattice, o: hmc_chain(lattice, ['chain.kernels=["hmc","winding"]'], o),
}


def with_totals(row: Row) -> Row:
    """Add the CPU seconds for the wanted number of effective samples, and effective samples for one."""
    total = row["before"] + WANTED * row["cost"] / row["effective"]
    return row | {"total": total, "per_second": WANTED / total}


def markdown(results: dict[str, Any]) -> str:
    lines = ["| lattice | method | before, CPU s | CPU ms per draw | effective per draw | slowest, its tau_int "]
    lines[0] += "| CPU s for 10,000 | effective per CPU s |"
    lines.append("|---|---|---|---|---|---|---|---|")
    for r in results["rows"]:
        tau = "" if "tau_int" not in r else ", {:.2f} +- {:.2f}".format(*r["tau_int"][r["slowest"]])
        short = " (*)" if "tau_int" in r and r["length"] < 20 * r["tau_int"][r["slowest"]][0] else ""
        lines.append(
            f"| {r['lattice']} | {r['method']} | {r['before']:.0f} | {1e3 * r['cost']:.2f} | {r['effective']:.3f} "
            f"| {r['slowest']}{tau}{short} | {r['total']:.0f} | {r['per_second']:.1f} |"
        )
    note = (
        "Extrapolated linearly from a shorter run each. (*) chains shorter than 20 tau_int: tau_int is a lower bound, "
        f"the cost too. {results['options']['threads']} thread(s)."
    )
    return "\n".join([*lines, "", note]) + "\n"


def store(own: Row, options: argparse.Namespace, order: list[tuple[str, str]]) -> None:
    """Put a row in its place among the stored ones."""
    stored = RESULTS / "ensembles.json"
    old = json.loads(stored.read_text())["rows"] if stored.exists() else []
    rows = [*(r for r in old if (r["lattice"], r["method"]) != (own["lattice"], own["method"])), own]
    rows.sort(key=lambda r: order.index((r["lattice"], r["method"])))
    machine = {k: v for k, v in provenance().items() if k not in ("host", "command")}
    chosen = {"scale": options.scale, "threads": options.threads, "lengths": LENGTHS}
    results = {"rows": rows, "options": chosen, "provenance": machine}
    RESULTS.mkdir(exist_ok=True)
    stored.write_text(json.dumps(results, indent=2) + "\n")
    (RESULTS / "ensembles.md").write_text(markdown(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--curve", type=Path, default=RUNS / "curve", help="folder of weights (runs/curve)")
    parser.add_argument("--transfer", type=Path, default=RUNS / "transfer", help="folder of weights (runs/transfer)")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    order = [(lattice, name) for lattice in CONFIGS for name in METHODS]
    for lattice, method in order:
        if options.only in f"{lattice}: {method}":
            row = {"lattice": lattice, "method": method} | with_totals(METHODS[method](lattice, options))
            store(row, options, order)
            print(json.dumps(row), flush=True)
    print((RESULTS / "ensembles.md").read_text())


if __name__ == "__main__":
    main()
