"""The tail of importance weights: how many of their moments exist."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from latticeflow.stats.weights import scaled_weights

FEWEST_POINTS = 5
PRIOR_SHAPE, PRIOR_POINTS = 0.5, 10
NEGLIGIBLE = 1e-290
ROUNDING = 1e-10


def pareto_k(log_weights: ArrayLike) -> float:
    """Return the shape ``k`` of a generalised Pareto distribution fitted to the largest weights.

    Moments of order ``1/k`` and above do not exist; above 0.7 no number from these weights is to be trusted. The tail
    holds the ``min(n/5, 3 sqrt(n))`` largest weights, and ``k`` is drawn to 1/2 as if by ten more points
    (arXiv:1507.02646). ``-inf`` where the tail is flat, up to rounding; ``+inf`` where it has fewer than five distinct
    points above its threshold, as with less than 25 samples. ``log_weights`` has any shape and is pooled.
    Raises ValueError for NaN or ``+inf`` (naming the index) and where every weight is zero.
    """
    weights = np.sort(scaled_weights(log_weights), axis=None)
    size = int(min(weights.size / 5, 3 * np.sqrt(weights.size)))
    threshold = weights[weights.size - size - 1]
    excesses = weights[weights.size - size :] - threshold
    excesses = excesses[excesses > NEGLIGIBLE] if excesses[-1] > ROUNDING * threshold else excesses[:0]
    if size >= FEWEST_POINTS and excesses.size == 0:
        return float("-inf")
    if np.unique(excesses).size < FEWEST_POINTS:
        return float("inf")
    fitted = generalised_pareto_shape(excesses)
    return (excesses.size * fitted + PRIOR_POINTS * PRIOR_SHAPE) / (excesses.size + PRIOR_POINTS)


def generalised_pareto_shape(excesses: NDArray[np.float64]) -> float:
    """Return the shape ``k`` of the density ``(1/sigma) (1 + k x / sigma)^(-1 - 1/k)`` that fits positive excesses.

    With ``theta = -k/sigma``, ``k(theta) = mean log(1 - theta x)`` maximises the likelihood at fixed ``theta``; the
    mean of ``theta`` over that profile likelihood, on the grid of Zhang and Stephens (Technometrics 51, 2009, 316),
    gives ``k``. ``excesses`` has shape ``(n,)``, ascending.
    """
    n = excesses.size
    points = 30 + int(np.sqrt(n))
    quartile = excesses[int(n / 4 + 0.5) - 1]
    spread = 1 - np.sqrt(points / (np.arange(1, points + 1) - 0.5))
    theta = 1 / excesses[-1] + spread / (3 * quartile)
    theta[theta == 0] = NEGLIGIBLE  # the limit of an exponential tail, without 0/0 below
    shape = _profile_shape(theta, excesses)
    log_likelihood = n * (np.log(-theta / shape) - shape - 1)
    posterior = np.exp(log_likelihood - log_likelihood.max())
    best = np.sum(posterior * theta) / posterior.sum()
    return float(_profile_shape(np.array([best]), excesses)[0])


def _profile_shape(theta: NDArray[np.float64], excesses: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.mean(np.log1p(-theta[:, None] * excesses), axis=1)
