"""Piecewise flows (arXiv:2305.02930) against single ones, on densities of the plane with several modes.

    OMP_NUM_THREADS=1 python runs/benchmarks/piecewise.py [--trainings 10] [--first 1] [--processes 1]
        [--part table|clusterers|processes] [--only WORD] [--methods WORD] [--steps N]

A training has draws of its own, the same for all methods, of which a fifth is held out, and an equal number of gradient
steps: k pieces take 1/k of the steps each, and stop early where nothing gets better. Every flow starts at the mean and
the width of its data; "piecewise Gaussians" are the pieces before any step. Both Kullback-Leibler divergences are the
true ones, sums over a grid with the known log Z, twice as fine for single flows, which are sharper; "coarse" are those
of every other point. ESS/N is that of the weights p/q of 20000 draws of q. The resampled base has its Z by a grid too.

"clusterers" fits the pieces of other partitions. "processes" measures the wall time of fitting 1, 2, 4 and 8 clusters
one after the other and side by side.

Rows go to results/piecewise.json and results/piecewise.md beside this file as they come, also from several runs at a
time; those that are there already with the same settings are not made again, unless `--again`.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed, parallel_config
from piecewise_rows import Row, keep, stored
from sklearn.cluster import DBSCAN
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from latticeflow.actions.densities import CircleOfGaussians, Density, TwoMoons, TwoRings
from latticeflow.flows import Clamp, autoregressive_flow, coupling_flow
from latticeflow.priors import Normal, Resampled
from latticeflow.samplers import FlowSampler, Partition, Sampler, partition, standardised
from latticeflow.stats import ess
from latticeflow.streams import stream
from latticeflow.training import LikelihoodSettings, fit, fit_pieces

RESULTS = Path(__file__).parent / "results"
SIDE, CHUNK, DRAWS = 4.5, 8192, 20000
EVALUATIONS, PATIENCE, SMALLEST, NEIGHBOURS = 12, 5, 100, 20
COUPLINGS: dict[str, Any] = {"layers": 8, "hidden": (64, 64), "conditioner": "dense", "clamp": Clamp("tanh")}
TARGETS: dict[str, Density] = {target.theory: target for target in (TwoMoons(), CircleOfGaussians(), TwoRings())}
STEPS = {"two_moons": 2000, "circle_of_gaussians": 2000, "two_rings": 4000}


def maf(data: Tensor) -> FlowSampler:
    return standardised(autoregressive_flow((2,), blocks=6, hidden=(50, 50), activation="tanh"), Normal((2,)), data)


def realnvp(data: Tensor) -> FlowSampler:
    return standardised(coupling_flow((2,), **COUPLINGS), Normal((2,)), data)


def resampled(data: Tensor) -> FlowSampler:
    base = Resampled(Normal((2,)), truncation=100, hidden=(256, 256))
    return standardised(coupling_flow((2,), **COUPLINGS), base, data)


SINGLE: dict[str, Callable[[Tensor], FlowSampler]] = {
    "single MAF": maf,
    "single RealNVP": realnvp,
    "single RealNVP, resampled base": resampled,
}
METHODS = ("piecewise MAF", "piecewise Gaussians", *SINGLE)


class MixtureOfNormals:
    """A mixture of normals fitted by EM, with the number of them that has the smallest BIC on 5000 samples."""

    def fit_predict(self, X: np.ndarray) -> np.ndarray:
        some = X[:5000]
        fitted = [GaussianMixture(k, random_state=0).fit(some) for k in range(2, 21)]
        return min(fitted, key=lambda mixture: mixture.bic(some)).predict(X)


class DensityClusters:
    """DBSCAN whose distance 95 of 100 samples have their 20 nearest within; clusters below 100 samples are noise."""

    def fit_predict(self, X: np.ndarray) -> np.ndarray:
        nearest = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(X)
        eps = float(np.quantile(nearest.kneighbors(X[:5000])[0][:, -1], 0.95))
        labels = DBSCAN(eps=eps, min_samples=NEIGHBOURS).fit_predict(X)
        return np.where(np.bincount(labels + 1)[labels + 1] < SMALLEST, -1, labels)


CLUSTERERS: dict[str, dict[str, Any]] = {
    "K-means, silhouette": {},
    "Gaussian mixture, BIC": {"clusterer": MixtureOfNormals()},
    "DBSCAN": {"clusterer": DensityClusters(), "noise": "nearest"},
}


def divergences(log_p: Tensor, log_q: Tensor, area: float) -> dict[str, float]:
    """Return KL(q||p), KL(p||q) and the integral of q, by sums over the points of a grid of cells of this area."""

    def mean(log_weight: Tensor, difference: Tensor) -> float:
        return area * float(torch.where(log_weight.isneginf(), 0.0, log_weight.exp() * difference).sum())

    return {
        "kl_qp": mean(log_q, log_q - log_p),
        "kl_pq": mean(log_p, log_p - log_q),
        "mass": area * float(log_q.exp().sum()),
    }


@torch.no_grad()
def on_grid(log_density: Callable[[Tensor], Tensor], points: int, *, side: float = SIDE) -> Tensor:
    """Return a log density at the centres of the cells of `[-side, side]^2`, `(points, points)`, float64."""
    line = (torch.arange(points, dtype=torch.float64) + 0.5) * (2 * side / points) - side
    cells = torch.cartesian_prod(line, line).split(CHUNK)
    return torch.cat([log_density(part).double() for part in cells]).reshape(points, points)


@torch.no_grad()
def judged(sampler: Sampler, target: Density, *, points: int, seed: int) -> Row:
    """Return the divergences of a sampler, on the grid and on every other point of it, and its ESS/N."""
    sampler.eval()
    if isinstance(base := getattr(sampler, "prior", None), Resampled):
        _normalise(base, points)
    log_p = on_grid(lambda x: -target(x) - target.log_z, points)
    log_q = on_grid(lambda x: sampler.log_prob(x.float()), points)
    area = (2 * SIDE / points) ** 2
    coarse = divergences(log_p[::2, ::2], log_q[::2, ::2], 4 * area)
    x, log_density = sampler.sample(DRAWS, stream(seed, "benchmark draws"))
    log_weight = -target(x.double()) - log_density.double()
    return divergences(log_p, log_q, area) | {"coarse": coarse, "ess": float(ess(log_weight.numpy()))}


def _normalise(base: Resampled, points: int, *, side: float = 6.0) -> None:
    """Fix the rejection probability of a resampled base of the plane by a grid: more exact than draws are."""
    log_rejected = on_grid(lambda z: base.base.log_prob(z) + base.log_acceptance(z)[1], points, side=side)
    base.log_rejection.copy_(torch.logsumexp(log_rejected.flatten(), dim=0) + 2 * math.log(2 * side / points))


def fitted(build: Callable[[Tensor], FlowSampler], data: Tensor, cut: Partition, options: Row) -> tuple[Sampler, Row]:
    """Return the pieces of a partition, or the one flow, and what the fit took."""
    steps = options["steps"] // cut.pieces
    settings = LikelihoodSettings(
        steps=steps,
        batch=options["batch"],
        learning_rate=options["learning_rate"],
        evaluate_every=max(1, steps // EVALUATIONS),
        patience=PATIENCE,
        seed=options["training"],
    )
    started = time.process_time()
    if cut.pieces == 1:
        torch.manual_seed(stream(options["training"], "benchmark build").initial_seed())
        sampler: Sampler = build(data)
        records = [fit(sampler, data, settings=settings)]
    else:
        sampler, records = fit_pieces(lambda _, part: build(part), data, cut.labels, settings=settings)
    return sampler, {"taken": sum(r[-1].step for r in records), "seconds": time.process_time() - started}


def drawn(target: str, options: Row) -> Tensor:
    """Return the draws of a training, the same for every method."""
    return TARGETS[target].sample(options["samples"], stream(options["training"], f"benchmark {target}"))


@lru_cache(maxsize=1)
def clustered(target: str, training: int, samples: int) -> tuple[Partition, float]:
    """Return the partition of a training's draws by K-means and the CPU seconds that it took."""
    data, started = drawn(target, {"training": training, "samples": samples}), time.process_time()
    return partition(data, seed=training), time.process_time() - started


