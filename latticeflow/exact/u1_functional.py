"""Means of Gaussians of a plaquette sum in compact U(1) on a two-dimensional torus.

For `X = sum_x s(P(x))` with an odd periodic function s, the characteristic function factorises over the plaquettes,

    <exp(i k X)> = sum_n f_n(k)^V / sum_n f_n(0)^V,   f_n(k) = int dphi/2pi exp(beta cos phi + i k s(phi) - i n phi),

the sum over n being the constraint that the plaquettes add up to a multiple of 2 pi. A Gaussian of X is a Gaussian
average of it over k. Both integrands are smooth, so equally spaced points are exact to rounding.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from latticeflow.exact.arguments import extents, gauge_coupling, non_negative

_LARGEST_WAVE = 9.0  # in widths of the Gaussian over k
_RANGE = 3.0  # |X| beyond this times sqrt(V) times the largest s is negligible


def u1_gaussian_log_mean(
    beta: float, shape: Sequence[int], c: float, *, function: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> float:
    """Logarithm of the mean of a Gaussian of a plaquette sum in pure gauge theory, at most zero.

    `log <exp(-c X^2)>`, `X = sum_x s(P(x))`, `s` being `function`, odd, smooth and 2 pi periodic.

    `shape` is `(L0, L1)`. Raises ValueError for a `beta` or `c` that is negative or not finite and for a bad shape.
    Source: Fourier transform of the Gaussian and the character expansion.
    """
    beta, volume, c = gauge_coupling(beta), math.prod(extents(shape)), non_negative("c", c)
    if c == 0.0:
        return 0.0
    phi = _angles(beta, volume)
    values = function(phi)
    # A step h in k repeats the Gaussian at distances 2 pi / h in X.
    distance = 2.0 * _RANGE * math.sqrt(volume) * float(np.abs(values).max()) + 9.0 / math.sqrt(c)
    step = 2.0 * math.pi / distance
    k = step * np.arange(math.ceil(_LARGEST_WAVE * math.sqrt(2.0 * c) / step) + 1)
    weights = np.exp(-(k**2) / (4.0 * c)) * np.where(k == 0.0, 1.0, 2.0)
    weights *= step / math.sqrt(4.0 * math.pi * c)
    return math.log(float(weights @ _characteristic(beta, volume, k, phi=phi, values=values)))


def _angles(beta: float, volume: int) -> NDArray[np.float64]:
    """Equally spaced plaquette angles, enough to resolve `exp(beta cos phi)` and its oscillations."""
    count = 2 ** math.ceil(math.log2(256 + 32 * math.sqrt(beta) + 8 * math.sqrt(volume)))
    return 2.0 * math.pi * np.arange(count) / count


def _characteristic(
    beta: float, volume: int, k: NDArray[np.float64], *, phi: NDArray[np.float64], values: NDArray[np.float64]
) -> NDArray[np.float64]:
    """`<exp(i k X)>` for every k; f_n is real since s is odd."""
    density = np.exp(beta * (np.cos(phi) - 1.0))
    density /= density.sum()
    factors = np.fft.fft(density * np.exp(1j * np.multiply.outer(k, values)), axis=1).real ** volume
    return factors.sum(axis=1) / factors[0].sum()
