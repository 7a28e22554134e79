"""What everything else costs: layers of every kind, priors, determinants, training steps, chains, analysis, storage.

    OMP_NUM_THREADS=1 python runs/benchmarks/suite.py [--only WORD] [--repeats 7] [--limit 6] [--threads 1] [--again]
        [--device cuda]

Milliseconds per configuration, medians of CPU seconds (with --device cuda of the wall), the works of a row in turn; in
brackets the ratio to the first row of the group. 8x8 lattices, batch 64, flows of 8 layers in float32, chains and
determinants in double precision. Rows go to results/suite.json and results/suite.md beside this file as they come.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rows import RESULTS, Results, Row, Tables, aligned, measured_on
from timing import Clock, Work, machine, medians, peak_megabytes

from latticeflow.actions import HolonomyMarginal, SchwingerAction
from latticeflow.config import load_config
from latticeflow.config.building import build_kernel, build_sampler, build_trainer
from latticeflow.dirac import log_abs_det
from latticeflow.flows import (
    LOFT,
    Bijection,
    ElementwiseAffine,
    Sequential,
    autoregressive_flow,
    coupling_flow,
    gauge_flow,
    glow,
    linear_flow,
)
from latticeflow.mcmc import Winding
from latticeflow.priors import FreeField, HaarUniform, Normal, Prior, QuenchedSectors, QuenchedU1, StudentT
from latticeflow.stats import blocking, ess, gamma_many, gamma_method, jackknife, pareto_k, split_r_hat
from latticeflow.storage import Ensemble
from latticeflow.streams import stream

FOLDER = Path(__file__).parents[1]
SHAPE, BATCH, LAYERS, KAPPA = (8, 8), 64, 8, 0.276
SMOOTH = ((0.79, 4.1), (0.21, 0.4))
Works = Mapping[str, Work]


@dataclass(frozen=True)
class Case:
    """A row: `prepare(device)` returns the works that are timed, each for `count` configurations."""

    group: str
    name: str
    prepare: Callable[[str], Works]
    count: int = BATCH


def flow_works(flow: Callable[[], Bijection], prior: Prior, device: str) -> Works:
    """Return both directions without a graph, and the gradient of a draw."""
    torch.manual_seed(1)
    built = flow().to(device, torch.float32)
    z = prior.sample(BATCH, stream(1, "suite")).to(device, torch.float32)

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return built(z)[0]

    x = forward()

    @torch.no_grad()
    def inverse() -> None:
        built.inverse(x)

    def gradient() -> None:
        field, log_det = built(z)
        (field.square().sum() + log_det.sum()).backward()
        built.zero_grad()

    return {"forward": forward, "inverse": inverse, "gradient": gradient}


def stabilised_end() -> Sequential:
    return Sequential([LOFT(100.0), ElementwiseAffine(SHAPE)])


GAUGE_FLOWS: dict[str, Callable[[], Bijection]] = {
    "gauge spline, global": partial(gauge_flow, SHAPE, layers=LAYERS),
    "gauge spline, local 3x3": partial(gauge_flow, SHAPE, layers=LAYERS, conditioner="local"),
    "gauge spline, local 3x3, dilations 1 2 3": partial(
        gauge_flow, SHAPE, layers=LAYERS, conditioner="local", dilations=(1, 2, 3)
    ),
    "gauge spline, global, 16 bins": partial(gauge_flow, SHAPE, layers=LAYERS, bins=16),
    "sector coupling, global": partial(gauge_flow, SHAPE, layers=LAYERS, keep_charge=True),
    "sector coupling, local 3x3": partial(gauge_flow, SHAPE, layers=LAYERS, keep_charge=True, conditioner="local"),
}
COUPLING = partial(coupling_flow, SHAPE, layers=LAYERS)
REAL_FLOWS: dict[str, Callable[[], Bijection]] = {
    "affine, convolution": COUPLING,
    "affine, convolution, stripes": partial(COUPLING, mask="stripes"),
    "affine, convolution, z2": partial(COUPLING, odd=True),
    "affine, dense": partial(COUPLING, conditioner="dense"),
    "affine, dense, random mask": partial(COUPLING, conditioner="dense", mask="random"),
    "spline, convolution": partial(COUPLING, transform="spline"),
    "spline, convolution, z2": partial(COUPLING, transform="spline", odd=True),
    "spline, dense": partial(COUPLING, transform="spline", conditioner="dense"),
    "LOFT and elementwise affine": stabilised_end,
    "autoregressive, 6 blocks": partial(autoregressive_flow, SHAPE),
    "linear, 3 dense, leaky ReLU": partial(linear_flow, SHAPE, layers=3),
    "linear, 3 triangular, leaky ReLU": partial(linear_flow, SHAPE, layers=3, linear="lu"),
    "linear, 3 convolutions, leaky ReLU": partial(linear_flow, SHAPE, layers=3, linear="convolution"),
    "linear, 3 convolutions, cubic, z2": partial(
        linear_flow, SHAPE, layers=3, linear="convolution", activation="cubic", odd=True
    ),
    "Glow, 2 levels of 4 steps": partial(glow, SHAPE, levels=2, steps=4, hidden=32, periodic=True),
}
PRIORS: dict[str, Callable[[], Prior]] = {
    "Haar": lambda: HaarUniform(SHAPE),
    "quenched": lambda: QuenchedU1(2.0, SHAPE),
    "quenched, smooth sector factor": lambda: QuenchedU1(2.38, SHAPE, smooth_sector=SMOOTH),
    "quenched by sectors": lambda: QuenchedSectors(2.38, SHAPE),
    "normal": lambda: Normal(SHAPE),
    "free field": lambda: FreeField(SHAPE, 0.67),
    "student-t": lambda: StudentT(SHAPE),
}


def prior_works(prior: Callable[[], Prior], device: str) -> Works:
    built, generator = prior(), stream(1, "suite")
    x = built.sample(BATCH, generator)
    return {"draw": lambda: built.sample(BATCH, generator), "density": lambda: built.log_prob(x)}


def determinant_works(size: int, batch: int, method: str, device: str) -> Works:
    links = QuenchedU1(2.0, (size, size)).sample(batch, stream(1, "suite")).to(device)

    @torch.no_grad()
    def forward() -> None:
        log_abs_det(links, KAPPA, method)

    def gradient() -> None:
        leaf = links.clone().requires_grad_()
        torch.autograd.grad(log_abs_det(leaf, KAPPA, method)[0].sum(), leaf)

    return {"forward": forward, "gradient": gradient}


def orbit_works(grid: tuple[int, int], device: str) -> Works:
    links, action = QuenchedU1(2.0, SHAPE).sample(BATCH, stream(1, "suite")).to(device), SchwingerAction(2.0, KAPPA)
    marginal = HolonomyMarginal(action, grid)

    @torch.no_grad()
    def forward() -> None:
        marginal(links)

    return {"forward": forward, "gradient": lambda: marginal.force(links)}


def training_works(file: str, overrides: Sequence[str], device: str) -> Works:
    config = load_config(FOLDER / f"{file}.toml", [f"run.device={device}", f"training.batch={BATCH}", *overrides])
    return {"step": build_trainer(config, build_sampler(config)).trial_step}


def chain_works(file: str, overrides: Sequence[str], device: str) -> Works:
    own = [f"run.device={device}", f"chain.replica={BATCH}"]
    config = load_config(FOLDER / f"{file}.toml", [*own, *overrides])
    kernel, generator = build_kernel(config, build_sampler(config)), stream(1, "suite", device=device)
    state = kernel.start(BATCH, generator)
    return {"step": lambda: kernel.step(state, generator)}


def winding_works(device: str) -> Works:
    prior, generator = QuenchedU1(2.0, SHAPE), stream(1, "suite", device=device)
    kernel = Winding(SchwingerAction(2.0, KAPPA), prior)
    state = kernel.start(BATCH, generator)
    return {"step": lambda: kernel.step(state, generator)}


SCHWINGER = "schwinger-8x8"
BARE = "action.holonomies=[1,1]"
TRAINING: dict[str, tuple[str, list[str]]] = {
    "Schwinger, path": (SCHWINGER, []),
    "Schwinger, reparametrisation": (SCHWINGER, ["training.estimator=reparametrisation"]),
    "Schwinger, REINFORCE": (SCHWINGER, ["training.estimator=reinforce"]),
    "Schwinger by sectors, path": ("piecewise-schwinger-sectors", []),
    "U(1), path": ("u1-8x8", []),
    "phi^4, stabilised, path": ("phi4-8x8", []),
    "phi^4, energy-based, explicit score": ("ebflow-phi4", []),
    "funnel, stabilised, path": ("funnel", []),
}
CHAINS: dict[str, tuple[str, list[str]]] = {
    "independence": (SCHWINGER, [BARE]),
    "independence, orbits 6x3": (SCHWINGER, []),
    "independence by sectors, orbits 6x3": ("piecewise-schwinger-sectors", []),
    "HMC, 10 Omelyan steps": (SCHWINGER, [BARE, 'chain.kernels=["hmc"]']),
    "HMC, 10 leapfrog steps": (SCHWINGER, [BARE, 'chain.kernels=["hmc"]', "chain.hmc.integrator=leapfrog"]),
    "HMC in the latent space": (SCHWINGER, [BARE, 'chain.kernels=["flow_hmc"]']),
    "composite: independence and HMC": (SCHWINGER, [BARE, 'chain.kernels=["independence","hmc"]']),
    "composite: HMC and winding, orbits 6x3": (SCHWINGER, ['chain.kernels=["hmc","winding"]']),
    "U(1), HMC": ("u1-8x8", ['chain.kernels=["hmc"]']),
    "phi^4, independence": ("phi4-8x8", []),
    "phi^4, HMC": ("phi4-8x8", ['chain.kernels=["hmc"]']),
}
SAMPLES, COLUMNS = 200_000, 20


def analysis_works(name: str, device: str) -> Works:
    rng = np.random.default_rng(1)
    noise, chains = rng.normal(size=SAMPLES), rng.normal(size=(BATCH, SAMPLES // BATCH))
    works: dict[str, Work] = {
        "Gamma method": lambda: gamma_method(noise),
        "Gamma method, 64 replica": lambda: gamma_method(chains),
        f"Gamma method, {COLUMNS} columns": lambda: gamma_many(noise.reshape(-1, COLUMNS)),
        "blocking": lambda: blocking(noise),
        "jackknife, 100 blocks": lambda: jackknife(np.mean, noise, block=SAMPLES // 100),
        "R-hat, 64 replica": lambda: split_r_hat(chains),
        "ESS": lambda: ess(noise),
        "Pareto k": lambda: pareto_k(noise),
    }
    return {"": works[name]}


ANALYSIS = (
    "Gamma method",
    "Gamma method, 64 replica",
    f"Gamma method, {COLUMNS} columns",
    "blocking",
    "jackknife, 100 blocks",
)
ANALYSIS = (*ANALYSIS, "R-hat, 64 replica", "ESS", "Pareto k")
BLOCK, ROOM = 32, 400


def storage_works(folder: Path, device: str) -> Works:
    """Return appending a block of 64 chains, reading it back, and checking the whole file of one block."""
    links = np.random.default_rng(1).uniform(-np.pi, np.pi, (BATCH, BLOCK, 2, *SHAPE))
    settings = {"theory": "u1", "lattice_shape": SHAPE, "config": "", "fields": {"links": (links.shape[2:], float)}}
    growing, fixed = (
        Ensemble.create(folder / name, chains=BATCH, draws=draws, block=BLOCK, **settings)
        for name, draws in (("growing.h5", BLOCK * ROOM), ("fixed.h5", BLOCK))
    )
    fixed.append(fields={"links": links})
    return {
        "append": lambda: growing.append(fields={"links": links}),
        "read": lambda: fixed.field("links"),
        "verify": fixed.verify,
    }


def cases(folder: Path, device: str) -> Iterator[Case]:
    """Yield all rows; what works on the CPU alone is left out on another device."""
    yield from device_cases()
    if device == "cpu":
        yield from cpu_cases(folder)


def device_cases() -> Iterator[Case]:
    for name, flow in GAUGE_FLOWS.items():
        yield Case("gauge flows", name, partial(flow_works, flow, QuenchedU1(2.0, SHAPE)))
    for name, flow in REAL_FLOWS.items():
        yield Case("flows of real fields", name, partial(flow_works, flow, Normal(SHAPE)))
    for size, batch, method in ((8, 64, "cyclic"), (4, 64, "cyclic"), (16, 16, "cyclic"), (8, 64, "dense")):
        name = f"{size}x{size}, {method}"
        yield Case("determinant", name, partial(determinant_works, size, batch, method), batch)
    for grid in ((3, 2), (6, 3)):
        yield Case("determinant", f"8x8, orbit of {grid[0]}x{grid[1]}", partial(orbit_works, grid))
    for group, entries, prepare in (("training", TRAINING, training_works), ("chains", CHAINS, chain_works)):
        for name, (file, overrides) in entries.items():
            yield Case(group, name, partial(prepare, file, overrides))
    yield Case("chains", "winding", winding_works)


def cpu_cases(folder: Path) -> Iterator[Case]:
    for name, prior in PRIORS.items():
        yield Case("priors", name, partial(prior_works, prior))
    for name in ANALYSIS:
        yield Case("analysis", name, partial(analysis_works, name), SAMPLES)
    yield Case("storage", "8x8, blocks of 64 x 32", partial(storage_works, folder), BATCH * BLOCK)


def measure(case: Case, options: argparse.Namespace) -> Row:
    works = case.prepare(options.device)
    seconds = medians(works, Clock(options.device), repeats=options.repeats, limit=options.limit / len(works))
    return {
        "group": case.group,
        "name": case.name,
        "device": options.device,
        "count": case.count,
        "milliseconds": {name: 1e3 * value / case.count for name, value in seconds.items()},
        "megabytes": max(peak_megabytes(work, options.device) for work in works.values()),
    }


def markdown(tables: Tables) -> str:
    lines: list[str] = []
    rows = tables["suite"]
    for group, device in dict.fromkeys((row["group"], row["device"]) for row in rows):
        own = [row for row in rows if (row["group"], row["device"]) == (group, device)]
        works = list(dict.fromkeys(name for row in own for name in row["milliseconds"]))
        head = [f"{group}, {device}", *(f"{name} ms".strip() for name in works), "peak MB"]
        lines += aligned("|".join(head), ([row["name"], *cells(row, own[0], works)] for row in own))
    return "\n".join([*lines, f"Per configuration, of the analysis per sample. {measured_on(tables)}"]) + "\n"


def cells(row: Row, first: Row, works: list[str]) -> Iterator[str]:
    for name in works:
        value, reference = row["milliseconds"].get(name), first["milliseconds"].get(name)
        ratio = f" ({value / reference:.2f})" if value and reference else ""
        yield "" if value is None else f"{value:.3g}{ratio}"
    yield f"{row['megabytes']:.1f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a word in the group or the name")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--limit", type=float, default=6.0, help="seconds of a row after which it gets no more turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    results = Results("suite", {"suite": ("group", "name", "device")}, markdown, machine(options.device), options.out)
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(Path(folder), options.device):
            done = results.has("suite", group=case.group, name=case.name, device=options.device)
            if options.only in f"{case.group} {case.name}" and (options.again or not done):
                results.keep("suite", measure(case, options))
    print(markdown(results.tables()))


if __name__ == "__main__":
    main()
