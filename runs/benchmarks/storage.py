"""What storing costs: the parts of a block's way to the disk against the time to compute it, and speeds of the file.

    OMP_NUM_THREADS=1 python runs/benchmarks/storage.py [--blocks 5] [--repeats 4] [--folder .] [--threads 1]

HMC on 8x8 at beta 2, kappa 0.276 with the default chains and block; blocks are computed and stored in turn, as a run
does it, in a temporary folder in ``--folder``, whose disk is what is measured. Larger lattices hold random numbers.
Reading checks every chunk's fletcher32; what was just written is read from memory. Writes results/storage.json and
results/storage.md beside this file.
"""

import argparse
import functools
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from latticeflow.cli.chains import run_block
from latticeflow.cli.folder import RunFolder
from latticeflow.cli.sampling import create_ensemble
from latticeflow.config import load_config
from latticeflow.config.building import build_kernel, build_sampler
from latticeflow.mcmc import Kernel
from latticeflow.storage import Ensemble, provenance
from latticeflow.streams import stream

RESULTS = Path(__file__).parent / "results"
CONFIG = Path(__file__).parents[1] / "schwinger-8x8.toml"
TUNING = 10
SIZES = (16, 32)
PARTS = ("rows", "fsyncs of the rows", "checkpoint", "status", "acceptance so far")
Result = TypeVar("Result")


