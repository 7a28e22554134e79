"""The Gamma method: mean, error and integrated autocorrelation time of a Monte Carlo history."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtrc

from latticeflow.stats.autocovariance import autocovariance
from latticeflow.stats.result import GammaResult, constant_result, judge
from latticeflow.stats.series import Series, as_replica, pooled_mean
from latticeflow.stats.window import Window, automatic_window, rho_error, slow_mode_window, tau_by_window

LONG_SERIES = 100_000


def gamma_method(
    series: Series,
    *,
    replica: Sequence[int] | None = None,
    s: float = 2.0,
    tau_exp: float | None = None,
    window_max: int | None = None,
) -> GammaResult:
    """Return the mean of a Monte Carlo history with its error from the summed autocorrelation function.

    ``error^2 = 2 tau_int Gamma(0) / N``, ``tau_int = 1/2 + sum_{t=1}^{W} Gamma(t)/Gamma(0)``, with the automatic window
    and the bias corrections of hep-lat/0306017 (eqs. 42, 49) and the fluctuations about the mean of all replica.
    ``series`` is ``(n,)``, ``(replica, n)`` or a list of chains ``(n_r,)``; ``replica`` holds the lengths of the pieces
    of one concatenated chain. ``s`` is the ratio of the exponential to the integrated autocorrelation time that the
    window assumes; ``window_max`` bounds the window. With ``tau_exp``, in Monte Carlo steps,
    ``tau_int = tau(W) + tau_exp rho(W + 1)``, an upper bound by the slowest mode (arXiv:1009.5228).
    Raises ValueError for NaN or infinity (naming the index), fewer than 4 samples in a chain, or a setting that is not
    positive.
    """
    chains = as_replica(series, replica)
    first = float(chains[0][0])
    if all(np.all(chain == first) for chain in chains):
        return constant_result(first, sum(chain.size for chain in chains))
    mean = pooled_mean(chains)
    fluctuations = [chain - mean for chain in chains]
    return analyse_fluctuations(mean, fluctuations, s=s, tau_exp=tau_exp, window_max=window_max)


def analyse_fluctuations(
    mean: float,
    fluctuations: Sequence[NDArray[np.float64]],
    *,
    s: float = 2.0,
    tau_exp: float | None = None,
    window_max: int | None = None,
) -> GammaResult:
    """Return the result for a value whose fluctuations are given, one array ``(N_r,)`` per replica, of total sum zero.

    Raises ValueError for a setting that is not positive.
    """
    _check_settings(s=s, tau_exp=tau_exp, window_max=window_max)
    scale = max(float(np.abs(chain).max()) for chain in fluctuations)
    if scale == 0:
        return constant_result(mean, sum(chain.size for chain in fluctuations))
    scaled = [chain / scale for chain in fluctuations]
    gamma, window = _windowed_autocovariance(scaled, s=s, tau_exp=tau_exp, window_max=window_max)
    return _assemble(mean, scale, scaled, gamma, window, tau_exp=tau_exp)


def _windowed_autocovariance(
    chains: Sequence[NDArray[np.float64]], *, s: float, tau_exp: float | None, window_max: int | None
) -> tuple[NDArray[np.float64], Window]:
    n = sum(chain.size for chain in chains)
    for max_lag in _lag_limits(chains, window_max):
        gamma = autocovariance(chains, max_lag)
        rho = gamma / gamma[0]
        window = automatic_window(rho, n, s=s)
        if tau_exp is not None:
            window = slow_mode_window(rho, n, cutoff=window.lag)
        if window.closed:
            break
    return gamma, window


def _lag_limits(chains: Sequence[NDArray[np.float64]], window_max: int | None) -> list[int]:
    """Return the largest lags to try in turn: for a long series a short, cheap range nearly always suffices."""
    longest = max(chain.size for chain in chains)
    limits = [longest // 50, longest // 2] if longest >= LONG_SERIES else [longest // 2]
    return limits if window_max is None else sorted({min(limit, window_max) for limit in limits})


def _assemble(
    mean: float,
    scale: float,
    chains: Sequence[NDArray[np.float64]],
    gamma: NDArray[np.float64],
    window: Window,
    *,
    tau_exp: float | None,
) -> GammaResult:
    n = sum(chain.size for chain in chains)
    lag = window.lag
    variance, rho = _bias_corrected(gamma, window, n)
    tau_of_window = tau_by_window(rho, antithetic=window.antithetic)
    tail, tail_error = _slow_tail(rho, lag, n, tau_exp=tau_exp)
    summed = float(tau_of_window[lag]) + tail
    floored = summed < 1 / (2 * n)  # even samples that cancel in pairs leave one over: error^2 >= Gamma(0)/N^2
    tau = 0.5 if floored else summed
    error = scale * float(np.sqrt(2 * tau * variance / n))
    chi2, p_value = _replica_consistency(chains, 2 * tau * variance)
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


def _replica_consistency(chains: Sequence[NDArray[np.float64]], summed: float) -> tuple[float, float]:
    if len(chains) == 1:
        return float("nan"), float("nan")
    chi2 = sum(chain.size * chain.mean() ** 2 for chain in chains) / summed
    return float(chi2), float(chdtrc(len(chains) - 1, chi2))


def _check_settings(*, s: float, tau_exp: float | None, window_max: int | None) -> None:
    for name, value in (("s", s), ("tau_exp", tau_exp), ("window_max", window_max)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, found {value}")
