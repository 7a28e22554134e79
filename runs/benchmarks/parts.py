"""Training by parts against end to end: quality, CPU time, cost of a step and the memory that it holds.

    OMP_NUM_THREADS=1 python runs/benchmarks/parts.py [--seeds 5] [--first 1] [--only WORD] [--steps 1.0]
        [--schedules alternate,sequential] [--parts 2,3] [--part table|cost]

"table" trains each target with each schedule for an equal number of steps: end to end, and sequential, alternate and
simultaneous with 2 and 3 parts of equal size, the last third of the steps, of U(1) four tenths, end to end. The
digits of scikit-learn are 64 grey levels 0 to 16 made continuous by uniform noise; bits/dim is `-log2 q / 64` of the
held-out fifth, an upper bound for the levels themselves. Lattices are measured by the ESS/N of fresh proposals. Numbers
are means over seeds with their standard errors; ratios of CPU seconds are those of the same seed, in the same run.

"cost" is the CPU time of a local step in turn, averaged over the parts, in units of an end-to-end step of the same run
(medians), and the memory of what the step keeps for its backward pass, likewise; the model counts a forward pass as 1
and a backward pass as 2, and the parts before as forward passes.

Rows go to results/parts.json and results/parts.md beside this file as they come; several runs may write at a time.
"""

import argparse
import fcntl
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from latticeflow.actions import Action, ScalarAction, U1Action
from latticeflow.flows import ActNorm, Clamp, Sequential, coupling_flow, gauge_flow, glow
from latticeflow.priors import FreeField, Normal, Prior, QuenchedU1
from latticeflow.samplers import PartwiseSampler
from latticeflow.stats import ess
from latticeflow.storage import atomic_write_text, provenance
from latticeflow.streams import stream
from latticeflow.training import LikelihoodSettings, fit, held_out_split, make_estimator, train

RESULTS = Path(__file__).parent / "results"
SCHEDULES = ("sequential", "alternate", "simultaneous")
PARTS = (2, 3)
LEVELS, HELD_OUT, PROPOSALS, BATCH = 3, 0.2, 4096, 64
IMAGE = (1, 8, 8)
ESTIMATOR = "reparametrisation"
"""The only one whose local steps need no gradient of the density before them."""
Row = dict[str, Any]


@lru_cache
def digits() -> Tensor:
    """Return the digits with uniform noise, `(1797, 8, 8)`, grey levels 0 to 17."""
    images = torch.from_numpy(load_digits().images)
    return images + torch.rand(images.shape, generator=stream(0, "noise of the digits"), dtype=torch.float64)


@dataclass(frozen=True)
class Digits:
    """Maximum likelihood; the flow begins with an affine map of each pixel to its mean and width."""

    name: str
    flow: Callable[[], Sequential]
    shape: tuple[int, ...]
    steps: int
    parts: Callable[[int], list[int] | list[str]]
    only: int | None = None
    unit: str = "bits/dim"

    def sampler(self, seed: int, parts: int) -> PartwiseSampler:
        torch.manual_seed(seed)
        return PartwiseSampler(Normal(self.shape), self.flow(), self.parts(parts)).float()

    def train(self, sampler: PartwiseSampler, schedule: str, seed: int, steps: int) -> None:
        data = digits().reshape(-1, *self.shape)
        fit(sampler, data, settings=self.settings(seed, steps=steps, schedule=schedule))

    def settings(self, seed: int, **own: Any) -> LikelihoodSettings:
        evaluations = {"validation": HELD_OUT, "evaluate_every": 20, "patience": 10**6}
        return LikelihoodSettings(batch=128, learning_rate=2e-3, gradient_clip=100.0, seed=seed, **evaluations, **own)

    @torch.no_grad()
    def quality(self, sampler: PartwiseSampler, seed: int) -> float:
        """Return the bits per dimension of the held-out digits, whose smallest value chose the weights."""
        _, chosen = held_out_split(len(digits()), validation=HELD_OUT, seed=seed)
        held_out = digits()[chosen].reshape(-1, *self.shape).float()
        return -float(sampler.eval().log_prob(held_out).mean()) / (math.prod(self.shape) * math.log(2))

    def step(self, sampler: PartwiseSampler, part: int | None) -> None:
        """Compute the gradient of one part, or of all."""
        learner = sampler if part is None else sampler.on_data(part)
        (-learner.log_prob(digits()[:128].reshape(-1, *self.shape).float()).mean()).backward()


