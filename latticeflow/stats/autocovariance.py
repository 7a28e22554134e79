"""The autocovariance of fluctuations, summed over replica, by padded FFT of segments."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import fft

BLOCK = 2**16


def autocovariance(fluctuations: Sequence[NDArray[np.float64]], max_lag: int) -> NDArray[np.float64]:
    """Return the autocovariance at lags ``0 .. max_lag``, of shape ``(..., max_lag + 1)``.

    ``Gamma(t) = sum_r sum_i d_i d_{i+t} / sum_r max(N_r - t, 0)``, which is the ``1/(N - R t)`` of hep-lat/0306017 up
    to the length of the shortest replica, and its natural continuation beyond.
    ``fluctuations`` is a list of chains ``(..., N_r)``, time last; ``max_lag`` must be below the longest of them.
    """
    lags = np.arange(max_lag + 1)
    products = np.zeros((*fluctuations[0].shape[:-1], max_lag + 1))
    pairs = np.zeros(max_lag + 1)
    for chain in fluctuations:
        length = chain.shape[-1]
        reach = min(max_lag, length - 1)
        products[..., : reach + 1] += _lagged_products(chain, reach)
        pairs += np.maximum(length - lags, 0)
    return products / pairs


def _lagged_products(chain: NDArray[np.float64], max_lag: int) -> NDArray[np.float64]:
    """Return ``sum_i d_i d_{i+t}``: pairs at most one segment apart lie in the same segment or in neighbours.

    Short segments transform in cache, so that a short range of lags costs less than one transform of the whole chain;
    the spectra are summed block by block, so that they stay there.
    """
    *several, length = chain.shape
    segment = fft.next_fast_len(max(max_lag, 1), real=True)
    count = -(-length // segment)
    step = max(BLOCK // (segment * int(np.prod(several))), 1)
    total = np.zeros((*several, segment + 1), dtype=np.complex128)
    for start in range(0, count, step):
        stop = min(start + step, count)
        spectra = _spectra(chain[..., start * segment : (stop + 1) * segment], segment, min(stop + 1, count) - start)
        own = spectra[..., : stop - start, :]
        within = np.sum(own.real**2 + own.imag**2, axis=-2)
        between = np.sum(spectra[..., :-1, :].conj() * spectra[..., 1:, :], axis=-2)
        between[..., 1::2] *= -1  # a shift by one segment, half the length of the transform
        total += within + between
    return fft.irfft(total, 2 * segment, axis=-1)[..., : max_lag + 1]


def _spectra(piece: NDArray[np.float64], segment: int, count: int) -> NDArray[np.complex128]:
    segments = np.zeros((*piece.shape[:-1], count * segment))
    segments[..., : piece.shape[-1]] = piece
    return fft.rfft(segments.reshape(*piece.shape[:-1], count, segment), 2 * segment, axis=-1)
