"""What a training step costs: against a plain implementation, by estimator, and what its gradient is worth.

    OMP_NUM_THREADS=1 python runs/benchmarks/training_step.py [--part plain estimators variance time rate]
        [--sizes 8 12 16 24] [--plain-sizes 8 12 16] [--dense-sizes 8 12 16] [--dtypes float32 float64]
        [--repeats 5] [--limit 300] [--seconds 300] [--again] [--device cuda] [--set KEY=VALUE]

The model is that of arXiv:2308.13294 (48 couplings, 9 knots, hidden [64, 64], kernel 3, dilations 1, 2, 3) with the
uniform prior at beta 2, kappa 0.276, batch 16, the action itself without holonomy orbits. The determinant is computed
in the precision of the flow, complex64 for float32, as in any training.

* plain: a step of the package, as it is and with training.compile, against one of plain_flow.py, whose dense matrix is
  filled element by element or at once.
* estimators: seconds of a step, where they go, and the peak of memory in a process of its own; cyclic or dense
  determinant.
* variance: the trace of the gradient's covariance over the square of its mean, at the same weights and draws: README's
  model on 8x8 from its quenched prior, and the paper's from the uniform one.
* time: ESS/N after equal CPU time, README's model with local conditioners from the quenched prior.
* rate: the rate of matrix products that the conditioners reach, against that of a product of 1024 x 1024 matrices.

Seconds are medians of CPU seconds, all methods of a row in turn; with --device cuda of the wall. Rows go to
results/training_step.json and results/training_step.md beside this file as they come; those that are there already are
not made again without --again.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from plain_flow import ASSEMBLIES
from rows import RESULTS, Results
from timing import Clock, fresh_peak, machine, medians
from training_models import ESTIMATORS, Split, paper_config, trainer_of, trial_step
from training_quality import MODELS, equal_time, untrained, variance_rows
from training_rates import conditioner_rate, product_rate
from training_tables import KEYS, markdown, verdicts

OURS = {"package": ("package", "cyclic"), "compiled": ("compiled", "cyclic")}
IMPLEMENTATIONS = {**OURS, **{one: ("plain", one) for one in ASSEMBLIES}}


def plain_rows(options: argparse.Namespace, results: Results) -> None:
    """Time and memory of the package's step and of the plain ones."""
    for size in options.plain_sizes:
        for dtype in options.dtypes:
            where = {"device": options.device, "dtype": dtype, "L": size}
            if results.has("plain", **where) and not options.again:
                continue
            chosen = [*OURS, *(one for one in options.assemblies if one != "elements" or size <= options.elements)]
            tasks = {
                f"{estimator}, {name}": (size, IMPLEMENTATIONS[name][0], estimator, IMPLEMENTATIONS[name][1])
                for estimator in ESTIMATORS[:2]
                for name in chosen
            }
            overrides = options.overrides(dtype)
            works = {name: trial_step(*task, overrides) for name, task in tasks.items()}
            seconds = medians(works, options.clock, repeats=options.repeats, limit=options.limit)
            peaks = {name: peak(options, task, overrides) for name, task in tasks.items()}
            results.keep("plain", {**where, "batch": options.batch, "seconds": seconds, "megabytes": peaks})


def peak(options: argparse.Namespace, task: tuple[int, str, str, str], overrides: list[str]) -> float:
    names = ("size", "implementation", "estimator", "determinant")
    own = dict(zip(names, task, strict=True))
    settings = {"device": options.device, "threads": options.threads, "overrides": overrides}
    return fresh_peak("training_models", "trial_step", **settings, **own)


def estimator_rows(options: argparse.Namespace, results: Results) -> None:
    """Time, where it goes, and memory of every estimator."""
    for size in options.sizes:
        for dtype in options.dtypes:
            for determinant in ("cyclic", "dense"):
                where = {"device": options.device, "dtype": dtype, "L": size, "determinant": determinant}
                left_out = determinant == "dense" and size not in options.dense_sizes
                if left_out or (results.has("estimators", **where) and not options.again):
                    continue
                overrides = options.overrides(dtype)
                tasks = {name: (size, "package", name, determinant) for name in ESTIMATORS}
                works = {name: trial_step(*task, overrides) for name, task in tasks.items()}
                row = {"seconds": medians(works, options.clock, repeats=options.repeats, limit=options.limit)}
                row["split"] = {name: split(size, name, determinant, overrides, options) for name in ESTIMATORS}
                row["megabytes"] = {name: peak(options, task, overrides) for name, task in tasks.items()}
                results.keep("estimators", {**where, "batch": options.batch, **row})


