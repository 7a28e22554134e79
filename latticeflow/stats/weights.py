"""Importance weights ``w = p/q`` in log form: sample size, normalisation, reweighted means."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from latticeflow.stats.gamma import gamma_method
from latticeflow.stats.series import check_values


def ess(log_weights: ArrayLike) -> float:
    """Return the effective sample size as a fraction, in ``[1/n, 1]``.

    ``ESS = (sum w)^2 / (n sum w^2)``. ``log_weights`` has any shape and is pooled; ``-inf`` is a weight of zero.
    Raises ValueError for NaN or ``+inf`` (naming the index) and where every weight is zero.
    """
    weights = scaled_weights(log_weights)
    return float(weights.sum() ** 2 / (weights.size * np.sum(weights**2)))


def ess_error(log_weights: ArrayLike) -> float:
    """Return the jackknife error of ``ess`` for independent samples; NaN where only one weight is not zero.

    ``(n-1)/n sum_i (ESS_i - mean ESS_i)^2``, ``ESS_i`` without sample ``i``; shapes and errors as ``ess``.
    """
    weights = scaled_weights(log_weights).ravel()
    largest = int(np.argmax(weights))
    log_others = np.delete(np.ravel(log_weights), largest)
    if np.all(np.isneginf(log_others)):
        return float("nan")
    others = scaled_weights(log_others)  # for the largest weight, the difference below would be all rounding
    first, second = weights.sum() - weights, np.sum(weights**2) - weights**2
    first[largest], second[largest] = others.sum(), np.sum(others**2)
    return float(np.sqrt(np.var(first**2 / second) / others.size))


def log_z(log_weights: ArrayLike) -> tuple[float, float]:
    """Return ``log Z`` and its error from independent samples of the proposal.

    ``log Z = logsumexp(l) - log n``, error ``sqrt((1/ESS - 1)/n)``; shapes and errors as ``ess``.
    """
    weights = scaled_weights(log_weights)
    value = float(np.max(np.asarray(log_weights))) + float(np.log(weights.mean()))
    return value, float(np.sqrt(max(1 / ess(log_weights) - 1, 0.0) / weights.size))


def reweighted_mean(observable: ArrayLike, log_weights: ArrayLike, *, correlated: bool = False) -> tuple[float, float]:
    """Return ``<O>_p = sum w O / sum w`` from samples of the proposal, and its error.

    Independent samples: ``sqrt(sum (w / sum w)^2 (O - <O>)^2)``. ``correlated`` samples: the Gamma method on
    ``w (O - <O>) / mean(w)``. Both arguments are ``(n,)`` or ``(replica, n)``.
    Raises ValueError for unequal shapes and an observable that is not finite, else as ``ess``.
    """
    values, weights = _samples(observable, "observable"), scaled_weights(log_weights)
    check_values(values, "observable")
    if values.shape != weights.shape:
        raise ValueError(f"observable and log_weights must have one shape, found {values.shape} and {weights.shape}")
    mean = float(np.sum(weights * values) / weights.sum())
    fluctuations = weights * (values - mean) / weights.mean()
    if correlated:
        return mean, gamma_method(fluctuations).error
    return mean, float(np.sqrt(np.sum(fluctuations**2))) / weights.size


def predicted_acceptance(log_weights: ArrayLike) -> float:
    """Return the acceptance of an independence Metropolis chain in equilibrium.

    ``A = sum_ij min(w_i, w_j) / (n sum w) = (1 / (n sum w)) sum_k w_(k) (2 (n - k) + 1)``, ``w_(1) <= w_(2) <= ...``.
    ``log_weights`` belong to independent proposals; shapes and errors as ``ess``.
    """
    weights = np.sort(scaled_weights(log_weights), axis=None)
    count = 2 * np.arange(weights.size)[::-1] + 1
    return float(np.sum(weights * count) / (weights.size * weights.sum()))


def largest_weight(log_weights: ArrayLike) -> float:
    """Return ``max w / sum w``, the share that one sample has of the sum; shapes and errors as ``ess``."""
    return float(1 / scaled_weights(log_weights).sum())


def forward_ess(log_weights_of_target_samples: ArrayLike) -> float:
    """Return the effective sample size as a fraction, estimated from samples of the target.

    ``1 / (<w>_p <1/w>_p)``, which equals ``<w>_q^2 / <w^2>_q`` but sees a mode that the proposal misses.
    Shapes and errors as ``ess``, and ValueError for ``-inf``, which a sample of the target cannot have.
    """
    logs = target_log_weights(log_weights_of_target_samples)
    return float(np.exp(-np.log(scaled_weights(logs).mean()) - np.log(scaled_weights(-logs).mean()) - np.ptp(logs)))


def scaled_weights(log_weights: ArrayLike) -> NDArray[np.float64]:
    """Return ``exp(l - max l)``, so that the largest weight is one; shape as given, errors as ``ess``."""
    logs = proposal_log_weights(log_weights)
    return np.exp(logs - logs.max())


def proposal_log_weights(log_weights: ArrayLike, name: str = "log_weights") -> NDArray[np.float64]:
    """Return the log weights of proposals as an array, checked: ``-inf`` is allowed, but not for all; as ``ess``."""
    logs = _samples(log_weights, name)
    check_values(logs, name, legal=_is_log_weight)
    if np.isneginf(logs.max()):
        raise ValueError(f"{name} must not all be -inf: every weight is zero")
    return logs


def target_log_weights(log_weights: ArrayLike, name: str = "log_weights_of_target_samples") -> NDArray[np.float64]:
    """Return the log weights of samples of the target as an array, checked: all are finite."""
    logs = _samples(log_weights, name)
    check_values(logs, name)
    return logs


def _samples(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0 or array.ndim == 0:
        raise ValueError(f"{name} must hold at least one sample, found shape {array.shape}")
    return array


def _is_log_weight(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.isfinite(values) | np.isneginf(values)
