"""Topological charge of compact U(1) on a two-dimensional periodic torus: vacuum angle, distribution, susceptibility.

The charge is `Q = (1/2pi) sum_x wrap(P(x))`, so `P(Q)` is, up to normalisation, the density at `2 pi Q` of a sum of
`V` independent plaquette angles on `(-pi, pi]`, whose Fourier transform is `f(t)^V` of `u1_characters`. As `|Q| < V/2`,
the partition function `Z(vartheta)` is a trigonometric polynomial, and equally spaced vacuum angles invert it exactly.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from latticeflow.exact.arguments import extents, finite, gauge_coupling, non_negative
from latticeflow.exact.u1_characters import (
    angle_quadrature,
    character_orders,
    character_ratio,
    log_character_ratio,
    log_mean_weight,
    panel_quadrature,
)

_SMALLEST_PROBABILITY = 1e-16
_TRUNCATION_DIGITS = 17
_CONVOLUTION_VOLUME = 4  # up to here f(t)^V falls too slowly, and a double integral is easy


def u1_charge_distribution(beta: float, shape: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Distribution of the topological charge of pure gauge theory.

    `P(Q) = int_0^{2pi} dvartheta/2pi exp(-i vartheta Q) Z(vartheta)/Z(0)`

    Returns the charges `-Q_max..Q_max` and their probabilities, both of shape `(2 Q_max + 1,)`: symmetric, normalised,
    and complete down to a probability of 1e-16; the error is absolute, below 1e-15. `shape` is `(L0, L1)`. Raises
    ValueError for a `beta` that is negative, not finite or above 1e6, and for a bad shape.
    Source: Fourier inversion of the character expansion with a vacuum angle, `sum_n f(n + vartheta/2pi)^V`.
    """
    beta, volume = gauge_coupling(beta), math.prod(extents(shape))
    half = _half_distribution(beta, volume)
    below = np.flatnonzero(half < _SMALLEST_PROBABILITY)
    half = half[: below[0]] if below.size else half
    probabilities = np.concatenate([half[:0:-1], half])
    charges = np.arange(1 - half.size, half.size)
    return charges, probabilities / probabilities.sum()


def u1_charge_log_z(beta: float, shape: Sequence[int], c: float) -> float:
    """Normalisation of the sector factor `exp(-c Q^2)` under the pure gauge distribution of the charge.

    `log sum_Q P(Q) exp(-c Q^2)`, at most zero.

    `shape` is `(L0, L1)`. Raises ValueError for a `beta` or a `c` that is negative or not finite, a `beta` above 1e6
    and a bad shape. Source: the definition; `P(Q)` is `u1_charge_distribution`.
    """
    c = non_negative("c", c)
    charges, probabilities = u1_charge_distribution(beta, shape)
    return math.log1p(float(probabilities @ np.expm1(-c * charges**2.0)))


def u1_susceptibility(beta: float, shape: Sequence[int]) -> float:
    """Topological susceptibility `chi_t = <Q^2>/V` of pure gauge theory.

    `chi_t = (1/4 pi^2 V) sum_n w_n [V f2_n/f_n - V (V-1) (f1_n/f_n)^2]`, `w_n = f_n^V / sum_m f_m^V`

    `f1_n` and `f2_n` are the integrals of `phi sin(n phi)` and `phi^2 cos(n phi)` over `dphi/2pi exp(beta cos phi)`.
    The two terms cancel when `beta` is large beside `V`, so the error is absolute, below 1e-15. `shape` is `(L0, L1)`.
    Raises ValueError for a `beta` that is negative, not finite or above 1e6, and for a bad shape.
    Source: minus the second derivative of `(1/V) log Z(vartheta)` at zero.
    """
    beta, volume = gauge_coupling(beta), math.prod(extents(shape))
    if volume <= 2:  # the angles sum to zero without wrapping
        return 0.0
    orders = character_orders(beta, volume)
    ratio = character_ratio(orders, beta)
    phi, density = angle_quadrature(beta, orders[-1])
    phase = np.multiply.outer(orders, phi)
    first, second = np.sin(phase) @ (density * phi), np.cos(phase) @ (density * phi**2)
    terms = second * ratio ** (volume - 1) - (volume - 1) * first**2 * ratio ** (volume - 2)
    return max(0.0, float(terms.sum() / (ratio**volume).sum()) / (4.0 * math.pi**2))