class Clock:
    """Wall and CPU seconds by name, a list of measurements each."""

    def __init__(self) -> None:
        self.times: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def measure(self, name: str, work: Callable[[], Result]) -> Result:
        """Return what the work returns and note how long it took."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        self.times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
        return result

    def medians(self, name: str) -> dict[str, float]:
        wall, cpu = np.median(self.times[name], axis=0)
        return {"wall": float(wall), "cpu": float(cpu)}


@contextmanager
def timed_fsync(clock: Clock, name: str) -> Iterator[None]:
    """Note the sum of the fsyncs within the block as one measurement."""
    fsync, inner = os.fsync, Clock()
    os.fsync = lambda descriptor: inner.measure("fsync", lambda: fsync(descriptor))
    try:
        yield
    finally:
        os.fsync = fsync
        wall, cpu = np.sum(inner.times["fsync"], axis=0)
        clock.times[name].append((float(wall), float(cpu)))


def against_hmc(folder: Path, blocks: int, threads: int) -> dict[str, object]:
    """Return seconds to compute a block, of each part of storing it, and of making the file."""
    config = load_config(CONFIG, ['chain.kernels=["hmc"]', f"run.threads={threads}"])
    run, clock = RunFolder.create(folder / "run", config, resume=False), Clock()
    kernel, generator = build_kernel(config, build_sampler(config)), stream(1, "benchmark")
    state = kernel.start(config.chain.replica, generator)
    for _ in range(TUNING):
        state, info = kernel.step(state, generator)
        kernel.tune(info)
    clock.measure("creation", lambda: create_ensemble(run, kernel))
    with run.ensemble("a") as ensemble:
        for _ in range(min(blocks, ensemble.draws // ensemble.block)):
            work = functools.partial(run_block, kernel, state, ensemble.block, generator)
            state, rows, _ = clock.measure("HMC", work)
            store(clock, run, kernel, ensemble, rows, vars(state))
        links = ensemble.chains * ensemble.draws * int(np.prod(ensemble.field("links").shape[2:])) * 8
        report = {name: clock.medians(name) for name in ("creation", "HMC", *PARTS)}
        report["total"] = {kind: sum(report[part][kind] for part in PARTS) for kind in ("wall", "cpu")}
        sizes = {"replica": ensemble.chains, "block": ensemble.block, "draws": ensemble.draws}
    return {"seconds": report, **sizes, "blocks": blocks, "bytes": run.ensemble_file.stat().st_size, "raw_bytes": links}


def store(clock: Clock, run: RunFolder, kernel: Kernel, ensemble: Ensemble, rows: dict, state: dict) -> None:
    """Do what a run does with every block, each part on the clock."""
    with timed_fsync(clock, "fsyncs of the rows"):
        done = clock.measure("rows", lambda: ensemble.append(**rows))
    both, synced = clock.times["rows"].pop(), clock.times["fsyncs of the rows"][-1]
    clock.times["rows"].append((both[0] - synced[0], both[1] - synced[1]))
    contents = {"state": state, "parameters": kernel.parameters, "thermalised": TUNING, "draws": done, "bad": 0}
    clock.measure("checkpoint", lambda: run.save_checkpoint("chain", contents, TUNING + done))
    clock.measure("status", lambda: run.status("sampling", done, ensemble.draws))
    clock.measure("acceptance so far", lambda: ensemble.history("accepted").mean())


def speeds(folder: Path, size: int, repeats: int) -> dict[str, float]:
    """Return the median speeds, MB of configurations per second, of writing blocks, reading them back and verifying."""
    settings = load_config(CONFIG).chain
    path, clock = folder / f"{size}.h5", Clock()
    rows = np.random.default_rng(1).uniform(-np.pi, np.pi, (settings.replica, settings.block, 2, size, size))
    extents = {"chains": settings.replica, "draws": settings.block * repeats, "block": settings.block}
    ensemble = Ensemble.create(
        path, theory="u1", lattice_shape=(size, size), config="", fields={"links": (rows.shape[2:], float)}, **extents
    )
    with ensemble:
        for _ in range(repeats):
            clock.measure("append", lambda: ensemble.append(fields={"links": rows}))
    with Ensemble.open(path) as ensemble:
        for number in range(repeats):
            draws = slice(number * settings.block, (number + 1) * settings.block)
            clock.measure("field", lambda draws=draws: ensemble.field("links", draws))
        for _ in range(3):
            damaged = clock.measure("verify", ensemble.verify)
    if damaged:
        raise RuntimeError(f"{path}: damaged configurations {damaged[:3]}")
    found = {name: rows.nbytes / 1e6 / clock.medians(name)["wall"] for name in ("append", "field")}
    found["verify"] = repeats * rows.nbytes / 1e6 / clock.medians("verify")["wall"]
    overhead = path.stat().st_size / (repeats * rows.nbytes) - 1
    path.unlink()
    return {"L": size, "block_MB": rows.nbytes / 1e6, **found, "overhead": overhead}


def markdown(result: dict) -> str:
    """Return the tables that are committed."""
    job, seconds = result["hmc"], result["hmc"]["seconds"]
    lines = ["| a block of 8x8 HMC | wall ms | CPU ms | of HMC's wall |", "|---|---|---|---|"]
    names = {"HMC": "computing it", **{part: part for part in PARTS}, "total": "storing it, total"}
    for key, name in (names | {"creation": "the file, once"}).items():
        wall, cpu = seconds[key]["wall"], seconds[key]["cpu"]
        lines.append(f"| {name} | {1e3 * wall:.3g} | {1e3 * cpu:.3g} | {wall / seconds['HMC']['wall']:.2%} |")
    lines += ["", "| L | append MB/s | `field` MB/s | `verify` MB/s | file over raw |", "|---|---|---|---|---|"]
    for row in result["speeds"]:
        cells = [f"{row[name]:.0f}" for name in ("append", "field", "verify")]
        lines.append(f"| {row['L']} | {' | '.join(cells)} | +{row['overhead']:.1%} |")
    machine = result["provenance"]
    lines += [
        "",
        f"{job['replica']} replica, blocks of {job['block']} draws, medians of {job['blocks']} blocks, "
        f"{result['threads']} thread(s); the 8x8 file is {job['bytes'] / job['raw_bytes']:.3f} of its links.",
        f"h5py {machine['h5py']}, torch {machine['torch']}, Python {machine['python']}, {machine['cpu_count']} cores.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        result = {
            "hmc": against_hmc(Path(name), options.blocks, options.threads),
            "speeds": [speeds(Path(name), size, options.repeats) for size in SIZES],
            "threads": options.threads,
            "provenance": {k: v for k, v in provenance().items() if k not in ("host", "command")},
        }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "storage.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "storage.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
