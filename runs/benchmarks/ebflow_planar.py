"""The parts of ebflow.py in the plane: benchmark densities, a Gaussian, and two modes over distance and widths."""

from collections.abc import Iterator, Sequence

import torch
from ebflow_rows import Row
from ebflow_targets import PLANE, Exact, Kernels, stored_grid, two_modes
from ebflow_training import LOSSES, Learning, learn, make_loss
from torch import Tensor

from latticeflow.flows import Clamp, Dense, Sequential, coupling_flow
from latticeflow.priors import Normal
from latticeflow.samplers import EBFlowSampler, standardised
from latticeflow.streams import stream
from latticeflow.training.score import DIFFERENCE, NOISE, WIDTHS

COUPLINGS, HIDDEN, BATCH, STEPS, RATE = 8, (64, 64), 256, 500, 2e-3
DRAWN = "checkerboard"
"""Whose densities are stored for the figure."""
SEPARATIONS, BETWEEN, SCAN = (2.0, 6.0, 10.0), 2.0, (0.2, 0.4, 0.8)
MODE_STEPS, GAUSSIAN_STEPS, GAUSSIAN_BATCH, GAUSSIAN_RATE = 600, 1000, 4096, 1e-2
COVARIANCE = ((1.0, 0.6), (0.6, 0.5))
USUAL = {"denoising": NOISE, "finite_difference": DIFFERENCE}
GAUSSIAN = (
    ("likelihood", (None,)),
    ("sliced", (None,)),
    ("denoising", (0.1, 0.3, 1.0)),
    ("finite_difference", (0.1, 0.3, 1.0)),
)


def planar_sampler(target: Kernels, seed: int) -> EBFlowSampler:
    """Return eight affine couplings, a matrix after every two, at the place and width of the target."""
    torch.manual_seed(seed)
    settings = {"hidden": HIDDEN, "conditioner": "dense", "clamp": Clamp("tanh")}
    layers = coupling_flow((2,), layers=COUPLINGS, **settings).layers
    pairs = [layer for k in range(0, COUPLINGS, 2) for layer in (*layers[k : k + 2], Dense((2,)))]
    flow = standardised(Sequential(pairs), Normal((2,)), target.sample(10000, stream(0, "scale")).float())
    return EBFlowSampler(flow.prior, flow.flow)


def drawn(target: Kernels, step: int, seed: int) -> Tensor:
    return target.sample(BATCH, stream(seed, f"draws of {target.theory}", step)).float()


def learned(known: Exact, loss: str, width: float | None, seed: int, steps: int) -> tuple[EBFlowSampler, Row]:
    """Train once, in float32, on fresh draws; judge by the grid."""
    sampler = planar_sampler(known.target, seed)
    widths = {name: width for name, owner in WIDTHS.items() if owner == loss}
    found = learn(
        sampler,
        lambda step: drawn(known.target, step, seed),
        make_loss(loss, action=known.target, **widths),
        lambda sampler: 0.0,
        Learning(steps, RATE, points=1),
        seed=seed,
    )
    del found["curve"]
    return sampler, found | known.divergences(sampler)


def planar_rows(losses: Sequence[str], seeds: range, steps: float, only: str) -> Iterator[tuple[str, Row]]:
    """Yield what every loss finds on every target; the densities of one of them are stored once."""
    for name in (name for name in PLANE if only in name):
        known = Exact(PLANE[name]())
        for seed in seeds:
            for loss in losses:
                sampler, found = learned(known, loss, USUAL.get(loss), seed, round(steps * STEPS))
                row = {"target": name, "loss": loss, "seed": seed, **found}
                if name == DRAWN and seed == 1:
                    row["density"] = stored_grid(lambda x, q=sampler: q.log_prob(x.float()).double())
                    if loss == LOSSES[0]:
                        row["exact_density"] = stored_grid(known.target.log_density)
                yield "plane", row