def log_theta_ratio(beta: float, volume: int, vartheta: float) -> float:
    """`log[Z(vartheta)/Z(0)]` of a torus of `volume` plaquettes, periodic in `vartheta` and at most zero.

    Raises ValueError for a `vartheta` that is not finite.
    """
    shift = math.remainder(finite("vartheta", vartheta), 2.0 * math.pi) / (2.0 * math.pi)
    if shift == 0.0:
        return 0.0
    if volume <= _CONVOLUTION_VOLUME:
        return math.log1p(-4.0 * _unit_charge_probability(beta, volume) * math.sin(math.pi * shift) ** 2)
    return _log_character_sum(beta, volume, shift) - _log_character_sum(beta, volume, 0.0)


def _log_character_sum(beta: float, volume: int, shift: float) -> float:
    n_max = _truncation_order(beta, volume)
    log_abs, sign = log_character_ratio(np.arange(-n_max, n_max + 1) + shift, beta, t_max=n_max + 1)
    return float(logsumexp(volume * log_abs, b=sign**volume))


def _half_distribution(beta: float, volume: int) -> NDArray[np.float64]:
    """Probabilities of `Q = 0, 1, ..`, the last ones negligible."""
    if volume <= _CONVOLUTION_VOLUME:
        unit = _unit_charge_probability(beta, volume)
        return np.array([1.0 - 2.0 * unit, unit])
    partition = _partition_on_angles(beta, volume)
    return np.fft.rfft(partition).real / (partition.size * partition[0])


def _partition_on_angles(beta: float, volume: int) -> NDArray[np.float64]:
    """`Z(vartheta)` up to a factor at equally spaced angles, enough of them to keep all charges apart."""
    charge_max = min((volume - 1) // 2, math.ceil(math.sqrt(7.0 * volume)))  # at beta = 0, P(Q) ~ exp(-6 Q^2/V)
    count, n_max = 2 * charge_max + 1, _truncation_order(beta, volume)
    log_abs, sign = log_character_ratio(np.arange(count * n_max) / count, beta, t_max=n_max)
    positive = (sign**volume * np.exp(volume * log_abs)).reshape(n_max, count)
    positive[0, 0] *= 0.5
    half = positive.sum(axis=0)
    return half + np.roll(half[::-1], 1)  # f is even in t


def _truncation_order(beta: float, volume: int) -> int:
    """Order beyond which `f(t)^V` may be dropped: a Gaussian bulk of width `sqrt(beta/V)` and a tail `t^-V`.

    The tail comes from the jump of the angle's density at `pi`; for odd `V` it alternates in sign, one power better.
    """
    bulk = 1.5 * math.sqrt(5.0 * _TRUNCATION_DIGITS * (beta + 1.0) / volume)
    jump = math.exp(-beta - log_mean_weight(beta))
    tail = jump / math.pi * 10.0 ** (_TRUNCATION_DIGITS / (volume - 1 + volume % 2))
    return math.ceil(bulk + tail)


def _unit_charge_probability(beta: float, volume: int) -> float:
    """`P(1)` for at most four plaquettes, where `|Q| <= 1`: the density of a pair's sum, against that of the rest."""
    if volume <= 2:
        return 0.0
    u, weights = panel_quadrature((4 - volume) * math.pi, 2.0 * math.pi)
    rest = _pair_density(2.0 * math.pi - u, beta) if volume == 4 else np.exp(-2.0 * beta * np.sin(0.5 * u) ** 2)
    convolution = float(weights @ (_pair_density(u, beta) * rest)) / (2.0 * math.pi) ** (volume - 1)
    partition = float((character_ratio(character_orders(beta, volume), beta) ** volume).sum())
    return convolution / partition * math.exp(volume * (beta - log_mean_weight(beta)))


def _pair_density(u: NDArray[np.float64], beta: float) -> NDArray[np.float64]:
    """`int dv exp[beta (cos(u/2 + v) + cos(u/2 - v) - 2)]` over `|v| < pi - u/2`, for a sum `u` in `[0, 2 pi]`."""
    v, weights = panel_quadrature(0.0, 1.0)
    length = math.pi - 0.5 * u[:, None]
    exponent = 2.0 * beta * (np.cos(0.5 * u[:, None]) * np.cos(length * v) - 1.0)
    return 2.0 * length[:, 0] * (np.exp(exponent) @ weights)