@dataclass(frozen=True)
class Lattice:
    """Reverse KL by an estimator."""

    name: str
    action: Action
    prior: Callable[[], Prior]
    flow: Callable[[], Sequential]
    steps: int
    parts: Callable[[int], list[int] | list[str]]
    learning_rate: float
    fine_tuning_rate: float
    fine_tuning: float = 1 / 3
    only: int | None = None
    unit: str = "ESS/N"

    def sampler(self, seed: int, parts: int) -> PartwiseSampler:
        torch.manual_seed(seed)
        return PartwiseSampler(self.prior(), self.flow(), self.parts(parts)).float()

    def train(self, sampler: PartwiseSampler, schedule: str, seed: int, steps: int) -> None:
        settings = {"batch": BATCH, "learning_rate": self.learning_rate, "warmup": 10, "window": 30, "seed": seed}
        settings |= {"fine_tuning_rate": self.fine_tuning_rate, "fine_tuning": self.fine_tuning, "schedule": schedule}
        train(sampler, self.action, ESTIMATOR, steps=steps, **settings)

    @torch.no_grad()
    def quality(self, sampler: PartwiseSampler, seed: int) -> float:
        """Return the ESS/N of fresh proposals."""
        generator, log_weights = stream(seed, "proposals"), []
        for _ in range(PROPOSALS // 256):
            x, log_q = sampler.sample(256, generator)
            log_weights.append(-self.action(x.double()) - log_q)
        return ess(torch.cat(log_weights).numpy())

    def step(self, sampler: PartwiseSampler, part: int | None) -> None:
        generator = stream(0, "cost")
        learner = sampler if part is None else sampler.part(part, BATCH, generator)
        surrogate, _ = make_estimator(ESTIMATOR)(learner, self.action, BATCH, generator)
        surrogate.backward()


def with_start(flow: Sequential, shape: tuple[int, ...]) -> Sequential:
    """Return the flow with an affine map behind it, next to the data, which their first batch sets."""
    return Sequential([*flow.layers, ActNorm(shape)], cycle=flow.cycle, closing=1, places=flow.places)


def digit_glow(**parts: int) -> Sequential:
    return with_start(glow(IMAGE, levels=LEVELS, steps=6, hidden=24, clamp=Clamp("tanh"), **parts), IMAGE)


def digit_realnvp() -> Sequential:
    settings = {"conditioner": "dense", "hidden": (128, 128), "clamp": Clamp("tanh")}
    return with_start(coupling_flow((8, 8), layers=12, **settings), (8, 8))


def phi4_flow() -> Sequential:
    return coupling_flow((16, 16), layers=12, transform="spline", bins=4, bound=2.0, hidden=(16,))


def u1_flow() -> Sequential:
    return gauge_flow((8, 8), layers=24, bins=4, hidden=(16,), conditioner="local")


def equal(layers: int) -> Callable[[int], list[int]]:
    return lambda parts: [layers // parts] * parts


def by_blocks(parts: int) -> list[int] | list[str]:
    return [18 * LEVELS] if parts == 1 else ["level 2", "level 1"]


PROBLEMS: tuple[Digits | Lattice, ...] = (
    Digits("digits, Glow across blocks", lambda: digit_glow(parts=6), IMAGE, 600, equal(18 * LEVELS)),
    Digits("digits, Glow by blocks", digit_glow, IMAGE, 600, by_blocks, only=3),
    Digits("digits, RealNVP", digit_realnvp, (8, 8), 800, equal(12)),
    Lattice(
        "phi^4 16x16",
        ScalarAction(-4.0, 8.0),
        lambda: FreeField((16, 16), 0.67),
        phi4_flow,
        900,
        equal(12),
        learning_rate=2e-3,
        fine_tuning_rate=2e-3,
    ),
    Lattice(
        "U(1) 8x8",
        U1Action(2.0),
        lambda: QuenchedU1(1.5, (8, 8)),
        u1_flow,
        900,
        lambda parts: {1: [24], 2: [8, 16], 3: [8, 8, 8]}[parts],
        learning_rate=1e-3,
        fine_tuning_rate=2.5e-4,
        fine_tuning=0.4,
    ),
)


def runs(problem: Digits | Lattice, options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Yield the schedules and numbers of parts."""
    schedules = [schedule for schedule in SCHEDULES if schedule in options.schedules]
    numbers = [parts for parts in PARTS if str(parts) in options.parts and problem.only in (None, parts)]
    yield "end_to_end", 1
    yield from ((schedule, parts) for parts in numbers for schedule in schedules)


def table_rows(problem: Digits | Lattice, seed: int, options: argparse.Namespace) -> Iterator[Row]:
    steps = round(options.steps * problem.steps)
    problem.train(problem.sampler(seed, 1), "end_to_end", seed, 1)  # what a process does once is nobody's cost
    whole = 0.0
    for schedule, parts in runs(problem, options):
        sampler = problem.sampler(seed, parts)
        started = time.process_time()
        problem.train(sampler, schedule, seed, steps)
        seconds = time.process_time() - started
        whole = whole or seconds
        yield {
            "problem": problem.name,
            "schedule": schedule,
            "parts": parts,
            "seed": seed,
            "steps": steps,
            "quality": problem.quality(sampler, seed),
            "unit": problem.unit,
            "seconds": seconds,
            "of_end_to_end": seconds / whole,
        }


@contextmanager
def kept_bytes() -> Iterator[list[int]]:
    """Count the bytes that are kept for the backward pass: a list of one number, each storage counted once."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    total = [0]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
    total[0] = sum(seen.values())


def cost_rows(problem: Digits | Lattice, options: argparse.Namespace) -> Iterator[Row]:
    for parts in PARTS:
        if problem.only not in (None, parts):
            continue
        sampler = problem.sampler(1, parts)
        problem.step(sampler, None)  # the first batch sets affine maps
        places = [None, *range(parts)]
        seconds: dict[int | None, list[float]] = {place: [] for place in places}
        kept = {}
        for _ in range(options.repeats):
            for place in places:
                sampler.zero_grad()
                started = time.process_time()
                problem.step(sampler, place)
                seconds[place].append(time.process_time() - started)
        for place in places:
            with kept_bytes() as total:
                problem.step(sampler, place)
            kept[place] = total[0]
        whole = median(seconds[None])
        local = [median(seconds[k]) / whole for k in range(parts)]
        yield {
            "problem": problem.name,
            "parts": parts,
            "end_to_end_seconds": whole,
            "local": local,
            "mean": mean(local),
            "model": (1 + parts) / 2 / parts / 3 + 2 / 3 / parts,
            "kept_megabytes": kept[None] / 1e6,
            "kept": [kept[k] / kept[None] for k in range(parts)],
        }


def keep(part: str, row: Row) -> None:
    """Put a row into the results, in place of an older one of its kind."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "parts.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = RESULTS / "parts.json"
        results = json.loads(file.read_text()) if file.exists() else {}
        rows = {place(old): old for old in results.get(part, [])} | {place(row): row}
        results[part] = [rows[each] for each in sorted(rows)]
        results["provenance"] = {k: v for k, v in provenance().items() if k not in ("host", "command")}
        atomic_write_text(file, json.dumps(results, indent=1) + "\n")
        atomic_write_text(RESULTS / "parts.md", markdown(results))


def place(row: Row) -> tuple[int, int, int, int]:
    schedule = ("end_to_end", *SCHEDULES).index(row["schedule"]) if "schedule" in row else 0
    names = [problem.name for problem in PROBLEMS]
    return names.index(row["problem"]), row["parts"], schedule, row.get("seed", 0)


def markdown(results: Row) -> str:
    lines = []
    if "table" in results:
        lines += aligned("target|schedule|parts|quality|difference|CPU s|of end to end|seeds", table(results["table"]))
    if "cost" in results:
        head = "target|parts|local step of end to end|mean|model|kept for backward, end to end|kept by each part"
        lines += aligned(head, map(cost_cells, results["cost"]))
    note = (
        "Bits/dim of held-out digits (lower is better), ESS/N of lattices (higher is better), means over seeds, in "
        "brackets their standard errors; difference: to end to end with the same seed, of ESS/N relative. Equal steps, "
        "the last third (U(1): 0.4) end to end; reparametrisation gradients; one thread, "
        f"torch {results['provenance']['torch']}."
    )
    return "\n".join([*lines, note]) + "\n"


def aligned(head: str, rows: Iterable[list[str]]) -> list[str]:
    columns = head.split("|")
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)] + [""]


def table(rows: list[Row]) -> Iterator[list[str]]:
    baseline = {(row["problem"], row["seed"]): row for row in rows if row["schedule"] == "end_to_end"}
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["problem"], row["schedule"], row["parts"]), []).append(row)
    for (problem, schedule, parts), group in groups.items():
        whole = [baseline[problem, row["seed"]] for row in group]
        pairs = list(zip(group, whole, strict=True))
        relative = [one["quality"] / of["quality"] - 1 for one, of in pairs]
        absolute = [one["quality"] - of["quality"] for one, of in pairs]
        unit = group[0]["unit"]
        change = f"{mean(relative):+.1%} ({error(relative):.1%})"
        if unit == "bits/dim":
            change = f"{mean(absolute):+.4f} ({error(absolute):.4f})"
        ratio = mean(one.get("of_end_to_end", one["seconds"] / of["seconds"]) for one, of in pairs)
        quality = [row["quality"] for row in group]
        yield [
            problem,
            schedule.replace("_", " "),
            str(parts),
            f"{mean(quality):.4f} ({error(quality):.4f}) {unit}",
            "" if schedule == "end_to_end" else change,
            f"{mean(row['seconds'] for row in group):.0f}",
            f"{ratio:.2f}",
            str(len(group)),
        ]


def error(values: list[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def cost_cells(row: Row) -> list[str]:
    return [
        row["problem"],
        str(row["parts"]),
        ", ".join(f"{value:.2f}" for value in row["local"]),
        f"{row['mean']:.2f}",
        f"{row['model']:.2f}",
        f"{row['kept_megabytes']:.1f} MB",
        ", ".join(f"{value:.2f}" for value in row["kept"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--only", default="")
    parser.add_argument("--steps", type=float, default=1.0, help="a factor of the number of steps")
    parser.add_argument("--schedules", default=",".join(SCHEDULES), help="beside end to end, which is always run")
    parser.add_argument("--parts", default=",".join(map(str, PARTS)), help="beside 1, which is always run")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--part", choices=["table", "cost"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [problem for problem in PROBLEMS if options.only in problem.name]
    for problem in chosen:
        if options.part != "table":
            for row in cost_rows(problem, options):
                print(json.dumps(row), flush=True)
                keep("cost", row)
    for seed in range(options.first, options.first + options.seeds):
        for problem in chosen if options.part != "cost" else ():
            for row in table_rows(problem, seed, options):
                print(json.dumps(row), flush=True)
                keep("table", row)
    print((RESULTS / "parts.md").read_text())


if __name__ == "__main__":
    main()
