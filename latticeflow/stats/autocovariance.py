"""The autocovariance of fluctuations, summed over replica, by padded FFT of segments."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import fft


def autocovariance(fluctuations: Sequence[NDArray[np.float64]], max_lag: int) -> NDArray[np.float64]:
    """Return the autocovariance at lags ``0 .. max_lag``.

    ``Gamma(t) = sum_r sum_i d_i d_{i+t} / sum_r max(N_r - t, 0)``, which is the ``1/(N - R t)`` of hep-lat/0306017 up
    to the length of the shortest replica, and its natural continuation beyond.
    ``fluctuations`` is a list of chains ``(N_r,)``; ``max_lag`` must be below the longest of them.
    """
    lags = np.arange(max_lag + 1)
    products = np.zeros(max_lag + 1)
    pairs = np.zeros(max_lag + 1)
    for chain in fluctuations:
        reach = min(max_lag, chain.size - 1)
        products[: reach + 1] += _lagged_products(chain, reach)
        pairs += np.maximum(chain.size - lags, 0)
    return products / pairs


def _lagged_products(chain: NDArray[np.float64], max_lag: int) -> NDArray[np.float64]:
    """Return ``sum_i d_i d_{i+t}``: pairs at most one segment apart lie in the same segment or in neighbours.

    Short segments transform in cache, so that a short range of lags costs less than one transform of the whole chain.
    """
    segment = fft.next_fast_len(max(max_lag, 1), real=True)
    count = -(-chain.size // segment)
    segments = np.zeros((count, segment))
    segments.reshape(-1)[: chain.size] = chain
    spectra = fft.rfft(segments, 2 * segment, axis=1)
    within = np.sum(spectra.real**2 + spectra.imag**2, axis=0)
    between = np.sum(spectra[:-1].conj() * spectra[1:], axis=0)
    between[1::2] *= -1  # a shift by one segment, half the length of the transform
    return fft.irfft(within + between, 2 * segment)[: max_lag + 1]