def one_piece(data: Tensor) -> Partition:
    return Partition(torch.zeros(len(data), dtype=torch.int64), {}, (len(data),))


def table_row(target: str, method: str, options: Row) -> Row:
    """Train one method once."""
    data = drawn(target, options)
    cut, clustering = (one_piece(data), 0.0) if method in SINGLE else clustered(target, options["training"], len(data))
    own = options | ({"steps": 0} if method == "piecewise Gaussians" else {})
    sampler, cost = fitted(SINGLE.get(method, maf), data, cut, own)
    return _complete(target, method, options, sampler, cut, cost | {"clustering": clustering})


def clusterer_row(target: str, name: str, options: Row) -> Row:
    """Cut the draws of one training by a clusterer and fit the pieces, or say why it cannot."""
    data, started = drawn(target, options), time.process_time()
    try:
        cut = partition(data, seed=options["training"], **CLUSTERERS[name])
    except ValueError as error:
        return {"target": target, "method": name, **options, "failed": str(error)}
    clustering = time.process_time() - started
    sampler, cost = fitted(maf, data, cut, options)
    return _complete(target, name, options, sampler, cut, cost | {"clustering": clustering})


def _complete(target: str, method: str, options: Row, sampler: Sampler, cut: Partition, cost: Row) -> Row:
    started = time.process_time()
    points = options["grid"] * (1 if cut.pieces > 1 else 2)
    found = judged(sampler, TARGETS[target], points=points, seed=options["training"])
    cost |= {"judging": time.process_time() - started}
    return {"target": target, "method": method, **options, "k": cut.pieces, "sizes": cut.sizes} | found | cost


