"""The character coefficients of one plaquette weight, `f(t) = int dphi/2pi exp(beta cos phi) cos(t phi)`.

For an integer order `f(n) = I_n(beta)`, and a Bessel function gives it. For a real order `cos(t phi)` is not periodic:
`f` then oscillates, falls only like `1/t`, and is integrated by Gauss-Legendre panels on `[0, pi]`. Everything is
relative to `f(0)`, so nothing overflows.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import ive, roots_legendre

_NEGLIGIBLE_EXPONENT = 100.0  # plaquette angles with weight below exp(-100) are left out
_PANEL_ORDER, _PANEL_PHASE = 32, 40.0  # 32 nodes integrate exp(i t phi) to rounding over 40 radians of phase


def character_orders(beta: float, volume: int) -> NDArray[np.int64]:
    """Orders `-n_max..n_max` beyond which `I_n(beta)^volume` is negligible beside `I_0(beta)^volume`."""
    n_max = 30 + math.ceil(10.0 * math.sqrt(beta / volume))
    return np.arange(-n_max, n_max + 1)


def character_ratio(order: NDArray[np.int64], beta: float) -> NDArray[np.float64]:
    """`I_n(beta) / I_0(beta)` for integer orders of either sign; near one, so that large powers keep their digits."""
    return ive(np.abs(order), beta) / ive(0, beta)


def log_mean_weight(beta: float) -> float:
    """`log I_0(beta)`, the logarithm of the Haar mean of one plaquette weight."""
    return beta + math.log(ive(0, beta))


def panel_quadrature(start: float, stop: float, *, panels: int = 4) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gauss-Legendre nodes and weights on equal panels of `[start, stop]`.

    Panels of low order keep the weights exact to rounding, which those of one rule of order 1000 are not.
    """
    nodes, weights = roots_legendre(_PANEL_ORDER)
    half_width = 0.5 * (stop - start) / panels
    centres = start + half_width * (2 * np.arange(panels) + 1)
    return np.add.outer(centres, half_width * nodes).ravel(), np.tile(half_width * weights, panels)


def angle_quadrature(beta: float, t_max: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Nodes on `[0, pi]` and weights of the normalised even density `exp(beta cos phi) / (2 pi I_0(beta))`.

    The weights sum to one. The panels resolve `cos(t phi)` for every `|t| <= t_max`; at large `beta` the interval ends
    where the density is negligible, so their number does not grow with `beta`.
    """
    phi_max = math.pi if beta <= 0.5 * _NEGLIGIBLE_EXPONENT else math.acos(1.0 - _NEGLIGIBLE_EXPONENT / beta)
    phi, weights = panel_quadrature(0.0, phi_max, panels=4 + math.ceil(t_max * phi_max / _PANEL_PHASE))
    density = weights * np.exp(-2.0 * beta * np.sin(0.5 * phi) ** 2)
    return phi, density / density.sum()


def log_character_ratio(
    t: NDArray[np.float64], beta: float, *, t_max: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`log|f(t)/f(0)|` and its sign for real orders `|t| <= t_max`.

    `1 - f(t)/f(0)` is the mean of `2 sin^2(t phi/2)`, a sum of positive terms, so the logarithm keeps its relative
    accuracy near `t = 0` and may be multiplied by a large volume.
    """
    phi, density = angle_quadrature(beta, t_max)
    deficit = 2.0 * np.sin(0.5 * np.multiply.outer(t, phi)) ** 2 @ density
    with np.errstate(divide="ignore"):
        log_abs = np.where(deficit < 1.0, np.log1p(-np.minimum(deficit, 1.0)), np.log(np.abs(deficit - 1.0)))
    return log_abs, np.sign(1.0 - deficit)
