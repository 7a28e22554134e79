"""Cost against the lattice size: training steps, determinant with gradient, HMC trajectories, flow proposals.

    OMP_NUM_THREADS=1 python runs/benchmarks/scaling.py [--sizes 8 12 16 24 32] [--only WORD] [--repeats 5]
        [--limit 120] [--threads 1] [--device cuda] [--again]

The determinant alone goes on to 48 and 64. Seconds per configuration, medians of CPU seconds (with --device cuda of the
wall), the works of a size in turn, and the peak of memory of one call for the whole batch. Exponents of time against L
are fitted. Rows go to results/scaling.json and results/scaling.md beside this file as they come.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from rows import RESULTS, Results, Row, Tables, aligned, measured_on
from timing import Clock, Work, exponent, machine, medians, peak_megabytes
from training_models import paper_config, readme_config, trainer_of

from latticeflow.actions import SchwingerAction
from latticeflow.config.building import build_sampler
from latticeflow.dirac import log_abs_det
from latticeflow.mcmc import HMC
from latticeflow.mcmc.kernel import state_at
from latticeflow.priors import QuenchedU1
from latticeflow.streams import stream

SIZES, LARGE = (8, 12, 16, 24, 32), (48, 64)
BATCH = {8: 64, 12: 32, 16: 16, 24: 8, 32: 4, 48: 2, 64: 2}
BETA, KAPPA = 2.0, 0.276
LOCAL = ["sampler.flow.conditioner=local", "sampler.flow.hidden=[32,32]"]
DETERMINANT = "determinant with gradient"
FIT = (16, 64, 4.3)
"""Sizes between which the determinant's exponent is asked for, and its bound."""


def batch_of(size: int) -> int:
    return BATCH.get(size, 2)


def links_of(size: int, device: str) -> torch.Tensor:
    return QuenchedU1(BETA, (size, size)).sample(batch_of(size), stream(1, "scaling", size)).to(device)


def determinant(size: int, device: str) -> Work:
    links = links_of(size, device)

    def gradient() -> None:
        leaf = links.clone().requires_grad_()
        torch.autograd.grad(log_abs_det(leaf, KAPPA)[0].sum(), leaf)

    return gradient


def trajectory(size: int, device: str) -> Work:
    """Return an HMC trajectory of 10 steps, 21 forces and two actions."""
    action, generator = SchwingerAction(BETA, KAPPA), stream(1, "trajectory", device=device)
    kernel = HMC(action, QuenchedU1(BETA, (size, size)), step_size=0.1, trajectory_length=1.0)
    state = state_at(action, links_of(size, device), generator)
    return lambda: kernel.step(state, generator)


def own(size: int, device: str) -> list[str]:
    return [f"training.batch={batch_of(size)}", f"run.device={device}"]


def readme_step(size: int, device: str) -> Work:
    return trainer_of(readme_config(size, overrides=[*LOCAL, *own(size, device)])).trial_step


def paper_step(size: int, device: str) -> Work:
    return trainer_of(paper_config(size, overrides=own(size, device))).trial_step


def draw(size: int, device: str) -> Work:
    return proposal(size, device, weigh=False)


def proposal(size: int, device: str, *, weigh: bool = True) -> Work:
    """Return draws of the README's flow with local conditioners in double precision, with their weights."""
    sampler = build_sampler(readme_config(size, overrides=[*LOCAL, *own(size, device)])).double()
    action, generator = SchwingerAction(BETA, KAPPA), stream(1, "proposal", device=device)

    @torch.no_grad()
    def work() -> None:
        x, log_q = sampler.sample(batch_of(size), generator)
        if weigh:
            -action(x) - log_q

    return work


WORKS: dict[str, Callable[[int, str], Work]] = {
    DETERMINANT: determinant,
    "training step, README's model, local": readme_step,
    "training step, the paper's model": paper_step,
    "HMC trajectory": trajectory,
    "flow draw": draw,
    "flow draw with its weight": proposal,
}


def measure(size: int, names: list[str], options: argparse.Namespace) -> dict[str, Row]:
    works = {name: WORKS[name](size, options.device) for name in names}
    seconds = medians(works, Clock(options.device), repeats=options.repeats, limit=options.limit)
    return {
        name: {
            "work": name,
            "L": size,
            "device": options.device,
            "batch": batch_of(size),
            "seconds": seconds[name] / batch_of(size),
            "megabytes": peak_megabytes(works[name], options.device),
        }
        for name in names
    }


def markdown(tables: Tables) -> str:
    rows = tables["scaling"]
    sizes = sorted({row["L"] for row in rows})
    lines, verdict = [], []
    for what, name, factor in (("ms per configuration", "seconds", 1e3), ("peak MB of a batch", "megabytes", 1.0)):
        table = []
        for work, device in dict.fromkeys((row["work"], row["device"]) for row in rows):
            found = {row["L"]: factor * row[name] for row in rows if (row["work"], row["device"]) == (work, device)}
            fitted = (
                f"{exponent(list(found), list(found.values())):.2f}" if len(found) > 1 and all(found.values()) else ""
            )
            cells = [f"{found[size]:.3g}" if size in found else "" for size in sizes]
            table.append([f"{work}, {device}", *cells, fitted if name == "seconds" else ""])
        lines += aligned("|".join([what, *(f"L = {size}" for size in sizes), "exponent"]), table)
    for device in dict.fromkeys(row["device"] for row in rows):
        verdict += determinant_verdict([row for row in rows if row["device"] == device], device)
    batches = ", ".join(f"{row['batch']} at {row['L']}" for row in rows if row["work"] == DETERMINANT)
    lines += [*verdict, "", f"Batches: {batches}. {measured_on(tables)}"]
    return "\n".join(lines) + "\n"


def determinant_verdict(rows: list[Row], device: str) -> list[str]:
    """Return the exponent between the sizes for which it is asked, where these are measured."""
    low, high, bound = FIT
    found = {row["L"]: row["seconds"] for row in rows if row["work"] == DETERMINANT and low <= row["L"] <= high}
    if low not in found or high not in found:
        return []
    value = exponent(list(found), list(found.values()))
    ends = exponent([low, high], [found[low], found[high]])
    met = "met" if value <= bound else "not met"
    return [
        f"* {DETERMINANT}, complex128, {device}: exponent {value:.2f} fitted over L = {sorted(found)}, {ends:.2f} by "
        f"{low} and {high} alone; asked <= {bound}: {met}"
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--large", type=int, nargs="*", default=list(LARGE), help="sizes of the determinant alone")
    parser.add_argument("--only", default="", help="a word in the name of the work")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds after which a work gets no more turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    results = Results("scaling", {"scaling": ("work", "L", "device")}, markdown, machine(options.device), options.out)
    for size in sorted({*options.sizes, *options.large}):
        names = list(WORKS) if size in options.sizes else [DETERMINANT]
        wanted = [
            name
            for name in names
            if options.only in name
            and (options.again or not results.has("scaling", work=name, L=size, device=options.device))
        ]
        for row in measure(size, wanted, options).values():
            results.keep("scaling", row)
    print(markdown(results.tables()))


if __name__ == "__main__":
    main()
