"""Stabilised deep flows on densities (arXiv:2402.16408): against other flows, against depth, and what a step costs.

    python runs/benchmarks/stabilised.py [--steps 1000] [--part table|depth|cost] [--only WORD] [--methods PATTERN]

Every flow takes the same number of steps from the same seed, with the norm of the gradient clipped at 10 (not for the
student-t densities, where nothing shall help a flow to stay finite), and is judged by its last weights: ELBO and log Z
from 20 times 20000 draws (mean and spread of the 20; 5 times against depth), ESS/N of all of them, skipped steps, the
largest |z| that any layer gave on these draws, and the CPU seconds of the training. "HMC" is 64 chains of 500
trajectories after 500 for thermalisation; its log Z is Bennett's, between its configurations and the draws of the
stabilised flow, and its ESS that of the action. "AIS" anneals the mean-field draws to the target by HMC: a log Z that
no deep flow has a part in.
Writes results/stabilised.json and results/stabilised.md beside this file; rows that `--only` and `--methods`
leave out stay as they were.
"""

import argparse
import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latticeflow.actions import (
    Action,
    Density,
    Funnel,
    GaussianMixture,
    MultivariateStudentT,
    breast_cancer_horseshoe,
    synthetic_horseshoe,
    synthetic_regression,
)
from latticeflow.flows import Clamp, ElementwiseAffine, Sequential, coupling_flow
from latticeflow.mcmc import HMC
from latticeflow.mcmc.kernel import ChainState
from latticeflow.priors import Normal, StudentT
from latticeflow.samplers import FlowSampler, StabilisedSampler
from latticeflow.stats import bennett, ess, gamma_method, log_z
from latticeflow.storage import provenance
from latticeflow.streams import stream
from latticeflow.training import Trainer, TrainingError, TrainingSettings, make_estimator

RESULTS = Path(__file__).parent / "results"
SEED = 1
REPEATS, DRAWS, CHUNK = 20, 20000, 2500
REPLICA, TRAJECTORIES = 64, 500
TEMPERATURES, PARTICLES = 400, 512
SPLINE_LAYERS = 4
GRADIENT_CLIP = 10.0

TARGETS: dict[str, Callable[[], Density]] = {
    "student-t, D = 10": lambda: MultivariateStudentT(10),
    "student-t, D = 50": lambda: MultivariateStudentT(50),
    "funnel, D = 10": lambda: Funnel(10),
    "funnel, D = 50": lambda: Funnel(50),
    "horseshoe, d = 10, D = 22": lambda: synthetic_horseshoe(22),
    "horseshoe, d = 50, D = 102": lambda: synthetic_horseshoe(102),
    "horseshoe, breast cancer, D = 62": breast_cancer_horseshoe,
    "linear regression, D = 50": lambda: synthetic_regression(50),
    "mixture, D = 10": lambda: GaussianMixture(10),
}


NETWORKS: dict[str, Any] = {"conditioner": "dense", "hidden": [100], "mask": "random"}


def couplings(dimension: int, layers: int, **settings: Any) -> Sequential:
    return coupling_flow((dimension,), layers=layers, **NETWORKS, **settings)


def mean_field(dimension: int, layers: int) -> FlowSampler:
    return FlowSampler(Normal((dimension,)), ElementwiseAffine((dimension,)))


def unclamped(dimension: int, layers: int) -> FlowSampler:
    return FlowSampler(Normal((dimension,)), couplings(dimension, layers, clamp=Clamp("none")))


def symmetric(dimension: int, layers: int) -> FlowSampler:
    return FlowSampler(Normal((dimension,)), couplings(dimension, layers, clamp=Clamp("symmetric")))


def tail_adaptive(dimension: int, layers: int) -> FlowSampler:
    return FlowSampler(StudentT((dimension,)), couplings(dimension, layers, clamp=Clamp("tanh")))


def splines(dimension: int, layers: int) -> FlowSampler:
    settings = {"transform": "spline", "bins": 8, "bound": 5.0, "clamp": Clamp("none")}
    return FlowSampler(Normal((dimension,)), couplings(dimension, SPLINE_LAYERS, **settings))


def stabilised(dimension: int, layers: int, **settings: Any) -> StabilisedSampler:
    return StabilisedSampler((dimension,), layers=layers, **NETWORKS, **settings)


def normal_base(dimension: int, layers: int) -> StabilisedSampler:
    return stabilised(dimension, layers, prior=Normal((dimension,)))


