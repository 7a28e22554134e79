"""phi^4: what training gives on 8x8 against time, and whether weights that were trained there help on 16x16.

    python runs/benchmarks/phi4.py [--threads 1] [--proposals 4096]

Trains runs/phi4-8x8.toml, then runs/phi4-16x16.toml twice, from scratch and with the weights of 8x8, and weighs fresh
proposals at the marked steps; "prior" is the free field without a flow. CPU seconds are those of the training. Writes
results/phi4.json and results/phi4.md beside this file.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rows import worth
from torch import Tensor

from latticeflow.config import Config, load_config
from latticeflow.config.building import build_action, build_sampler, build_trainer
from latticeflow.samplers import FlowSampler
from latticeflow.storage import provenance
from latticeflow.streams import stream

RUNS = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
CHUNK = 256


@torch.no_grad()
def weighed(config: Config, sampler: FlowSampler, proposals: int, *, flow: bool = True) -> dict[str, float]:
    """Return ESS, spread of the log weights and log Z of fresh proposals."""
    action, generator, parts = build_action(config), stream(1, "benchmark"), []
    for _ in range(proposals // CHUNK):
        if flow:
            x, log_q = sampler.sample(CHUNK, generator)
        else:
            x = sampler.prior.sample(CHUNK, generator)
            log_q = sampler.prior.log_prob(x)
        parts.append(-action(x.double()) - log_q)
    log_weight = torch.cat(parts).numpy()
    return worth(log_weight)


def trained(
    name: str, marks: list[int], options: argparse.Namespace, *, weights: dict[str, Tensor] | None = None
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Train a configuration to the last mark; return a row for every mark, and the last weights."""
    overrides = [f"training.steps={marks[-1]}", f"training.window={min(50, marks[-1])}"]
    config = load_config(RUNS / f"{name}.toml", overrides)
    sampler = build_sampler(config)
    trainer = build_trainer(config, sampler)
    if weights is not None:
        trainer.start_from(weights)
    rows, spent, started = [], 0.0, time.process_time()

    def mark(steps: int) -> None:
        rows.append(
            {
                "lattice": "x".join(map(str, config.lattice.shape)),
                "start": "scratch" if weights is None else "8x8",
                "steps": steps,
                "cpu_seconds": spent,
                **weighed(config, sampler, options.proposals),
            }
        )
        print(json.dumps(rows[-1]), flush=True)

    def on_step(trainer: Any, record: Any) -> None:
        nonlocal spent, started
        if trainer.step in marks:
            spent += time.process_time() - started
            mark(trainer.step)
            started = time.process_time()

    if weights is None:
        prior = weighed(config, sampler, options.proposals, flow=False)
        lattice = "x".join(map(str, config.lattice.shape))
        rows.append({"lattice": lattice, "start": "prior", "steps": 0, "cpu_seconds": 0.0, **prior})
    else:
        mark(0)
    trainer.run(on_step)
    return rows, trainer.state_dict()["weights"]


def markdown(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    lines = [
        "| lattice | start | steps | CPU seconds | ESS/N | std of log w | log Z |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['lattice']} | {row['start']} | {row['steps']} | {row['cpu_seconds']:.0f} "
            f"| {row['ess']:.3f} +- {row['ess_error']:.3f} | {row['std_log_weight']:.2f} "
            f"| {row['log_z']:.3f} +- {row['log_z_error']:.3f} |"
        )
    note = f"m2 = -4, lam = 8; {options.proposals} proposals, {options.threads} thread(s)."
    return "\n".join([*lines, "", note]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proposals", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    small, weights = trained("phi4-8x8", [25, 100, 200], options)
    large, _ = trained("phi4-16x16", [25, 50, 100], options)
    transferred, _ = trained("phi4-16x16", [25, 50, 100], options, weights=weights)
    rows = [*small, *large, *transferred]
    RESULTS.mkdir(exist_ok=True)
    machine = {k: v for k, v in provenance().items() if k not in ("host", "command")}
    result = {"rows": rows, "options": vars(options), "provenance": machine}
    (RESULTS / "phi4.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "phi4.md").write_text(markdown(rows, options))
    print(markdown(rows, options))


if __name__ == "__main__":
    main()
