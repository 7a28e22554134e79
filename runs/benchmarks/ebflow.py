"""Energy-based flows: cost of a step, quality against CPU time, and bias of score losses, beside maximum likelihood.

    OMP_NUM_THREADS=1 python runs/benchmarks/ebflow.py --part cost|digits|plane|bias|linear|synthetic [--seeds 3]
        [--first 1] [--only WORD] [--losses sliced,...] [--steps 1.0] [--largest 2048] [--repeats 5] [--batches 50,...]

"cost" is the CPU time of one gradient of the fully connected flow of arXiv:2305.15267, dense W and a smooth leaky ReLU
twice, of D variables, float32, medians of repeats in which the losses take turns; "explicit" is against the force of
independent normals. What does not depend on the loss, the optimiser's step, is left out.

"digits" learns the digits of scikit-learn by W, a smooth leaky ReLU of slope 0.7 or 0.3, and W, behind logits and an
affine map to mean 0 and variance 1. They are made continuous by a normal of width 1/2, after which the density is
smooth, as score losses assume; after uniform noise it jumps. The score is matched of the grey levels, of the logits
("match after preprocessing"), or of these with mean 0 and variance 1. Every loss takes equal steps; the held-out fifth
is judged with the last weights and with their averages.

"plane" learns three densities of the plane after those of arXiv:2305.15267, convolved with a normal of width
0.375. Each is a mixture of 1000 to 3200 normals around regular points of its curve or squares, which is what the
samples are drawn from: density and score are exact. Divergences are sums over a grid. "bias" learns a Gaussian, where
the minimiser of every loss is known, and two modes of weights 0.3 and 0.7, over their distance and over the widths of
the losses; the prediction for denoising is p after a convolution with its noise.

"linear" learns the free field by its force with dense, triangular and circulant matrices, and the digits with them.
"synthetic" learns 40000 draws of a Gaussian of 1024 correlated variables by one matrix: the gap is the mean of log p -
log q over 2000 more. All losses have equal CPU seconds and the same three constant rates, batches of 32.

Rows go to results/ebflow.json and results/ebflow.md beside this file as they come; several runs may write at a time.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from ebflow_planar import gaussian_rows, mode_rows, planar_rows
from ebflow_rows import Row, keep
from ebflow_targets import Correlated, digits
from ebflow_training import LOSSES, Learning, epochs, fully_connected, learn, make_loss, negative_log_likelihood

from latticeflow.actions import ScalarAction
from latticeflow.flows import Bijection, Logit, Sequential, linear_flow
from latticeflow.flows.linear import LINEAR
from latticeflow.priors import Normal
from latticeflow.samplers import EBFlowSampler, Sampler, standardised
from latticeflow.stats import ess
from latticeflow.streams import stream
from latticeflow.training import SCORE_LOSSES, held_out_split, train

RESULTS = Path(__file__).parent / "results"
DIMENSIONS = (64, 128, 256, 512, 1024, 2048)
IMAGE, BATCH, DIGIT_STEPS, DIGIT_RATE, SLOPES = (8, 8), 100, 1500, 3e-3, (0.7, 0.3)
BOUNDS = (-4.0, 20.0)
MATCHED = ("standard logits", "logits", "grey levels")
FREE, LATTICE = ScalarAction(1.25, 0.0), (8, 8)
FREE_SETTINGS = {"dense": (1e-2, 1000), "lu": (1e-3, 1500), "convolution": (3e-3, 1500)}
SYNTHETIC, BUDGET, SYNTHETIC_RATES, SYNTHETIC_BATCH, POOL, HELD_OUT = 1024, 30.0, (1e-4, 3e-4, 1e-3), 32, 40000, 2000


@dataclass(frozen=True)
class Digits:
    """How the digits are learned: the slope and the linear layers, the loss, and the variable of the score."""

    slope: float
    linear: str
    loss: str
    matched: str = MATCHED[0]


def cost_rows(options: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    """Yield the time of a gradient by batch, dimension and loss."""
    for batch in map(int, options.batches.split(",")):
        for dimension in (d for d in DIMENSIONS if d <= options.largest):
            torch.manual_seed(1)
            sampler = EBFlowSampler(Normal((dimension,)), fully_connected((dimension,)))
            x, weights = torch.randn(batch, dimension), list(sampler.parameters())
            losses = {name: make_loss(name, action=ScalarAction(0.5, 0.0)) for name in LOSSES}
            taken: dict[str, list[float]] = {name: [] for name in losses}
            for repeat in range(1 + options.repeats * max(1, min(4, AT_LEAST // dimension))):
                for name, loss in losses.items():
                    sampler.zero_grad()
                    started = time.process_time()
                    loss(sampler, x, stream(1, "cost", repeat)).mean().backward(inputs=weights)
                    taken[name].append(time.process_time() - started)
            found = {name: median(seconds[1:]) for name, seconds in taken.items()}
            for name, seconds in found.items():
                row = {"batch": batch, "D": dimension, "loss": name, "milliseconds": 1e3 * seconds}
                yield "cost", row | {"ratio": found[LOSSES[0]] / seconds}


def digit_sampler(data: torch.Tensor, case: Digits, seed: int) -> EBFlowSampler:
    """Return the flow of digits; what is before the variable whose score is matched is its preprocessing."""
    torch.manual_seed(seed)
    logit: Bijection = Logit(*BOUNDS)
    flow = linear_flow(IMAGE, linear=case.linear, slope=case.slope)
    inner = standardised(flow, Normal(IMAGE), logit.inverse(data)[0])
    flow, affine = inner.flow.layers
    if case.matched == "standard logits":
        before = Sequential([affine.requires_grad_(requires_grad=False), logit])
        return EBFlowSampler(inner.prior, flow, preprocessing=before)
    if case.matched == "logits":
        return EBFlowSampler(inner.prior, inner.flow, preprocessing=logit)
    return EBFlowSampler(inner.prior, Sequential([flow, affine, logit]))


def digit_row(case: Digits, seed: int, options: argparse.Namespace) -> Row:
    """Learn the digits once."""
    data = digits().float()
    training, held_out = (data[part] for part in held_out_split(len(data), validation=0.2, seed=seed))
    sampler, how = digit_sampler(training, case, seed), Learning(round(options.steps * DIGIT_STEPS), DIGIT_RATE)

    def judge(sampler: Sampler) -> float:
        return negative_log_likelihood(sampler, held_out)

    found = learn(sampler, epochs(training, BATCH, seed), make_loss(case.loss), judge, how, seed=seed)
    return asdict(case) | {"seed": seed} | found


def digit_rows(options: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    """Yield the likelihood, which has no such variable, and score losses of three."""
    for seed in seeds(options):
        for slope in SLOPES:
            for loss in (loss for loss in options.losses if loss != "explicit"):
                for matched in MATCHED if loss in SCORE_LOSSES and slope == SLOPES[0] else MATCHED[:1]:
                    yield "digits", digit_row(Digits(slope, "dense", loss, matched), seed, options)


@torch.no_grad()
def spectrum_error(sampler: EBFlowSampler) -> float:
    """Return the largest relative error of the eigenvalues of the precision `W^T W`, against those of the free field.

    These are `2 (m2 + khat^2)`; the matrix of the action is its force.
    """
    unit = torch.eye(64).reshape(64, *LATTICE)
    w = sampler.flow.varying_inverse(unit)[0].flatten(1).double()
    exact = -FREE.force(unit.double()).flatten(1)
    root = torch.linalg.cholesky(exact)
    half = torch.linalg.solve_triangular(root, w, upper=False)
    return float((torch.linalg.svdvals(half) ** 2 - 1).abs().max())


def free_row(linear: str, seed: int, options: argparse.Namespace) -> Row:
    """Learn the free field by its force once."""
    rate, steps = FREE_SETTINGS[linear]
    torch.manual_seed(seed)
    flow = linear_flow(LATTICE, layers=1, linear=linear, odd=True, activation="cubic")
    sampler, started = EBFlowSampler(Normal(LATTICE), flow), time.process_time()
    steps = round(options.steps * steps)
    train(sampler, FREE, "explicit", steps=steps, learning_rate=rate, batch=128, gradient_clip=None, seed=seed)
    seconds = time.process_time() - started
    with torch.no_grad():
        x, log_q = sampler.sample(10000, stream(seed, "proposals"))
        size = ess((-FREE(x.double()) - log_q).numpy())
    names = {"linear": linear, "rate": rate, "seed": seed, "steps": steps}
    return names | {"error": spectrum_error(sampler), "ess": size, "seconds": seconds}


def linear_rows(options: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    for seed in seeds(options):
        for linear in (name for name in LINEAR if options.only in name):
            yield "linear", free_row(linear, seed, options)
            for loss in ("likelihood", "sliced") if linear != "dense" else ():  # dense ones are those of "digits"
                yield "digits", digit_row(Digits(SLOPES[0], linear, loss), seed, options)


def synthetic_rows(options: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    """Yield the gaps of the losses, all with the same CPU seconds."""
    dimension = min(SYNTHETIC, options.largest)
    target = Correlated(dimension)
    held_out = target.sample(HELD_OUT, stream(0, "held out"))
    data, log_p = target.sample(POOL, stream(0, "draws")).float(), target.log_prob(held_out)

    @torch.no_grad()
    def gap(sampler: Sampler) -> float:
        return float((log_p - sampler.log_prob(held_out.float())).mean())

    for rate in SYNTHETIC_RATES:
        for loss in (loss for loss in options.losses if loss != "explicit"):
            torch.manual_seed(options.first)
            sampler = EBFlowSampler(Normal((dimension,)), linear_flow((dimension,), layers=1))
            how = Learning(10**6, rate, decay="none", budget=options.steps * BUDGET)
            draw = epochs(data, SYNTHETIC_BATCH, options.first)
            found = learn(sampler, draw, make_loss(loss), gap, how, seed=options.first)
            yield "synthetic", {"D": dimension, "loss": loss, "rate": rate, "seed": options.first} | found


def seeds(options: argparse.Namespace) -> range:
    return range(options.first, options.first + options.seeds)


def bias_rows(options: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    yield from gaussian_rows(options.losses, seeds(options)[:1], options.steps, options.only)
    yield from mode_rows(options.losses, seeds(options)[:1], options.steps, options.only)


PARTS = {
    "cost": cost_rows,
    "digits": digit_rows,
    "plane": lambda options: planar_rows(options.losses, seeds(options), options.steps, options.only),
    "bias": bias_rows,
    "linear": linear_rows,
    "synthetic": synthetic_rows,
}
AT_LEAST = 1024
"""Small flows are timed up to four times as often."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=tuple(PARTS), help="all of them without it")
    parser.add_argument("--seeds", type=int, default=3, help="bias and synthetic take the first of them alone")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--only", default="", help="targets, or linear layers, whose name contains this word")
    parser.add_argument("--losses", default=",".join(LOSSES), type=lambda text: text.split(","))
    parser.add_argument("--steps", type=float, default=1.0, help="a factor of the number of steps, or of the budget")
    parser.add_argument("--largest", type=int, default=DIMENSIONS[-1], help="the largest D")
    parser.add_argument("--batches", default="32,100", help="of the costs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rate", type=float, default=SYNTHETIC_RATES, help="learning rate of the synthetic target")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in (options.part,) if options.part else PARTS:
        for part, row in PARTS[name](options):
            print(json.dumps({key: value for key, value in row.items() if key not in ("curve", "density")}), flush=True)
            keep(options.out, part, row)
    print((options.out / "ebflow.md").read_text())


if __name__ == "__main__":
    main()
