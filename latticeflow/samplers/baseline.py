"""The training-free baseline: independent quenched draws, reweighted to the target. What a flow has to beat."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Generator, Tensor

from latticeflow.actions import Action
from latticeflow.priors import QuenchedU1
from latticeflow.u1 import plaquette, smooth_charge, topological_charge

CHUNK = 256


@dataclass(frozen=True)
class Baseline:
    """Log weights and topological charges `(samples,)` of independent quenched draws.

    `log_weight` is for the action as it is (its marginal, if it is one), `plain_log_weight` without the orbit average.
    """

    log_weight: Tensor
    plain_log_weight: Tensor
    charge: Tensor


@torch.no_grad()
def quenched_baseline(prior: QuenchedU1, action: Action, *, samples: int, generator: Generator) -> Baseline:
    """Draw and weigh `samples` quenched configurations; one whose action is not finite has weight 0."""
    marginal, plain, charge = [], [], []
    for start in range(0, samples, CHUNK):
        links = prior.sample(min(CHUNK, samples - start), generator)
        orbit, log_q = action.orbit(links), prior.log_prob(links)
        marginal.append(_zero_unless_finite(-action.marginal(orbit) - log_q))
        plain.append(_zero_unless_finite(-orbit.flatten(1)[:, 0] - log_q))
        charge.append(topological_charge(links))
    return Baseline(torch.cat(marginal), torch.cat(plain), torch.cat(charge))


@torch.no_grad()
def tune_quenched(
    action: Action, shape: Sequence[int], *, beta: float, generator: Generator, pilot: int = 4096
) -> QuenchedU1:
    r"""Return the quenched law, its coupling and a smooth sector factor of two Gaussians, closest to `exp(-S)`.

    It minimises the forward Kullback-Leibler divergence, `<-log q>` in the target, over `(beta', a, c_1, c_2)`, with
    the target's means from `pilot` reweighted draws of the quenched theory at `beta` (usually the action's own), which
    visit all sectors.
    """
    prior = QuenchedU1(beta, shape)
    cosines, charges, log_weight = [], [], []
    for start in range(0, pilot, CHUNK):
        links = prior.sample(min(CHUNK, pilot - start), generator)
        cosines.append(torch.cos(plaquette(links)).flatten(1).sum(1))
        charges.append(smooth_charge(links))
        log_weight.append(_zero_unless_finite(-action(links) - prior.log_prob(links)))
    weights = torch.softmax(torch.cat(log_weight), dim=0).numpy()
    mean_cosine, charge2 = float(weights @ torch.cat(cosines).numpy()), torch.cat(charges).numpy() ** 2

    def divergence(point: np.ndarray) -> float:
        law = _quenched(point, shape)
        factor = sum(a * np.exp(-c * charge2) for a, c in law.smooth_sector)
        return law.log_normalisation - law.beta * mean_cosine - float(weights @ np.log(factor))

    bounds = [(0.25 * beta, 4 * beta + 1), (0.0, 1.0), (0.0, 30.0), (0.0, 30.0)]
    return _quenched(minimize(divergence, [beta, 0.2, 3.0, 0.5], method="Nelder-Mead", bounds=bounds).x, shape)


def _zero_unless_finite(log_weight: Tensor) -> Tensor:
    return torch.where(torch.isfinite(log_weight), log_weight, -math.inf)


def _quenched(point: np.ndarray, shape: Sequence[int]) -> QuenchedU1:
    beta, wide, narrow_c, wide_c = (float(value) for value in point)
    return QuenchedU1(beta, shape, smooth_sector=((1 - wide, narrow_c), (wide, wide_c)))
