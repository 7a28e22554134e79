"""phi^4 in its broken phase: a flow and its mirror image (arXiv:2305.02930), single flows trained the same way, HMC.

    python runs/benchmarks/broken.py [--steps 300] [--draws 256] [--trajectories 4000] [--only WORD] [--threads 1]

Every flow trains from runs/piecewise-phi4-broken.toml with the changes that its row names, for the same number of
steps, then runs 64 chains of independence Metropolis. The forward ESS/N comes from fields of HMC of both signs, each
with a fair coin, as the action has them alike: it sees the well that a flow misses. ESS/N is that of proposals, the
share of M > 0 is 1/2. Observables do not know the sign, so that those of HMC, which rarely changes it, are right too.
Writes results/broken.json and results/broken.md beside this file; rows that `--only` leaves out stay as they were.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from latticeflow.cli.report import value_error
from latticeflow.config import Config
from latticeflow.config.building import build_action, build_kernel, build_sampler, build_trainer
from latticeflow.config.loading import parse_config
from latticeflow.mcmc import Kernel
from latticeflow.samplers import Sampler
from latticeflow.stats import ess, forward_ess, gamma_method
from latticeflow.storage import provenance
from latticeflow.streams import stream

RUNS = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
Array = NDArray[np.float64]
REPLICA, APART = 64, 50
HMC, IN_ONE_WELL = "HMC", "single flow that starts in one well"
WIDE = "sampler.prior.m2=0.1"
CASES: dict[str, list[str]] = {
    HMC: ["chain.kernels=['hmc']"],
    "a flow and its mirror image": [],
    IN_ONE_WELL: [],
    "single flow that starts around 0": [WIDE],
    "single flow that starts around 0, odd": [WIDE, "sampler.flow.symmetry='z2'"],
    "single flow that starts around 0, dense": [WIDE, "sampler.flow.conditioner='dense'", "sampler.flow.hidden=[64]"],
}
"""Changes of the configuration; those that start around 0 have no pieces and no vacuum."""


def configured(name: str, options: argparse.Namespace) -> Config:
    text = (RUNS / "piecewise-phi4-broken.toml").read_text()
    if WIDE in CASES[name]:
        text = text.replace('kind = "piecewise"\npieces = "sign"\nvacuum = 0.58', 'kind = "flow"')
    return parse_config(text, [*CASES[name], f"training.steps={options.steps}"])


def observe(field: Tensor) -> Tensor:
    """Return the means of phi and phi^2 over the lattice, `(batch, 2)`."""
    return torch.stack([field.mean((1, 2)), (field**2).mean((1, 2))], dim=1)


@torch.no_grad()
def chains(
    kernel: Kernel, draws: int, generator: Generator, *, thermalisation: int, keep: int = 0
) -> tuple[dict[str, Array], Array]:
    """Return the histories `(replica, draws)` of thermalised chains, and their fields, one for every `keep` draws."""
    state = kernel.start(REPLICA, generator)
    for _ in range(thermalisation):
        state, info = kernel.step(state, generator)
        kernel.tune(info)
    observed, accepted, log_weight, fields = [], [], [], []
    for draw in range(draws):
        state, info = kernel.step(state, generator)
        observed.append(observe(state.field))
        accepted.append(info.accepted.double())
        log_weight += info.proposals.values()
        if keep and draw % keep == 0:
            fields.append(state.field)
    magnetisation, square = torch.stack(observed, 1).unbind(2)
    found = {"M": magnetisation, "square": square, "accepted": torch.stack(accepted, 1)}
    found |= {"log_weight": torch.stack(log_weight, 1)} if log_weight else {}
    return {name: values.numpy() for name, values in found.items()}, torch.cat(fields).numpy() if keep else np.empty(0)


def measured(found: dict[str, Array]) -> dict[str, Any]:
    results = {
        "abs_M": gamma_method(np.abs(found["M"])),
        "square": gamma_method(found["square"]),
        "positive": gamma_method((found["M"] > 0).astype(float)),
    }
    row: dict[str, Any] = {name: (result.mean, result.error) for name, result in results.items()}
    both = np.ptp(np.sign(found["M"])) > 0
    tau = gamma_method(found["M"]) if both else None
    return row | {
        "tau_int_M": tau and (tau.tau_int, tau.tau_int_error),
        "acceptance": float(found["accepted"].mean()),
        "ess": ess(found["log_weight"].ravel()) if "log_weight" in found else None,
    }


def by_hmc(options: argparse.Namespace) -> tuple[dict[str, Any], Array]:
    """Return the row of HMC and its fields, `(n, *shape)`, with either sign."""
    config = configured(HMC, options)
    started = time.process_time()
    kernel = build_kernel(config, build_sampler(config))
    generator = stream(config.run.seed, "benchmark")
    found, fields = chains(kernel, options.trajectories, generator, thermalisation=200, keep=APART)
    signs = np.random.default_rng(config.run.seed).choice([-1.0, 1.0], size=(len(fields), 1, 1))
    row = {"case": HMC, "training_seconds": None, **measured(found), "forward_ess": None}
    return row | {"chain_seconds": time.process_time() - started}, signs * fields


def by_flow(name: str, target: Array, options: argparse.Namespace) -> dict[str, Any]:
    config = configured(name, options)
    sampler = build_sampler(config)
    if name == IN_ONE_WELL:
        sampler = sampler.pieces[0]
    started = time.process_time()
    build_trainer(config, sampler).run()
    trained = time.process_time()
    generator = stream(config.run.seed, "benchmark")
    found, _ = chains(build_kernel(config, sampler), options.draws, generator, thermalisation=16)
    chained = time.process_time()
    row = {"case": name, "training_seconds": trained - started, "chain_seconds": chained - trained, **measured(found)}
    return row | {"forward_ess": forward_ess(log_weights(config, sampler, target))}


@torch.no_grad()
def log_weights(config: Config, sampler: Sampler, fields: Array) -> Array:
    action, chunks = build_action(config), torch.from_numpy(fields).split(256)
    return torch.cat([-action(chunk) - sampler.log_prob(chunk).double() for chunk in chunks]).numpy()


def cells(row: dict[str, Any]) -> list[str]:
    def number(name: str, form: str = ".3f") -> str:
        value = row[name]
        if value is None:
            return ""
        return value_error(*value) if isinstance(value, list | tuple) else format(value, form)

    tau = number("tau_int_M") or "never leaves"
    names = ("acceptance", "positive", "abs_M", "square")
    forward = "" if row["forward_ess"] is None else f"{row['forward_ess']:.3g}"
    return [row["case"], number("ess"), forward, *map(number, names), tau, number("training_seconds", ".0f")]


def markdown(results: dict[str, Any]) -> str:
    head = "case|ESS/N|forward ESS/N|acceptance|share of M > 0|abs(M)|phi^2|tau_int of M|training, CPU s"
    rows = [head.split("|"), ["---"] * 9, *map(cells, results["rows"])]
    options = results["options"]
    note = (
        f"8x8, m2 = -4, lam = 3.5. {options['steps']} steps of 64, then {REPLICA} chains of {options['draws']} draws; "
        f"{options['trajectories']} trajectories of HMC each, of length 1; "
        f"{options['threads']} thread(s), torch {results['provenance']['torch']}."
    )
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", note]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--draws", type=int, default=256)
    parser.add_argument("--trajectories", type=int, default=4000)
    parser.add_argument("--only", default="")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    stored = RESULTS / "broken.json"
    results = json.loads(stored.read_text()) if stored.exists() else {"rows": []}
    hmc, target = by_hmc(options)
    for name in CASES:
        if name == HMC or options.only in name:
            row = hmc if name == HMC else by_flow(name, target, options)
            print(json.dumps(row), flush=True)
            rows = {old["case"]: old for old in [*results["rows"], row]}
            results["rows"] = [rows[case] for case in CASES if case in rows]
            results["options"] = {k: v for k, v in vars(options).items() if k != "only"}
            results["provenance"] = {k: v for k, v in provenance().items() if k not in ("host", "command")}
            stored.write_text(json.dumps(results, indent=2) + "\n")
            (RESULTS / "broken.md").write_text(markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