def split(size: int, estimator: str, determinant: str, overrides: list[str], options: argparse.Namespace) -> dict:
    """Return the median seconds of the parts of a step."""
    trainer = trainer_of(paper_config(size, estimator, overrides), estimator, determinant)
    timed = Split(trainer, options.clock)
    timed.step()
    steps = [timed.step() for _ in range(min(3, options.repeats))]
    return {name: median(step[name] for step in steps) for name in steps[0]}


def variance(options: argparse.Namespace, results: Results) -> None:
    steps = {"README": options.steps, "paper": options.paper_steps}
    for model in options.models:
        where = {"model": model, "stage": 1.0, "estimator": ESTIMATORS[2]}
        if results.has("variance", **where) and not options.again:
            continue
        overrides = options.overrides("float32", batch=64)
        for row in variance_rows(model, steps[model], options.batches, overrides):
            results.keep("variance", row)


def time_rows(options: argparse.Namespace, results: Results) -> None:
    for size in options.time_sizes:
        overrides = [f"run.device={options.device}", *options.set]
        if options.again or not results.has("time", L=size, estimator="none", budget=0.0, seed=0):
            results.keep("time", untrained(size, overrides))
        for seed in range(1, options.seeds + 1):
            for estimator in ESTIMATORS:
                where = {"L": size, "estimator": estimator, "budget": options.seconds, "seed": seed}
                if options.again or not results.has("time", **where):
                    results.keep("time", equal_time(size, estimator, options.seconds, seed, overrides))


def rates(options: argparse.Namespace, results: Results) -> None:
    for dtype in options.dtypes:
        where = {"device": options.device, "dtype": dtype, "threads": options.threads}
        product = product_rate(getattr(torch, dtype), options.device)
        for size in options.rate_sizes:
            for implementation in ("package", "plain"):
                own = {**where, "L": size, "implementation": implementation}
                if options.again or not results.has("rate", **own):
                    found = conditioner_rate(size, implementation, options.overrides(dtype), options.repeats)
                    results.keep("rate", {**own, "batch": options.batch, "product": product, **found})


PARTS: dict[str, Callable[[argparse.Namespace, Results], None]] = {
    "plain": plain_rows,
    "estimators": estimator_rows,
    "rate": rates,
    "variance": variance,
    "time": time_rows,
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sizes", type=int, nargs="*", default=[8, 12, 16, 24], help="of the estimators")
    parser.add_argument("--plain-sizes", type=int, nargs="*", default=[8, 12, 16])
    parser.add_argument("--dense-sizes", type=int, nargs="*", default=[8, 12, 16])
    parser.add_argument("--time-sizes", type=int, nargs="*", default=[8, 12, 16])
    parser.add_argument("--rate-sizes", type=int, nargs="*", default=[8, 16])
    parser.add_argument("--elements", type=int, default=16, help="largest lattice whose matrix is filled by elements")
    parser.add_argument("--assemblies", nargs="+", choices=ASSEMBLIES, default=["elements", "vectorised"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float64"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after which a work gets no more turns")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="of the variance")
    parser.add_argument("--batches", type=int, default=64, help="gradients of the variance")
    parser.add_argument("--steps", type=int, default=600, help="training of the README's model for the variance")
    parser.add_argument("--paper-steps", type=int, default=300, help="training of the paper's model for the variance")
    parser.add_argument("--seconds", type=float, default=300.0, help="of training in equal time")
    parser.add_argument("--seeds", type=int, default=1, help="trainings in equal time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", nargs="*", default=[], help="further configuration, key=value")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    options.clock = Clock(options.device)

    def overrides(dtype: str, batch: int = options.batch) -> list[str]:
        own = [f"training.dtype={dtype}", f"training.batch={batch}", f"run.device={options.device}"]
        return [*own, *([f"sampler.flow.layers={options.layers}"] if options.layers != 48 else []), *options.set]

    options.overrides = overrides
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = False  # convolutions in full single precision, as products of matrices are
    results = Results("training_step", KEYS, markdown, machine(options.device), options.out)
    for part in options.part:
        PARTS[part](options, results)
    print(markdown(results.tables()))
    print("\n".join(verdicts(results.tables())))


if __name__ == "__main__":
    main()
