"""What to propose with: priors, estimators, conditioners and depths on the 8x8 example, at equal CPU time.

    python runs/benchmarks/samplers.py [--seconds 25] [--proposals 4096] [--threads 1] [--only WORD]

Every row trains from runs/schwinger-8x8.toml with the changes that it names, for as many steps as fit in the given CPU
seconds (the learning-rate schedule is as long as that), and weighs fresh proposals with the marginal action of that
configuration. Writes results/samplers.json and results/samplers.md beside this file.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from rows import worth

from latticeflow.config import load_config
from latticeflow.config.building import build_action, build_sampler, build_trainer
from latticeflow.flows import Sequential
from latticeflow.samplers import FlowSampler, tune_quenched
from latticeflow.storage import provenance
from latticeflow.streams import stream

CONFIG = Path(__file__).parents[1] / "schwinger-8x8.toml"
RESULTS = Path(__file__).parent / "results"

HAAR = ['sampler.prior={kind="haar"}']
LOCAL = ["sampler.flow.conditioner=local", "sampler.flow.hidden=[32,32]"]
CASES: dict[str, list[str] | None] = {
    "no training: tuned quenched prior, with orbits": None,
    "as configured": [],
    "prior: Haar-uniform": HAAR,
    "prior: quenched at the action's beta": ["sampler.prior.beta=2.0", "sampler.prior.smooth_sector=[]"],
    "prior: quenched 2.38, exp(-0.9 Q^2), which jumps": ["sampler.prior.sector=0.9", "sampler.prior.smooth_sector=[]"],
    "estimator: reinforce": ["training.estimator=reinforce"],
    "estimator: reparametrisation": ["training.estimator=reparametrisation"],
    "conditioner: local 3x3 [32, 32]": LOCAL,
    "conditioner: global [64]": ["sampler.flow.hidden=[64]"],
    "depth: 16 layers": ["sampler.flow.layers=16"],
    "batch: 256": ["training.batch=256"],
    "training grid 1 x 1 (holonomy-blind flow on the full action)": ["training.holonomies=[1,1]"],
}


def train_for(overrides: list[str], seconds: float) -> tuple[FlowSampler, int]:
    """Return the sampler trained for the CPU time and the steps that it took."""
    config = load_config(CONFIG, overrides)
    trial = build_trainer(config, build_sampler(config))
    trial.trial_step()
    started = time.process_time()
    for _ in range(5):
        trial.trial_step()
    steps = max(1, int(seconds / (1.05 * (time.process_time() - started) / 5)))
    config = load_config(CONFIG, [*overrides, f"training.steps={steps}", f"training.window={min(50, steps)}"])
    trainer = build_trainer(config, build_sampler(config))
    trainer.run()
    return trainer.sampler.double(), steps


@torch.no_grad()
def weigh(sampler: FlowSampler, proposals: int) -> torch.Tensor:
    """Return log weights of fresh proposals under the marginal action of the configuration."""
    action, generator = build_action(load_config(CONFIG)), stream(1, "benchmark")
    parts = []
    for _ in range(proposals // 256):
        x, log_q = sampler.sample(256, generator)
        parts.append(-action(x.double()) - log_q)
    return torch.cat(parts)


def measure(name: str, overrides: list[str] | None, options: argparse.Namespace) -> dict:
    started = time.process_time()
    if overrides is None:
        config = load_config(CONFIG)
        prior = tune_quenched(
            build_action(config), config.lattice.shape, beta=config.action.beta, generator=stream(2, "benchmark")
        )
        sampler, steps = FlowSampler(prior, Sequential()), 0
    else:
        sampler, steps = train_for(overrides, options.seconds)
    trained = time.process_time() - started
    log_weight = weigh(sampler, options.proposals).numpy()
    return {
        "case": name,
        "changes": overrides,
        "steps": steps,
        "cpu_seconds": trained,
        **worth(log_weight),
    }


def markdown(rows: list[dict], options: argparse.Namespace) -> str:
    lines = ["| case | steps | ESS/N | std of log w | log Z | Pareto k |", "|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['case']} | {row['steps']} | {row['ess']:.3f} +- {row['ess_error']:.3f} "
            f"| {row['std_log_weight']:.2f} | {row['log_z']:.3f} +- {row['log_z_error']:.3f} | {row['pareto_k']:.2f} |"
        )
    note = (
        f"{options.seconds:.0f} CPU seconds of training each, {options.proposals} proposals, {options.threads} threads."
    )
    return "\n".join([*lines, "", note]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=25.0)
    parser.add_argument("--proposals", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name, overrides in CASES.items():
        if options.only in name:
            rows.append(measure(name, overrides, options))
            print(json.dumps(rows[-1]), flush=True)
    if not options.only:
        RESULTS.mkdir(exist_ok=True)
        machine = {k: v for k, v in provenance().items() if k not in ("host", "command")}
        result = {"rows": rows, "options": vars(options), "provenance": machine}
        (RESULTS / "samplers.json").write_text(json.dumps(result, indent=2) + "\n")
        (RESULTS / "samplers.md").write_text(markdown(rows, options))
    print(markdown(rows, options))


if __name__ == "__main__":
    main()
