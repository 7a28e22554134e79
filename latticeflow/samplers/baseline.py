"""The training-free baseline: independent quenched draws, reweighted to the target. What a flow has to beat."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp
from torch import Generator, Tensor

from latticeflow.actions import Action
from latticeflow.priors import QuenchedU1
from latticeflow.u1 import plaquette, topological_charge

CHUNK = 256


@dataclass(frozen=True)
class Baseline:
    """Log weights `(samples,)` of quenched draws at `beta`, `sector`.

    `log_weight` is for the action as it is (its marginal, if it is one), `plain_log_weight` without the orbit average.
    """

    beta: float
    sector: float
    log_weight: Tensor
    plain_log_weight: Tensor


@torch.no_grad()
def quenched_baseline(
    action: Action, shape: Sequence[int], *, samples: int, beta: float, sector: float, generator: Generator
) -> Baseline:
    """Draw and weigh `samples` quenched configurations."""
    prior = QuenchedU1(beta, shape, sector=sector)
    marginal, plain = [], []
    for start in range(0, samples, CHUNK):
        links = prior.sample(min(CHUNK, samples - start), generator)
        orbit, log_q = action.orbit(links), prior.log_prob(links)
        marginal.append(-action.marginal(orbit) - log_q)
        plain.append(-orbit.flatten(1)[:, 0] - log_q)
    return Baseline(beta, sector, torch.cat(marginal), torch.cat(plain))


@torch.no_grad()
def tune_quenched(
    action: Action, shape: Sequence[int], *, beta: float, generator: Generator, pilot: int = 1024, rounds: int = 2
) -> tuple[float, float]:
    r"""Return the quenched coupling and sector factor `(beta', c)` whose draws have the largest ESS for this action.

    With draws of one quenched law `q_0`, `1/ESS` of another is proportional to `mean exp(-2S) / (q_0 q)`, whose
    logarithm is convex in `(beta', c)`, since `log q = beta' sum cos P - c Q^2 - log Z_c`: one pilot run and a convex
    minimisation, then once more from where that ended. `beta` is the start, usually the action's own.
    """
    best = np.array([beta, 0.1])
    for _ in range(rounds):
        start = QuenchedU1(best[0], shape, sector=best[1])
        links = start.sample(pilot, generator)
        log_ratio = (-2 * action(links) - start.log_prob(links)).numpy()
        cosines = torch.cos(plaquette(links)).flatten(1).sum(1).numpy()
        charge2 = (topological_charge(links) ** 2).numpy()

        def log_inverse_ess(
            point: np.ndarray, weights: tuple[np.ndarray, ...] = (log_ratio, cosines, charge2)
        ) -> float:
            log_q = point[0] * weights[1] - point[1] * weights[2]
            return float(logsumexp(weights[0] - log_q)) + QuenchedU1(point[0], shape, sector=point[1]).log_normalisation

        bounds = [(0.5 * best[0], 2 * best[0] + 0.1), (0.0, best[1] + 1.0)]
        best = minimize(log_inverse_ess, best, method="L-BFGS-B", bounds=bounds, options={"maxiter": 30}).x
    return round(float(best[0]), 3), round(float(best[1]), 3)