def process_row(clusters: int, processes: int, options: Row) -> Row:
    """Time the fit of this many clusters of the circle, without the start of the processes."""
    data = drawn("circle_of_gaussians", options)
    labels = partition(data, clusters=clusters).labels
    settings = LikelihoodSettings(
        steps=options["steps"], batch=options["batch"], patience=options["steps"], seed=options["training"]
    )
    first = torch.arange(len(data)) % 8  # enough pieces that every process has started
    for cut, own in ((first, replace(settings, steps=1)), (labels, settings)):
        started = time.perf_counter()
        fit_pieces(lambda _, part: maf(part), data, cut, settings=own, processes=processes)
    wall = {"wall": time.perf_counter() - started}
    return {"target": clusters_named(clusters), "method": processes_named(processes), **options} | wall


def clusters_named(clusters: int) -> str:
    return "1 cluster" if clusters == 1 else f"{clusters} clusters"


def processes_named(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"


MAKERS: dict[str, Callable[..., Row]] = {"table": table_row, "clusterers": clusterer_row, "processes": process_row}
Task = tuple[str, tuple[Any, ...], Row]
CLUSTERS, PROCESSES = (1, 2, 4, 8), (1, 2)
ORDER = [*TARGETS, *METHODS, *CLUSTERERS, *map(clusters_named, CLUSTERS), *map(processes_named, PROCESSES)]


def tasks(options: argparse.Namespace) -> Iterator[Task]:
    """Yield what was asked for: the part, what its maker takes, and the settings."""
    words = options.methods.split(",")
    shared = {name: getattr(options, name) for name in ("samples", "batch", "learning_rate", "grid")}
    for training in range(options.first, options.first + options.trainings):
        for target in (name for name in TARGETS if options.only in name):
            own = shared | {"steps": options.steps or STEPS[target], "training": training}
            for part, methods in (("table", METHODS), ("clusterers", tuple(CLUSTERERS))):
                if options.part in (None, part) and (part == "table" or training == 1):
                    yield from ((part, (target, name), own) for name in methods if any(word in name for word in words))
    if options.part in (None, "processes") and options.first == 1 and not (options.only or options.methods):
        for clusters in CLUSTERS:
            own = shared | {"steps": options.steps or 200, "training": 1}
            yield from (("processes", (clusters, processes), own) for processes in PROCESSES)


def make(part: str, what: tuple[Any, ...], options: Row) -> tuple[str, Row]:
    """Make one row; in a process of its own the number of threads is not the caller's."""
    torch.set_num_threads(1)
    return part, MAKERS[part](*what, options)


def made(chosen: list[Task], processes: int) -> Iterator[tuple[str, Row]]:
    """Yield rows as they come; those of wall times one after the other, when nothing else runs."""
    alone = [task for task in chosen if task[0] == "processes"]
    if processes == 1:
        alone = chosen
    else:
        with parallel_config(backend="loky", inner_max_num_threads=1):
            workers = Parallel(n_jobs=processes, batch_size=1, pre_dispatch=processes, return_as="generator_unordered")
            yield from workers(delayed(make)(*task) for task in chosen if task[0] != "processes")
    yield from (make(*task) for task in alone)


def finished(results: Row, task: Task) -> bool:
    """Return whether there is a row of the same settings."""
    part, what, options = task
    names = (clusters_named(what[0]), processes_named(what[1])) if part == "processes" else what
    wanted = {"target": names[0], "method": names[1], **options}
    return any(wanted.items() <= row.items() for row in results.get(part, []))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainings", type=int, default=10)
    parser.add_argument("--first", type=int, default=1, help="number of the first training")
    parser.add_argument("--steps", type=int, help="gradient steps of all pieces together")
    parser.add_argument("--samples", type=int, default=100000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--grid", type=int, default=400, help="points a side, even")
    parser.add_argument("--processes", type=int, default=1, help="how many rows are made at a time")
    parser.add_argument("--part", choices=tuple(MAKERS))
    parser.add_argument("--only", default="", help="targets whose name contains this word")
    parser.add_argument(
        "--methods", default="", help="methods whose name contains one of these words, parted by commas"
    )
    parser.add_argument("--again", action="store_true", help="also make rows that are there")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    results = stored(options.out)
    chosen = [task for task in tasks(options) if options.again or not finished(results, task)]
    for part, row in made(chosen, options.processes):
        keep(options.out, part, row, ORDER)
        print(json.dumps(row), flush=True)
    print((options.out / "piecewise.md").read_text())


if __name__ == "__main__":
    main()
