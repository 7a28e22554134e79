"""Holonomies averaged over or learned, on the 8x8 Schwinger example: flows of equal training, each on its own action.

    python runs/benchmarks/holonomy.py [--seconds 300] [--proposals 8192] [--threads 1] [--only FLOW]

Every row trains from runs/schwinger-8x8.toml with the changes that it names, for as many steps as fit in the given CPU
seconds (the learning-rate schedule is as long as that). Fresh proposals are weighed with the action itself or, for
orbits, with its average over the grid of the configuration; a blind flow is weighed with both. The last columns are
what a chain gets for its time: the CPU time of drawing and weighing a proposal in double precision, medians of rounds
in which all rows take turns, and effective proposals per second. Writes results/holonomy.json and results/holonomy.md
beside this file; with `--only`, those rows are replaced in them.
"""

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rows import worth

from latticeflow.actions import Action
from latticeflow.config import load_config
from latticeflow.config.building import build_action, build_sampler, build_trainer
from latticeflow.samplers import FlowSampler
from latticeflow.storage import provenance
from latticeflow.streams import stream

CONFIG = Path(__file__).parents[1] / "schwinger-8x8.toml"
RESULTS = Path(__file__).parent / "results"
ONE = ["action.holonomies=[1,1]", "training.holonomies=[1,1]"]
POLYAKOV, PAIR = "sampler.flow.polyakov=true", "sampler.flow.holonomy_pairs=1"


class Case(NamedTuple):
    """What to change; a blind flow trained with orbits for `first` of the time may come before."""

    changes: list[str]
    first: float = 0.0


CASES = {
    "blind": Case(ONE),
    "orbits": Case([]),
    "holonomy pair": Case([*ONE, PAIR]),
    "polyakov": Case([*ONE, POLYAKOV]),
    "polyakov, holonomy pair": Case([*ONE, POLYAKOV, PAIR]),
    "two holonomy pairs": Case([*ONE, "sampler.flow.holonomy_pairs=2"]),
    "16 layers, two holonomy pairs": Case([*ONE, PAIR, "sampler.flow.layers=16"]),
    "holonomy pair, started from a blind flow": Case([*ONE, PAIR], first=0.5),
}


def train_for(overrides: list[str], seconds: float, blind: FlowSampler | None = None) -> tuple[FlowSampler, int]:
    """Return the sampler trained for the CPU time, and the steps that it took."""
    config = load_config(CONFIG, overrides)
    trial = build_trainer(config, build_sampler(config))
    trial.trial_step()
    started = time.process_time()
    for _ in range(5):
        trial.trial_step()
    steps = max(1, int(seconds / (1.05 * (time.process_time() - started) / 5)))
    config = load_config(CONFIG, [*overrides, f"training.steps={steps}", f"training.window={min(50, steps)}"])
    trainer = build_trainer(config, build_sampler(config))
    if blind is not None:
        start_from(trainer.sampler, blind)
    trainer.run()
    return trainer.sampler, steps


def start_from(sampler: FlowSampler, blind: FlowSampler) -> None:
    """Give the plaquette couplings the weights that they have in the blind flow."""
    for layer, known in zip(sampler.flow.layers, blind.flow.layers, strict=True):
        getattr(layer, "layers", [layer])[0].load_state_dict(known.state_dict())


@torch.no_grad()
def weigh(sampler: FlowSampler, action: Action, proposals: int) -> np.ndarray:
    """Return log weights of fresh proposals."""
    generator, parts = stream(1, "benchmark"), []
    for _ in range(proposals // 256):
        x, log_q = sampler.sample(256, generator)
        parts.append(-action(x) - log_q)
    return torch.cat(parts).numpy()


def time_proposals(rows: list[dict], rounds: int = 9) -> None:
    """Fill in what a proposal costs, which does not depend on the weights of the flow."""
    configs = [load_config(CONFIG, one["weighing"]) for one in rows]
    kernels = [(build_sampler(config).double(), build_action(config)) for config in configs]
    seconds = np.zeros((rounds, len(rows)))
    for turn in range(-1, rounds):  # the first one warms up
        for place, kernel in enumerate(kernels):
            started = time.process_time()
            weigh(*kernel, 256)
            seconds[turn, place] = (time.process_time() - started) / 256
    for one, cost in zip(rows, np.median(seconds, axis=0), strict=True):
        one["cpu_milliseconds"], one["effective_per_second"] = 1e3 * cost, one["ess"] / cost


def measure(name: str, case: Case, options: argparse.Namespace) -> list[dict]:
    blind, steps_before = None, 0
    started = time.process_time()
    if case.first:
        blind, steps_before = train_for([], case.first * options.seconds)
    sampler, steps = train_for(case.changes, (1 - case.first) * options.seconds, blind)
    trained = time.process_time() - started
    sampler = sampler.double()
    rows = [row(name, sampler, case.changes, options)]
    if name == "blind":
        rows.append(row("blind, the same flow weighed with orbits", sampler, [], options))
    shared = {"flow": name, "changes": case.changes, "steps": steps_before + steps, "cpu_seconds": trained}
    return [{**shared, **one} for one in rows]


def row(name: str, sampler: FlowSampler, weighing: list[str], options: argparse.Namespace) -> dict:
    config = load_config(CONFIG, weighing)
    log_weight = weigh(sampler, build_action(config), options.proposals)
    return {
        "case": name,
        "weighing": weighing,
        "weighed": "action" if config.action.holonomies == (1, 1) else "orbits {}x{}".format(*config.action.holonomies),
        **worth(log_weight),
    }


def markdown(rows: list[dict], options: dict) -> str:
    lines = [
        "| flow | steps | weighed with | ESS/N | std of log w | log Z | Pareto k | ms per proposal | effective per s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in rows:
        lines.append(
            f"| {one['case']} | {one['steps']} | {one['weighed']} | {one['ess']:.3f} +- {one['ess_error']:.3f} "
            f"| {one['std_log_weight']:.2f} | {one['log_z']:.3f} +- {one['log_z_error']:.3f} | {one['pareto_k']:.2f} "
            f"| {one['cpu_milliseconds']:.2f} | {one['effective_per_second']:.0f} |"
        )
    note = (
        f"{options['seconds']:.0f} CPU seconds of training each, {options['proposals']} proposals, "
        f"{options['threads']} thread(s). A blind flow is capped at about 0.68 where it is weighed with the action."
    )
    return "\n".join([*lines, "", note]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--proposals", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(exist_ok=True)
    path = options.out / "holonomy.json"
    rows = json.loads(path.read_text())["rows"] if options.only and path.exists() else []
    for name, case in CASES.items():
        if options.only in ("", name):
            rows = [one for one in rows if one["flow"] != name] + measure(name, case, options)
            print(json.dumps(rows[-1]), flush=True)
    time_proposals(rows)
    rows.sort(key=lambda one: [*CASES].index(one["flow"]))
    machine = {k: v for k, v in provenance().items() if k not in ("host", "command")}
    shown = {k: v for k, v in vars(options).items() if k != "out"}
    result = {"rows": rows, "options": shown, "provenance": machine}
    path.write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "holonomy.md").write_text(markdown(rows, shown))
    print(markdown(rows, shown))


if __name__ == "__main__":
    main()
