"""The Gamma method: mean, error and integrated autocorrelation time of Monte Carlo histories."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from latticeflow.stats.fluctuations import analyse_fluctuations, check_settings, chunks, rows
from latticeflow.stats.result import GammaResult, constant_result
from latticeflow.stats.series import Series, as_replica, as_tables, pooled_mean

BLOCK = 512


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
    check_settings(s=s, tau_exp=tau_exp, window_max=window_max)
    chains = [chain[None] for chain in as_replica(series, replica)]
    return _analyse(chains, s=s, tau_exp=tau_exp, window_max=window_max)[0]


def gamma_many(
    series: Series, *, s: float = 2.0, tau_exp: float | None = None, window_max: int | None = None
) -> list[GammaResult]:
    """Return the results of ``gamma_method`` for each of ``K`` observables, with the transforms done together.

    ``series`` is one chain ``(n, K)``, chains ``(replica, n, K)``, or a list of chains ``(n_r, K)``: observables last.
    The settings are those of ``gamma_method``, the same for all. Memory beyond the input does not grow with ``K``.
    Raises ValueError as ``gamma_method``, naming replica, sample and observable.
    """
    check_settings(s=s, tau_exp=tau_exp, window_max=window_max)
    tables = as_tables(series)
    results: list[GammaResult] = []
    for part in chunks(tables[0].shape[1], sum(len(table) for table in tables)):
        chains = [_columns(table, part) for table in tables]
        results += _analyse(chains, s=s, tau_exp=tau_exp, window_max=window_max)
    return results


def _columns(table: NDArray[np.float64], part: slice) -> NDArray[np.float64]:
    """Return columns of a table as rows, transposed block by block, which reads every line of the cache once."""
    chains = np.empty((part.stop - part.start, len(table)))
    for start in range(0, len(table), BLOCK):
        chains[:, start : start + BLOCK] = table[start : start + BLOCK, part].T
    return chains


def _analyse(
    chains: Sequence[NDArray[np.float64]], *, s: float, tau_exp: float | None, window_max: int | None
) -> list[GammaResult]:
    """Return the results for chains ``(K, N_r)``; whether a row is constant is asked before its mean is rounded."""
    first = chains[0][:, 0]
    moving = np.flatnonzero(
        np.any([(chain.min(axis=-1) != first) | (chain.max(axis=-1) != first) for chain in chains], axis=0)
    )
    n = sum(chain.shape[-1] for chain in chains)
    results = [constant_result(float(value), n) for value in first]
    chains = [rows(chain, moving) for chain in chains]
    means = pooled_mean(chains)
    fluctuations = [chain - means[:, None] for chain in chains]
    analysed = analyse_fluctuations(means, fluctuations, s=s, tau_exp=tau_exp, window_max=window_max)
    for k, result in zip(moving, analysed, strict=True):
        results[k] = result
    return results