def clamped(positive: float) -> Callable[[int, int], StabilisedSampler]:
    return lambda dimension, layers: stabilised(dimension, layers, clamp=Clamp(positive=positive))


METHODS: dict[str, tuple[Callable[[int, int], FlowSampler], str]] = {
    "mean-field": (mean_field, "path"),
    "RealNVP": (unclamped, "path"),
    "symmetric clamp": (symmetric, "path"),
    "tanh clamp, student-t base (ATAF)": (tail_adaptive, "path"),
    "splines, 4 layers": (splines, "path"),
    "stabilised": (stabilised, "path"),
    "stabilised, clamp to 0.3": (clamped(0.3), "path"),
    "stabilised, clamp to 0.5": (clamped(0.5), "path"),
    "stabilised, normal base": (normal_base, "path"),
    "stabilised, no path gradient": (stabilised, "reparametrisation"),
}
ABLATIONS = ("stabilised, normal base", "stabilised, no path gradient")
ABLATED = ("student-t, D = 50",)


@dataclass(frozen=True)
class Annealed(Action):
    """`(1 - t) (-log q) + t S` between a sampler's density and a target."""

    sampler: FlowSampler
    target: Density
    t: float

    theory, field_name = "annealed", "x"

    def __call__(self, field: Tensor) -> Tensor:
        return self.t * self.target(field) - (1 - self.t) * self.sampler.log_prob(field)

    def field_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape


