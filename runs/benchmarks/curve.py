"""ESS/N of the README's model against CPU seconds of training.

    python runs/benchmarks/curve.py [--times 1 2] [--evaluations 8] [--proposals 4096] [--threads 1] [--weights DIR]

Every training is one of runs/schwinger-8x8.toml, with its own schedule, of so many times the steps. At equal intervals,
and more often at first, fresh proposals of the weights at that step are weighed with the marginal action of that
configuration; the last row of each training has the weights that it keeps, those of the best window. Time spent on
weighing is not counted. Writes results/curve.json and results/curve.md beside this file, row by row; rows of lengths
that are not asked for stay as they were. The weights kept go to `--weights`, for runs/benchmarks/ensembles.py.
`analysis/curve.py` draws the rows.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rows import worth

from latticeflow.config import load_config
from latticeflow.config.building import build_action, build_sampler, build_trainer
from latticeflow.samplers import FlowSampler
from latticeflow.storage import provenance
from latticeflow.streams import stream
from latticeflow.training.trainer import StepRecord, Trainer

CONFIG = Path(__file__).parents[1] / "schwinger-8x8.toml"
RESULTS = Path(__file__).parent / "results"
EARLY = (50, 100)


@torch.no_grad()
def weigh(sampler: FlowSampler, proposals: int) -> dict[str, float]:
    """Return ESS/N, the spread of log weights and log Z of fresh proposals."""
    action, generator = build_action(load_config(CONFIG)), stream(1, "curve")
    sampler, parts = copy.deepcopy(sampler).double(), []
    for _ in range(-(-proposals // 256)):
        x, log_q = sampler.sample(256, generator)
        parts.append(-action(x) - log_q)
    log_weight = torch.cat(parts).numpy()
    return worth(log_weight)


def curve(times: int, options: argparse.Namespace, write: Callable[[list[dict[str, Any]]], None]) -> None:
    """Train, and write the rows up to every place: where it is, what it cost, what its proposals are worth."""
    steps = times * load_config(CONFIG).training.steps
    config = load_config(CONFIG, [f"training.steps={steps}"])
    trainer, rows, weighing = build_trainer(config, build_sampler(config)), [], 0.0
    places = {*EARLY, *(round(steps * k / options.evaluations) for k in range(1, options.evaluations + 1))}
    started = time.process_time()

    def add(step: int, *, kept: bool = False) -> None:
        nonlocal weighing
        now = time.process_time()
        place = {"times": times, "step": step, "kept": kept, "cpu_seconds": now - started - weighing}
        rows.append(place | weigh(trainer.sampler, options.proposals))
        weighing += time.process_time() - now
        print(json.dumps(rows[-1]), flush=True)
        write(rows)

    def on_step(_: Trainer, record: StepRecord) -> None:
        if record.step in places:
            add(record.step)

    add(0)
    trainer.run(on_step)
    add(steps, kept=True)
    options.weights.mkdir(parents=True, exist_ok=True)
    kept = {"weights": trainer.sampler.state_dict(), "steps": steps, "cpu_seconds": rows[-1]["cpu_seconds"]}
    torch.save(kept, options.weights / f"times{times}.pt")


def markdown(results: dict[str, Any]) -> str:
    lines = ["| training | step | CPU s | ESS/N | std of log w | log Z |", "|---|---|---|---|---|---|"]
    for row in results["rows"]:
        steps = row["times"] * results["options"]["steps"]
        lines.append(
            f"| {steps} steps | {row['step']}{', weights kept' * row['kept']} | {row['cpu_seconds']:.0f} "
            f"| {row['ess']:.3f} +- {row['ess_error']:.3f} | {row['std_log_weight']:.2f} "
            f"| {row['log_z']:.3f} +- {row['log_z_error']:.3f} |"
        )
    options = results["options"]
    note = f"{options['proposals']} proposals at each place, {options['threads']} thread(s); weighing is not counted."
    return "\n".join([*lines, "", note, *reached(results["rows"])]) + "\n"


def reached(rows: list[dict[str, Any]]) -> list[str]:
    """Return one sentence for each level: the first place that has it."""
    sentences = []
    for level in (0.6, 0.68, 0.75):
        first = min((row["cpu_seconds"] for row in rows if row["ess"] >= level), default=None)
        when = "not reached" if first is None else f"first seen after {first:.0f} CPU seconds"
        sentences.append(f"ESS/N {level}: {when}.")
    return sentences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--evaluations", type=int, default=8)
    parser.add_argument("--proposals", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--weights", type=Path, default=CONFIG.parent / "curve", help="folder (runs/curve)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {"proposals": options.proposals, "threads": options.threads}
    settings["steps"] = load_config(CONFIG).training.steps
    for times in options.times:

        def write(own: list[dict[str, Any]], times: int = times) -> None:
            store(own, times, settings)

        curve(times, options, write)
    print((RESULTS / "curve.md").read_text())


def store(own: list[dict[str, Any]], times: int, settings: dict[str, Any]) -> None:
    """Put the rows of one training in place of its earlier ones."""
    stored = RESULTS / "curve.json"
    old = json.loads(stored.read_text())["rows"] if stored.exists() else []
    rows = sorted([*(row for row in old if row["times"] != times), *own], key=lambda row: row["times"])
    machine = {k: v for k, v in provenance().items() if k not in ("host", "command")}
    results = {"rows": rows, "options": settings, "provenance": machine}
    RESULTS.mkdir(exist_ok=True)
    stored.write_text(json.dumps(results, indent=2) + "\n")
    (RESULTS / "curve.md").write_text(markdown(results))


if __name__ == "__main__":
    main()
