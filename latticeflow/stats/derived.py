"""Errors of functions of several means, by projecting the fluctuations on the gradient."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from latticeflow.stats.gamma import analyse_fluctuations
from latticeflow.stats.result import GammaResult
from latticeflow.stats.series import Series, as_replica, pooled_mean

Gradient = ArrayLike | Callable[[NDArray[np.float64]], ArrayLike]
STEP = 0.01


def gamma_derived(
    function: Callable[[NDArray[np.float64]], float],
    observables: Sequence[Series],
    *,
    gradient: Gradient | None = None,
    replica: Sequence[int] | None = None,
    s: float = 2.0,
    tau_exp: float | None = None,
    window_max: int | None = None,
) -> GammaResult:
    """Return ``f(mean A_1, .., mean A_K)`` with the error of the projected fluctuations.

    ``d_i = sum_k (df/dA_k) (a_{k,i} - mean A_k)``, then as ``gamma_method``; hep-lat/0306017.
    ``observables`` holds ``K`` series measured on the same samples, each in a form that ``gamma_method`` takes.
    ``function`` maps the means ``(K,)`` to a number. ``gradient`` is an array ``(K,)`` or a function of the means that
    returns one; without it, central differences with steps of 1/100 of the naive error of each mean.
    Raises ValueError where ``gamma_method`` does, for observables of unequal lengths, and for a function or gradient
    that is not finite or not of the right shape.
    """
    histories = [as_replica(series, replica) for series in observables]
    _check_lengths(histories)
    means = np.array([pooled_mean(chains) for chains in histories])
    value = _evaluate(function, means)
    slopes = _slopes(function, histories, means, gradient)
    fluctuations = [
        sum(slope * (chain - mean) for slope, chain, mean in zip(slopes, chains, means, strict=True))
        for chains in zip(*histories, strict=True)
    ]
    return analyse_fluctuations(value, fluctuations, s=s, tau_exp=tau_exp, window_max=window_max)


def _check_lengths(histories: Sequence[Sequence[NDArray[np.float64]]]) -> None:
    if not histories:
        raise ValueError("observables must hold at least one series")
    lengths = [tuple(chain.size for chain in chains) for chains in histories]
    if len(set(lengths)) > 1:
        raise ValueError(f"observables must have the same replica lengths, found {lengths}")


def _evaluate(function: Callable[[NDArray[np.float64]], float], point: NDArray[np.float64]) -> float:
    value = np.asarray(function(point), dtype=np.float64)
    if value.size != 1 or not np.isfinite(value).all():
        raise ValueError(f"function must return one finite number, found {value} at {point}")
    return value.item()


def _slopes(
    function: Callable[[NDArray[np.float64]], float],
    histories: Sequence[Sequence[NDArray[np.float64]]],
    means: NDArray[np.float64],
    gradient: Gradient | None,
) -> NDArray[np.float64]:
    if gradient is None:
        steps = [STEP * _naive_error(chains, mean) for chains, mean in zip(histories, means, strict=True)]
        return np.array([_slope(function, means, k, step) for k, step in enumerate(steps)])
    slopes = np.asarray(gradient(means) if callable(gradient) else gradient, dtype=np.float64)
    if slopes.shape != means.shape or not np.isfinite(slopes).all():
        raise ValueError(f"gradient must be finite, of shape {means.shape}, found {slopes}")
    return slopes


def _naive_error(chains: Sequence[NDArray[np.float64]], mean: float) -> float:
    squares = sum(float(np.sum((chain - mean) ** 2)) for chain in chains)
    return float(np.sqrt(squares)) / sum(chain.size for chain in chains)


def _slope(
    function: Callable[[NDArray[np.float64]], float], means: NDArray[np.float64], index: int, step: float
) -> float:
    direction = np.zeros_like(means)
    # Rounded so that mean + direction is exact: the quotient then divides by the step that was really taken.
    direction[index] = (means[index] + step) - means[index]
    if direction[index] == 0:
        return 0.0
    difference = _evaluate(function, means + direction) - _evaluate(function, means - direction)
    return float(difference / (2 * direction[index]))
