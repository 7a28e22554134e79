"""Errors of functions of several means, by projecting the fluctuations on the gradient."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from latticeflow.stats.fluctuations import analyse_fluctuations, check_settings, chunks, peaks
from latticeflow.stats.result import GammaResult, undefined_result
from latticeflow.stats.series import Series, as_replica, pooled_mean

Function = Callable[[NDArray[np.float64]], ArrayLike]
Gradient = ArrayLike | Function
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

    def number(means: NDArray[np.float64]) -> float:
        return _finite_number(function, means)

    def slopes(means: NDArray[np.float64]) -> NDArray[np.float64]:
        return _finite_gradient(gradient, means)

    return gamma_derived_many(
        number,
        observables,
        gradient=None if gradient is None else slopes,
        replica=replica,
        s=s,
        tau_exp=tau_exp,
        window_max=window_max,
    )[0]


def gamma_derived_many(
    function: Function,
    observables: Sequence[Series],
    *,
    gradient: Gradient | None = None,
    replica: Sequence[int] | None = None,
    s: float = 2.0,
    tau_exp: float | None = None,
    window_max: int | None = None,
) -> list[GammaResult]:
    """Return the ``M`` values of an array-valued function of the means, each with the error of ``gamma_derived``.

    ``function`` maps the means ``(K,)`` to an array of any shape, flattened to ``(M,)``; it is called once, and twice
    more for each observable unless ``gradient``, of that shape with ``K`` appended, is given. ``observables`` holds
    ``K`` series, observables first. A value that is not finite, or whose slope is not, gives a result of NaN, not
    converged, with the warning "undefined: ..."; what the function raises is passed on.
    Raises ValueError where ``gamma_method`` does (naming the observable), for observables of unequal lengths, and for
    a function or gradient of changing or wrong shape.
    """
    check_settings(s=s, tau_exp=tau_exp, window_max=window_max)
    histories = [as_replica(series, replica, name=f"observables[{k}]") for k, series in enumerate(observables)]
    _check_lengths(histories)
    chains = [np.stack(parts) for parts in zip(*histories, strict=True)]
    means = pooled_mean(chains)
    for chain in chains:
        chain -= means[:, None]
    n = sum(chain.shape[1] for chain in chains)
    largest = peaks(chains)
    with np.errstate(all="ignore"):  # what is undefined is marked below
        values = _real(function(means.copy()), "function").ravel()
        if gradient is None:
            slopes = _differences(function, means, STEP * _naive_errors(chains, largest, n), values.size)
        else:
            slopes = _given_slopes(gradient, means, values.size)
        defined = np.isfinite(values) & np.isfinite(np.abs(slopes) @ largest)
    results = [undefined_result(n, _reason(value)) for value in values]
    for part in chunks(np.count_nonzero(defined), n):
        which = np.flatnonzero(defined)[part]
        projected = [slopes[which] @ chain for chain in chains]
        analysed = analyse_fluctuations(values[which], projected, s=s, tau_exp=tau_exp, window_max=window_max)
        for m, result in zip(which, analysed, strict=True):
            results[m] = result
    return results


def _check_lengths(histories: Sequence[Sequence[NDArray[np.float64]]]) -> None:
    if not histories:
        raise ValueError("observables must hold at least one series")
    lengths = [tuple(chain.size for chain in chains) for chains in histories]
    if len(set(lengths)) > 1:
        raise ValueError(f"observables must have the same replica lengths, found {lengths}")


def _real(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.asarray(values)
    if np.iscomplexobj(array):
        raise ValueError(f"{name} must return real numbers, found {array}")
    return array.astype(np.float64)


def _finite_number(function: Function, point: NDArray[np.float64]) -> float:
    value = _real(function(point), "function")
    if value.size != 1 or not np.isfinite(value).all():
        raise ValueError(f"function must return one finite number, found {value} at {point}")
    return value.item()


def _finite_gradient(gradient: Gradient | None, means: NDArray[np.float64]) -> NDArray[np.float64]:
    slopes = np.asarray(gradient(means) if callable(gradient) else gradient, dtype=np.float64)
    if slopes.shape != means.shape or not np.isfinite(slopes).all():
        raise ValueError(f"gradient must be finite, of shape {means.shape}, found {slopes}")
    return slopes


def _given_slopes(gradient: Gradient, means: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    slopes = _real(gradient(means.copy()) if callable(gradient) else gradient, "gradient")
    if slopes.shape[-1:] != means.shape or slopes.size != count * means.size:
        raise ValueError(f"gradient must be {count} values by {means.size} observables, found shape {slopes.shape}")
    return slopes.reshape(count, means.size)


def _naive_errors(chains: Sequence[NDArray[np.float64]], largest: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """Return ``sqrt(sum d^2) / n`` per observable, without overflow of the squares."""
    unit = np.where(largest > 0, largest, 1.0)
    return unit * np.sqrt(sum(np.sum((chain / unit[:, None]) ** 2, axis=1) for chain in chains)) / n


def _differences(
    function: Function, means: NDArray[np.float64], steps: NDArray[np.float64], count: int
) -> NDArray[np.float64]:
    """Return central differences, shape ``(M, K)``; 0 for an observable that does not fluctuate."""
    slopes = np.zeros((count, means.size))
    for k, step in enumerate(steps):
        direction = np.zeros_like(means)
        # Rounded so that mean + direction is exact: the quotient then divides by the step that was really taken.
        direction[k] = (means[k] + step) - means[k]
        if direction[k] != 0:
            sides = [_real(function(means + sign * direction), "function").ravel() for sign in (1, -1)]
            if any(side.size != count for side in sides):
                raise ValueError(f"function must always return {count} values, found {[side.size for side in sides]}")
            slopes[:, k] = (sides[0] - sides[1]) / (2 * direction[k])
    return slopes


def _reason(value: float) -> str:
    where = "" if not np.isfinite(value) else ", but its slope there is not finite"
    return f"the function is {value:.6g} at the means{where}"
