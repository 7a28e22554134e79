"""Compact U(1) gauge theory on a two-dimensional periodic torus: partition function, plaquette, Wilson loops.

All are sums over characters of powers of `I_n(beta) / I_0(beta)`, a ratio of exponentially scaled Bessel functions, so
nothing overflows and a power as large as the volume loses no digits.
`V = L0 L1` plaquettes, normalised Haar measure, action `-beta sum_x cos P(x)`.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp, xlogy

from latticeflow.exact.arguments import extents, gauge_coupling
from latticeflow.exact.u1_characters import character_orders, character_ratio, log_mean_weight
from latticeflow.exact.u1_charge import log_theta_ratio


def u1_log_z(beta: float, shape: Sequence[int], *, vartheta: float = 0.0) -> float:
    """Logarithm of the partition function, with a vacuum angle as an option.

    `Z(vartheta) = sum_n f(n + vartheta/2pi)^V`, `f(t) = int_{-pi}^{pi} dphi/2pi exp(beta cos phi) cos(t phi)`; at
    `vartheta = 0` this is `sum_n I_n(beta)^V`.

    `shape` is `(L0, L1)`; `vartheta` is in radians. Raises ValueError for a `beta` that is negative, not finite or
    above 1e6, a `vartheta` that is not finite and a bad shape. Source: the character expansion of the plaquette weight.
    """
    beta, volume = gauge_coupling(beta), math.prod(extents(shape))
    log_ratio = log_theta_ratio(beta, volume, vartheta)
    characters = character_ratio(character_orders(beta, volume), beta)
    return volume * log_mean_weight(beta) + float(logsumexp(xlogy(volume, characters))) + log_ratio


def u1_plaquette(beta: float, shape: Sequence[int]) -> float:
    """Mean plaquette of pure gauge theory.

    `<cos P> = (1/Z) sum_n I_n^{V-1} (I_{n-1} + I_{n+1})/2`

    `shape` is `(L0, L1)`. Raises ValueError for a `beta` that is negative, not finite or above 1e6, and for a bad
    shape. Source: `(1/V) d log Z / d beta`.
    """
    beta, volume = gauge_coupling(beta), math.prod(extents(shape))
    orders = character_orders(beta, volume)
    characters = character_ratio(orders, beta)
    neighbours = 0.5 * (character_ratio(orders - 1, beta) + character_ratio(orders + 1, beta))
    log_terms = xlogy(volume - 1, characters) + xlogy(1, neighbours)
    return math.exp(float(logsumexp(log_terms) - logsumexp(xlogy(volume, characters))))


def u1_wilson_loop(beta: float, shape: Sequence[int], area: ArrayLike) -> float | NDArray[np.float64]:
    """Real part of the mean contractible Wilson loop that encloses `area` plaquettes.

    `<W(A)> = (1/Z) sum_n I_n^{V-A} I_{n+1}^A`

    `shape` is `(L0, L1)`; `area` is an integer or an array of integers, and the result has its shape. Raises ValueError
    for a `beta` that is negative, not finite or above 1e6, a bad shape and an area that is not an integer in `[0, V]`.
    Source: the character expansion, in which a loop raises the order of the plaquettes inside it by one.
    """
    beta, volume = gauge_coupling(beta), math.prod(extents(shape))
    areas = _check_areas(area, volume)
    orders = character_orders(beta, volume)
    outside, inside = character_ratio(orders, beta), character_ratio(orders + 1, beta)
    log_terms = xlogy(volume - areas[..., None], outside) + xlogy(areas[..., None], inside)
    loops = np.exp(logsumexp(log_terms, axis=-1) - logsumexp(xlogy(volume, outside)))
    return float(loops) if areas.ndim == 0 else loops


def _check_areas(area: ArrayLike, volume: int) -> NDArray[np.int64]:
    areas = np.asarray(area)
    if not np.issubdtype(areas.dtype, np.integer):
        raise ValueError(f"area = {area!r}: expected an integer or an array of integers")
    if areas.size and (areas.min() < 0 or areas.max() > volume):
        raise ValueError(f"area = {area!r}: expected values between 0 and the volume {volume}")
    return areas.astype(np.int64)
