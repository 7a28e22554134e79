"""The Gamma method proper: from the fluctuations of several observables to their errors."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtrc

from latticeflow.stats.autocovariance import autocovariance
from latticeflow.stats.result import GammaResult, constant_result, judge
from latticeflow.stats.window import Window, automatic_window, rho_error, slow_mode_window, tau_by_window

LONG_SERIES = 8192
CHUNK_SAMPLES = 2**17
CHUNK_OBSERVABLES = 8
Found = tuple[NDArray[np.float64], Window]


def chunks(observables: int, samples: int) -> Iterator[slice]:
    """Yield slices of the observables that bound the memory of an analysis; at least eight, a line of the cache."""
    step = max(CHUNK_SAMPLES // samples, CHUNK_OBSERVABLES)
    return (slice(start, min(start + step, observables)) for start in range(0, observables, step))


def rows(chain: NDArray[np.float64], wanted: NDArray[np.intp]) -> NDArray[np.float64]:
    """Return the wanted rows of a chain ``(K, N_r)``, without a copy where they are all of them."""
    return chain if wanted.size == len(chain) else chain[wanted]


def peaks(chains: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return the largest modulus per row of chains ``(K, N_r)``."""
    return np.max([np.maximum(chain.max(axis=-1), -chain.min(axis=-1)) for chain in chains], axis=0)


def analyse_fluctuations(
    means: NDArray[np.float64],
    fluctuations: Sequence[NDArray[np.float64]],
    *,
    s: float = 2.0,
    tau_exp: float | None = None,
    window_max: int | None = None,
) -> list[GammaResult]:
    """Return the results for values ``(K,)`` whose fluctuations, of total sum zero, are given.

    ``fluctuations`` holds one array ``(K, N_r)`` per replica. Raises ValueError for a setting that is not positive.
    """
    check_settings(s=s, tau_exp=tau_exp, window_max=window_max)
    n = sum(chain.shape[-1] for chain in fluctuations)
    scale = peaks(fluctuations)
    results = [constant_result(float(mean), n) for mean in means]
    moving = np.flatnonzero(scale)
    if moving.size == 0:
        return results
    scaled = [rows(chain, moving) / scale[moving, None] for chain in fluctuations]
    sizes = np.array([chain.shape[-1] for chain in scaled])
    replica_means = np.stack([chain.mean(axis=-1) for chain in scaled], axis=-1)
    found = _windowed_autocovariances(scaled, s=s, tau_exp=tau_exp, window_max=window_max)
    for row, (k, (gamma, window)) in enumerate(zip(moving, found, strict=True)):
        results[k] = _assemble(
            float(means[k]), float(scale[k]), sizes, replica_means[row], gamma, window, tau_exp=tau_exp
        )
    return results


def check_settings(*, s: float, tau_exp: float | None, window_max: int | None) -> None:
    """Raise ValueError for a setting of the Gamma method that is not positive."""
    for name, value in (("s", s), ("tau_exp", tau_exp), ("window_max", window_max)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, found {value}")


def _windowed_autocovariances(
    chains: Sequence[NDArray[np.float64]], *, s: float, tau_exp: float | None, window_max: int | None
) -> list[Found]:
    """Return autocovariance and window per row: rows whose window did not close go on to the longer range of lags."""
    n = sum(chain.shape[-1] for chain in chains)
    found: dict[int, Found] = {}
    left = np.arange(len(chains[0]))
    for max_lag in _lag_limits(chains, window_max, tau_exp):
        gammas = autocovariance([rows(chain, left) for chain in chains], max_lag)
        for row, gamma in zip(left, gammas, strict=True):
            found[int(row)] = gamma, _window(gamma / gamma[0], n, s=s, tau_exp=tau_exp)
        left = np.array([row for row in left if not found[int(row)][1].closed], dtype=np.intp)
        if left.size == 0:
            break
    return [found[row] for row in range(len(chains[0]))]


def _window(rho: NDArray[np.float64], n: int, *, s: float, tau_exp: float | None) -> Window:
    window = automatic_window(rho, n, s=s)
    return window if tau_exp is None else slow_mode_window(rho, n, cutoff=window.lag)


def _lag_limits(chains: Sequence[NDArray[np.float64]], window_max: int | None, tau_exp: float | None) -> list[int]:
    """Return the largest lags to try in turn: for a long series a short, cheap range nearly always suffices.

    Not for a slow tail: the errors of ``rho`` that place it are sums far beyond the window.
    """
    longest = max(chain.shape[-1] for chain in chains)
    short_first = longest >= LONG_SERIES and tau_exp is None
    limits = [longest // 50, longest // 2] if short_first else [longest // 2]
    return limits if window_max is None else sorted({min(limit, window_max) for limit in limits})


def _assemble(
    mean: float,
    scale: float,
    sizes: NDArray[np.int64],
    replica_means: NDArray[np.float64],
    gamma: NDArray[np.float64],
    window: Window,
    *,
    tau_exp: float | None,
) -> GammaResult:
    n, lag = int(sizes.sum()), window.lag
    variance, rho = _bias_corrected(gamma, window, n)
    tau_of_window = tau_by_window(rho, antithetic=window.antithetic)
    tail, tail_error = _slow_tail(rho, lag, n, tau_exp=tau_exp)
    summed = float(tau_of_window[lag]) + tail
    floored = summed < 1 / (2 * n)  # even samples that cancel in pairs leave one over: error^2 >= Gamma(0)/N^2
    tau = 0.5 if floored else summed
    error = scale * float(np.sqrt(2 * tau * variance / n))
    chi2, p_value = _replica_consistency(sizes, replica_means, 2 * tau * variance)
    converged, warnings = judge(n, tau, p_value, window=window, floored=floored)
    shown = 4 * lag + 16
    return GammaResult(
        mean=mean,
        error=error,
        error_error=error * float(np.sqrt((lag + 0.5) / n)),
        tau_int=tau,
        tau_int_error=float(np.hypot(tau * np.sqrt(4 / n * max(lag + 0.5 - tau, 0.0)), tail_error)),
        window=lag,
        rho=rho[:shown].copy(),
        tau_int_of_window=tau_of_window[:shown].copy(),
        n=n,
        n_eff=n / (2 * tau),
        chi2=chi2,
        p_value=p_value,
        converged=converged,
        warnings=warnings,
    )


def _bias_corrected(gamma: NDArray[np.float64], window: Window, n: int) -> tuple[float, NDArray[np.float64]]:
    """Return ``Gamma(0)`` and ``rho`` after giving back the ``C/N`` that the subtracted mean takes from every lag."""
    summed = 2 * tau_by_window(gamma / gamma[0], antithetic=window.antithetic)[window.lag] * gamma[0]
    corrected = gamma + max(summed, 0.0) / n
    return float(corrected[0]), corrected / corrected[0]


def _slow_tail(rho: NDArray[np.float64], lag: int, n: int, *, tau_exp: float | None) -> tuple[float, float]:
    if tau_exp is None:
        return 0.0, 0.0
    tail = tau_exp * max(float(rho[lag + 1]), 0.0)
    return float(tail), float(tau_exp * rho_error(rho, lag + 1, n, cutoff=max(lag, 1)))


def _replica_consistency(sizes: NDArray[np.int64], means: NDArray[np.float64], summed: float) -> tuple[float, float]:
    if sizes.size == 1:
        return float("nan"), float("nan")
    chi2 = float(np.sum(sizes * means**2)) / summed
    return chi2, float(chdtrc(sizes.size - 1, chi2))