def gaussian_rows(losses: Sequence[str], seeds: range, steps: float, only: str) -> Iterator[tuple[str, Row]]:
    """Yield how far the precision that each loss learns is from its minimiser's, and that from the exact one.

    The minimiser is the precision itself for likelihood, sliced and, a Gaussian's energy being quadratic, finite
    differences of any width; for denoising that of the smoothed density, `(Sigma + sigma^2)^-1`.
    """
    covariance = torch.tensor(COVARIANCE, dtype=torch.float64)
    root = torch.linalg.cholesky(covariance)
    for loss, widths in GAUSSIAN if only in "gaussian" else ():
        for width in widths if loss in losses else ():
            for seed in seeds:
                torch.manual_seed(seed)
                sampler = EBFlowSampler(Normal((2,)), Sequential([Dense((2,))])).double()

                def draw(step: int, seed: int = seed) -> Tensor:
                    normal = torch.randn(GAUSSIAN_BATCH, 2, generator=stream(seed, "normal", step), dtype=root.dtype)
                    return normal @ root.T

                own = {name: width for name, owner in WIDTHS.items() if owner == loss}
                how = Learning(round(steps * GAUSSIAN_STEPS), GAUSSIAN_RATE, points=1)
                found = learn(sampler, draw, make_loss(loss, **own), lambda sampler: 0.0, how, seed=seed)
                weight = sampler.flow.layers[0].weight.detach()
                precision = weight.T @ weight
                smoothing = width**2 if loss == "denoising" else 0.0
                expected = torch.linalg.inv(covariance + smoothing * torch.eye(2, dtype=root.dtype))
                yield (
                    "gaussian",
                    {
                        "loss": loss,
                        "width": width,
                        "seed": seed,
                        "predicted_kl": gaussian_kl(covariance, expected),
                        "kl": gaussian_kl(covariance, precision),
                        "error": relative(precision, expected),
                        "bias": relative(precision, torch.linalg.inv(covariance)),
                        "seconds": found["seconds"],
                    },
                )


def gaussian_kl(covariance: Tensor, precision: Tensor) -> float:
    """Return `KL(N(0, covariance) || N(0, 1 / precision)) = (tr(P C) - n - log det(P C)) / 2`."""
    product = precision @ covariance
    return 0.5 * float(product.trace() - len(product) - torch.linalg.slogdet(product).logabsdet)


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the largest relative deviation of `x^T P x` over all directions x."""
    half = torch.linalg.inv(torch.linalg.cholesky(expected))
    return float((torch.linalg.eigvalsh(half @ found @ half.T) - 1).abs().max())


def mode_rows(losses: Sequence[str], seeds: range, steps: float, only: str) -> Iterator[tuple[str, Row]]:
    """Yield the weight of the left mode over the distance and, at one distance, divergences over the widths."""
    if only not in "modes":
        return
    cases = [(separation, loss, USUAL.get(loss)) for separation in SEPARATIONS for loss in losses if loss != "explicit"]
    cases += [(BETWEEN, loss, width) for loss in losses for width in SCAN if loss in USUAL]
    known = {separation: Exact(two_modes(separation)) for separation in SEPARATIONS}
    for separation, loss, width in dict.fromkeys(cases):
        for seed in seeds:
            _, found = learned(known[separation], loss, width, seed, round(steps * MODE_STEPS))
            smoothed = smoothed_kl(known[separation], width) if loss == "denoising" else None
            yield (
                "modes",
                {"separation": separation, "loss": loss, "width": width, "seed": seed}
                | found
                | {"smoothed_kl": smoothed},
            )


def smoothed_kl(known: Exact, noise: float) -> float:
    """Return KL(p||q), q being p after a convolution with the noise: what denoising tends to."""
    target = known.target
    widths = tuple((target.widths**2 + noise**2).sqrt().tolist())
    smooth = Exact(Kernels(target.theory, target.nodes, widths, target.weights))
    return known.mean(known.log_p - smooth.log_p)