def trained(sampler: FlowSampler, target: Density, estimator: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train in place; return what is known of the training, the sampler having its last finite weights."""
    clip = None if isinstance(target, MultivariateStudentT) else GRADIENT_CLIP
    settings = TrainingSettings(
        steps=options.steps, batch=options.batch, learning_rate=options.learning_rate, gradient_clip=clip, seed=SEED
    )
    trainer = Trainer(sampler, target, make_estimator(estimator), settings)
    last: dict[str, Tensor] = {}

    def keep_last(trainer: Trainer, record: Any) -> None:
        if trainer.step == options.steps:
            last.update(trainer.state_dict()["weights"])

    started, stopped = time.process_time(), ""
    try:
        trainer.run(keep_last)
        sampler.load_state_dict(last)
    except TrainingError as error:
        stopped = str(error)
    skipped = sum(record.skipped for record in trainer.records) + bool(stopped)
    return {
        "steps": len(trainer.records) + bool(stopped),
        "skipped": skipped,
        "seconds": time.process_time() - started,
        "stopped": stopped,
    }


@torch.no_grad()
def judged(sampler: FlowSampler, target: Density, *, times: int = REPEATS) -> dict[str, Any]:
    """Return ELBO, log Z with its spread, ESS and the largest |z| of any layer; a draw without a weight counts as 0."""
    generator = stream(SEED, "benchmark")
    repeats, largest, bad = [], 0.0, 0
    for _ in range(times):
        parts = []
        for _ in range(DRAWS // CHUNK):
            z = sampler.latent(CHUNK, generator)
            log_q, largest = sampler.prior.log_prob(z.double()), max(largest, float(z.abs().max()))
            for layer in getattr(sampler.flow, "layers", [sampler.flow]):
                z, log_det = layer(z)
                log_q = log_q - log_det
                largest = max(largest, float(torch.nan_to_num(z.abs(), nan=math.inf).max()))
            parts.append(-target(z) - log_q)
        repeats.append(torch.cat(parts))
    log_weight = torch.stack(repeats).numpy()
    finite = np.isfinite(log_weight)
    bad = int((~finite).sum())
    weighed = np.where(finite, log_weight, -np.inf)
    found = np.array([log_z(row)[0] for row in weighed if np.isfinite(row).any()])
    return {
        "elbo": float(log_weight.mean()) if bad == 0 else -math.inf,
        "log_z": float(found.mean()) if len(found) == times else math.nan,
        "log_z_spread": float(found.std(ddof=1)) if len(found) == times else math.nan,
        "ess": float(ess(weighed)) if len(found) == times else 0.0,
        "largest": largest,
        "bad_draws": bad,
    }


def hmc(target: Density, flow: FlowSampler) -> dict[str, Any]:
    """Run HMC from draws of the flow; its log Z by Bennett's ratio with fresh draws of the flow."""
    started, generator = time.process_time(), stream(SEED, "hmc")
    start = FlowSampler(Normal((target.dimension,)), Sequential()).prior
    kernel = HMC(target, start, trajectory_length=1.0, step_size=0.1, jitter=0.3)
    state = kernel.start(REPLICA, generator)
    for _ in range(TRAJECTORIES):
        state, info = kernel.step(state, generator)
        kernel.tune(info)
    fields, actions, accepted = [], [], []
    for _ in range(TRAJECTORIES):
        state, info = kernel.step(state, generator)
        fields.append(state.field)
        actions.append(state.action)
        accepted.append(info.accepted)
    seconds = time.process_time() - started
    action = torch.stack(actions, dim=1)
    with torch.no_grad():
        x, log_q = flow.sample(DRAWS, generator)
        proposals = -target(x) - log_q
        chain = torch.stack([-target(field) - flow.log_prob(field) for field in fields], dim=1)
    value, error = bennett(proposals.numpy(), chain.numpy(), correlated=True)
    result = gamma_method(action.numpy())
    return {
        "elbo": math.nan,
        "log_z": value,
        "log_z_spread": error,
        "ess": result.n_eff / action.numel(),
        "largest": float(torch.stack(fields).abs().max()),
        "acceptance": float(torch.stack(accepted).double().mean()),
        "seconds": seconds,
        "skipped": 0,
        "steps": 0,
    }


def annealed(target: Density, start: FlowSampler) -> dict[str, Any]:
    """Return log Z by annealed importance sampling from a sampler's draws."""
    started, generator = time.process_time(), stream(SEED, "annealing")
    repeats = []
    for _ in range(4):
        with torch.no_grad():
            x, _ = start.sample(PARTICLES, generator)
        log_weight, step_size, before = torch.zeros(PARTICLES, dtype=torch.float64), 0.2, 0.0
        for t in np.linspace(0, 1, TEMPERATURES + 1)[1:] ** 1.5:
            with torch.no_grad():
                log_weight += (t - before) * (-target(x) - start.log_prob(x))
            before = float(t)
            action = Annealed(start, target, before)
            kernel = HMC(action, start.prior, trajectory_length=5 * step_size, step_size=step_size)
            state, info = kernel.step(ChainState(x, kernel.action.orbit(x).detach()), generator)
            x = state.field
            rate = float(info.accepted.double().mean())
            step_size = min(max(step_size * (1.05 if rate > 0.8 else 0.95), 1e-3), 1.0)
        repeats.append(log_weight.numpy())
    values = np.array([log_z(row)[0] for row in repeats])
    return {
        "elbo": math.nan,
        "log_z": log_z(np.concatenate(repeats))[0],
        "log_z_spread": float(values.std(ddof=1)),
        "ess": float(ess(np.concatenate(repeats))),
        "largest": math.nan,
        "seconds": time.process_time() - started,
        "skipped": 0,
        "steps": 0,
    }


def built(method: str, dimension: int, layers: int) -> tuple[FlowSampler, str]:
    build, estimator = METHODS[method]
    torch.manual_seed(SEED)
    return build(dimension, layers).double(), estimator


def row(
    target_name: str, method: str, layers: int, options: argparse.Namespace, *, times: int = REPEATS
) -> tuple[dict[str, Any], FlowSampler]:
    target = TARGETS[target_name]()
    sampler, estimator = built(method, target.dimension, layers)
    found = trained(sampler, target, estimator, options) | judged(sampler, target, times=times)
    found = {"target": target_name, "method": method, "layers": layers, "exact": target.log_z} | found
    print(json.dumps(found), flush=True)
    return found, sampler


def table(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for name in TARGETS:
        if options.only not in name:
            continue
        samplers: dict[str, FlowSampler] = {}
        for method in METHODS:
            if not re.search(options.methods, method) or (method in ABLATIONS and name not in ABLATED):
                continue
            found, samplers[method] = row(name, method, options.layers, options)
            rows.append(found)
        target = TARGETS[name]()
        others: dict[str, dict[str, Any]] = {}
        if "stabilised" in samplers:
            others["HMC"] = hmc(target, samplers["stabilised"])
        if "mean-field" in samplers and target.log_z is None:
            others["AIS"] = annealed(target, samplers["mean-field"])
        for label, found in others.items():
            rows.append({"target": name, "method": label, "layers": 0, "exact": target.log_z} | found)
            print(json.dumps(rows[-1]), flush=True)
    return rows


def depth(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train standard and stabilised flows of growing depth."""
    shorter = argparse.Namespace(**vars(options) | {"steps": options.depth_steps})
    return [
        row("student-t, D = 50", method, layers, shorter, times=5)[0]
        for layers in (4, 16, 32, 64)
        for method in ("RealNVP", "stabilised, clamp to 0.5")
        if re.search(options.methods, method)
    ]


def cost(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time one step of a stabilised flow of 64 layers against D, on the horseshoe, and train D = 1002."""
    rows = []
    for dimension in (10, 102, 1002, 10002):
        target = synthetic_horseshoe(dimension)
        torch.manual_seed(SEED)
        sampler = stabilised(dimension, 64).double()
        settings = TrainingSettings(steps=1, batch=16, gradient_clip=None, seed=SEED)
        trainer = Trainer(sampler, target, make_estimator("path"), settings)
        trainer.trial_step()
        times = []
        for _ in range(1 if dimension > 5000 else 5):
            started = time.process_time()
            trainer.trial_step()
            times.append(time.process_time() - started)
        parameters = sum(p.numel() for p in sampler.parameters())
        found = {"D": dimension, "seconds": float(np.median(times)), "parameters": parameters}
        if dimension == 1002:
            shorter = argparse.Namespace(**vars(options) | {"steps": 200, "batch": 16})
            found["skipped"] = trained(sampler, target, "path", shorter)["skipped"]
        rows.append(found)
        print(json.dumps(found), flush=True)
    return rows


def number(value: float, digits: int = 3) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.1e}"


def judgement(r: dict[str, Any]) -> list[str]:
    log_z_found = f"{number(r['log_z'])} ({number(r['log_z_spread'])})" if not math.isnan(r["log_z"]) else ""
    return [
        number(r["elbo"]),
        log_z_found,
        number(r["ess"], 4),
        str(r["skipped"]),
        "" if math.isnan(r["largest"]) else f"{r['largest']:.2g}",
    ]


def aligned(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows]] + [""]


def markdown(results: dict[str, Any]) -> str:
    numbers = ["ELBO", "log Z (spread)", "ESS/N", "skipped", "largest abs z"]
    rows, last = [], None
    for r in results.get("table", []):
        exact = ("" if r["exact"] is None else f"; log Z = {r['exact']:.3f}") + f"; {r['steps']} steps"
        rows.append(
            ["" if r["target"] == last else r["target"] + exact, r["method"], *judgement(r), f"{r['seconds']:.0f}"]
        )
        last = r["target"]
    lines = aligned(["target", "method", *numbers, "seconds"], rows)
    deep = [[r["target"], str(r["layers"]), r["method"], *judgement(r)] for r in results.get("depth", [])]
    lines += aligned(["target", "layers", "method", *numbers], deep)
    costs = [
        [str(r["D"]), str(r["parameters"]), f"{r['seconds']:.3g}", str(r.get("skipped", ""))]
        for r in results.get("cost", [])
    ]
    lines += aligned(["D", "parameters", "CPU seconds a step", "skipped in 200 steps"], costs)
    options, machine = results["options"], results["provenance"]
    lines.append(
        f"{options['layers']} layers, batch {options['batch']} ({options['depth_steps']} steps against depth; cost: 64 "
        f"layers, batch 16), Adam {options['learning_rate']:g}, float64, "
        f"{options['threads']} thread(s), torch {machine['torch']}."
    )
    return "\n".join(lines) + "\n"


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put new rows in the place of old ones of the same target, method and depth, in the order of the scripts."""
    rows = {(row["target"], row["layers"], row["method"]): row for row in [*old, *new]}
    targets, methods = list(TARGETS), [*METHODS, "HMC", "AIS"]

    def place(row: dict[str, Any]) -> tuple[int, float, int]:
        return targets.index(row["target"]), row["layers"] or math.inf, methods.index(row["method"])

    return sorted(rows.values(), key=place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--depth-steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", choices=("table", "depth", "cost"))
    parser.add_argument("--only", default="", help="targets whose name contains this word")
    parser.add_argument("--methods", default="", help="flows whose name has this pattern")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    stored = RESULTS / "stabilised.json"
    found = {name: part(options) for name, part in PARTS.items() if options.part in (None, name)}
    results = json.loads(stored.read_text()) if stored.exists() else {}
    for name, rows in found.items():
        results[name] = rows if name == "cost" else merged(results.get(name, []), rows)
    results["options"] = {k: v for k, v in vars(options).items() if k not in ("part", "only", "methods")}
    results["provenance"] = {k: v for k, v in provenance().items() if k not in ("host", "command")}
    RESULTS.mkdir(exist_ok=True)
    stored.write_text(json.dumps(results, indent=2) + "\n")
    (RESULTS / "stabilised.md").write_text(markdown(results))
    print(markdown(results))


PARTS = {"table": table, "depth": depth, "cost": cost}

if __name__ == "__main__":
    main()
