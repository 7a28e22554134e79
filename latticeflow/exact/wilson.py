"""Wilson fermions where the answer is known: the free field, the leading hopping term, critical hopping parameters.

`M = 1 - kappa sum_mu [(1-g_mu) U_mu(x) delta_{x+mu,y} + (1+g_mu) U_mu(x-mu)^* delta_{x-mu,y}]` in two dimensions,
antiperiodic in direction 0.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from latticeflow.exact.arguments import extents, finite

CRITICAL_KAPPA: dict[float, float] = {
    1.0: 0.29769,
    2.0: 0.27728,
    3.0: 0.26811,
    4.0: 0.26362,
    5.0: 0.26096,
    6.0: 0.25932,
}
"""Critical hopping parameter of the two-flavour Schwinger model by `beta`. Source: hep-lat/0510047."""

_ZERO_MODE = 1e-28  # squared rounding errors of a momentum, well below the determinant of any other mode


def wilson_free_log_det(kappa: float, shape: Sequence[int], *, twist: Sequence[float] = (0.0, 0.0)) -> float:
    """Logarithm of the determinant of the free Wilson operator.

    `log det M = sum_p log[(1 - 2 kappa sum_mu cos p_mu)^2 + 4 kappa^2 sum_mu sin^2 p_mu]`,
    `p_0 = (2 pi (n + 1/2) + twist_0)/L0`, `p_1 = (2 pi n + twist_1)/L1`

    `shape` is `(L0, L1)`; `twist` holds the phases that the constant field `U_mu = exp(i twist_mu/L_mu)` gathers around
    the lattice, in radians. Minus infinity where a zero momentum is massless, `kappa = 1/4` and `twist_0 = pi`. Raises
    ValueError for a `kappa` or a twist that is not finite and for a bad shape.
    Source: `M` is diagonal in momentum, with a 2 x 2 block of spin.
    """
    scalar_part, vector_part = _momentum_parts(kappa, shape, twist)
    with np.errstate(divide="ignore"):
        return float(np.log(scalar_part**2 + vector_part).sum())


def wilson_free_condensate(kappa: float, shape: Sequence[int]) -> float:
    """Condensate `Re Tr M^{-1} / V` of the free Wilson operator, equal to 2 at `kappa = 0`.

    `(1/V) sum_p 2 a_p / (a_p^2 + 4 kappa^2 sum_mu sin^2 p_mu)`, `a_p = 1 - 2 kappa sum_mu cos p_mu`

    `shape` is `(L0, L1)`. Raises ValueError for a `kappa` that is not finite or where the operator has an exact zero
    mode, and for a bad shape. Source: `Tr M^{-1} = 2 V - kappa d log det M / d kappa` and the determinant above.
    """
    scalar_part, vector_part = _momentum_parts(kappa, shape, (0.0, 0.0))
    determinant = scalar_part**2 + vector_part
    if determinant.min() < _ZERO_MODE:
        raise ValueError(f"kappa = {kappa!r}: the free Wilson operator on {tuple(shape)!r} has a zero mode")
    return float(np.mean(2.0 * scalar_part / determinant))


def hopping_log_det(kappa: float, cos_plaquette_sum: ArrayLike) -> float | NDArray[np.float64]:
    """Leading term of the hopping expansion of the Wilson determinant.

    `log det M = 8 kappa^4 sum_x cos P(x) + O(kappa^6)`

    `cos_plaquette_sum` is `sum_x cos P(x)`, a number or an array, and the result has its shape. Both extents must be
    at least 6: a loop around a direction of `L` sites enters at `kappa^L`. Raises ValueError for a `kappa` that is not
    finite. Source: `log det M = -sum_n kappa^n Tr H^n / n`, closed paths of four hops.
    """
    result = 8.0 * finite("kappa", kappa) ** 4 * np.asarray(cos_plaquette_sum, dtype=np.float64)
    return float(result) if result.ndim == 0 else result


def _momentum_parts(
    kappa: float, shape: Sequence[int], twist: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`1 - 2 kappa sum_mu cos p_mu` and `4 kappa^2 sum_mu sin^2 p_mu`, each of shape `(L0, L1)`."""
    kappa, lattice = finite("kappa", kappa), extents(shape)
    if len(twist) != 2:
        raise ValueError(f"twist = {twist!r}: expected one phase per direction")
    phases = (math.pi + finite("twist[0]", twist[0]), finite("twist[1]", twist[1]))
    boundary = [math.remainder(phase, 2.0 * math.pi) for phase in phases]  # so that a zero momentum is exactly zero
    momenta = [(2.0 * math.pi * np.arange(size) + phase) / size for size, phase in zip(lattice, boundary, strict=True)]
    p_0, p_1 = np.meshgrid(*momenta, indexing="ij")
    return 1.0 - 2.0 * kappa * (np.cos(p_0) + np.cos(p_1)), 4.0 * kappa**2 * (np.sin(p_0) ** 2 + np.sin(p_1) ** 2)
