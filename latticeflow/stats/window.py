"""Where to stop the sum over the autocorrelation function."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CHUNK = 4096
SIGNIFICANCE = 3.0


@dataclass(frozen=True)
class Window:
    """A summation window.

    ``lag`` is its last lag and ``closed`` says whether the criterion was met there. An ``antithetic`` one was found on
    sums of pairs and counts its last lag by half. ``memory`` is the time, at least 1/2, that the chain must be long
    against even where ``tau_int`` is small because ``rho`` alternates in sign.
    """

    lag: int
    closed: bool
    antithetic: bool = False
    memory: float = 0.5


def tau_by_window(rho: NDArray[np.float64], *, antithetic: bool = False) -> NDArray[np.float64]:
    """Return the integrated autocorrelation time as a function of the window, shape as ``rho``.

    ``tau(W) = 1/2 + sum_{t=1}^{W} rho(t)``; for an antithetic chain the mean of ``tau(W-1)`` and ``tau(W)``, because
    the partial sums of an alternating series lie in turn above and below their limit.
    """
    tau = np.cumsum(rho) - 0.5
    if antithetic:
        tau[1:] = (tau[1:] + tau[:-1]) / 2
    return tau


def automatic_window(rho: NDArray[np.float64], n: int, *, s: float = 2.0) -> Window:
    """Return the first window at which the truncation error drops below the statistical one.

    ``exp(-W/tau_W) - tau_W / sqrt(W N) < 0`` with ``tau_W = S / ln((2 tau(W) + 1) / (2 tau(W) - 1))``,
    hep-lat/0306017. Where this ends at ``tau(W) <= 1/2`` there is no such ``tau_W``: the same criterion
    is then applied to the sums of pairs ``rho(2m) + rho(2m+1)``, positive and decreasing for a reversible chain even
    when ``rho`` alternates, with ``N/2`` for ``N``. ``rho`` has shape ``(max_lag + 1,)``.
    """
    tau = tau_by_window(rho)
    lag = _closing_lag(tau, n, s)
    if lag is None:
        return Window(lag=rho.size - 1, closed=False)
    if tau[lag] > 0.5:
        return Window(lag=lag, closed=True)
    return _pair_window(rho, n, s)


def slow_mode_window(rho: NDArray[np.float64], n: int, *, cutoff: int) -> Window:
    """Return the window ``W_u`` after which a slow tail is attached: ``rho(W_u + 1)`` is the last significant value.

    Significant means ``rho(t) >= 3 delta_rho(t)`` for this and all smaller lags; ``W_u`` is 0 if at most one lag is.
    See arXiv:1009.5228. A lower threshold follows the noise downwards: with 2 the tail came out a tenth too short.
    """
    for lag in range(1, rho.size):
        if rho[lag] < SIGNIFICANCE * rho_error(rho, lag, n, cutoff=cutoff):
            return Window(lag=max(lag - 2, 0), closed=True)
    return Window(lag=rho.size - 2, closed=False)


def rho_error(rho: NDArray[np.float64], lag: int, n: int, *, cutoff: int) -> float:
    """Return the statistical error of the normalised autocorrelation function at one lag.

    ``(delta rho(t))^2 = (1/N) sum_{k=1}^{t+cutoff} (rho(k+t) + rho(k-t) - 2 rho(k) rho(t))^2``, hep-lat/0409106,
    eq. (E.11); ``rho`` counts as zero beyond its last entry.
    """
    k = np.arange(1, min(lag + cutoff, rho.size - 1) + 1)
    padded = np.concatenate((rho[: k.size + lag + 1], np.zeros(lag)))
    terms = padded[k + lag] + rho[np.abs(k - lag)] - 2 * rho[k] * rho[lag]
    return float(np.sqrt(np.sum(terms**2) / n))


def _pair_window(rho: NDArray[np.float64], n: int, s: float) -> Window:
    pairs = rho[: rho.size // 2 * 2].reshape(-1, 2).sum(axis=1)
    if pairs[0] <= 0 or pairs.size < 2:
        return Window(lag=1, closed=True, antithetic=True)
    tau = tau_by_window(pairs / pairs[0])
    found = _closing_lag(tau, n / 2, s)
    lag = pairs.size - 1 if found is None else found
    memory = max(2 * float(tau[lag]), 0.5)
    return Window(lag=2 * lag + 1, closed=found is not None, antithetic=True, memory=memory)


def _closing_lag(tau: NDArray[np.float64], n: float, s: float) -> int | None:
    for start in range(1, tau.size, CHUNK):
        lags = np.arange(start, min(start + CHUNK, tau.size))
        decay = _decay_time(tau[lags], s)
        closing = np.exp(-lags / decay) - decay / np.sqrt(lags * n) < 0
        if closing.any():
            return start + int(np.argmax(closing))
    return None


def _decay_time(tau: NDArray[np.float64], s: float) -> NDArray[np.float64]:
    shortest = np.finfo(float).eps
    excess = np.maximum(2 * tau - 1, shortest)
    return np.where(tau > 0.5, s / np.log1p(2 / excess), shortest)
