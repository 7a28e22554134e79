"""Scalar field theory where the answer is known: the free field and the Schwinger-Dyson identity of `phi^4`.

`S = sum_x [m2 phi^2 + lam phi^4 + sum_mu (phi(x+mu) - phi(x))^2]`, Lebesgue measure, periodic, one to four dimensions.
Note the normalisation: no factor of one half, so a free mode has variance `1 / (2 (m2 + khat^2))`.
"""

import math
from collections.abc import Sequence
from functools import reduce

import numpy as np
from numpy.typing import ArrayLike, NDArray

from latticeflow.exact.arguments import extents, finite, non_negative

_DIMENSIONS = (1, 2, 3, 4)


def khat_squared(shape: Sequence[int]) -> NDArray[np.float64]:
    """Eigenvalues of the lattice Laplacian, with the sign that makes them positive, of shape `shape`.

    `khat^2 = sum_mu 4 sin^2(k_mu/2)`, `k_mu = 2 pi n_mu / L_mu`

    Raises ValueError unless `shape` has one to four positive extents. Source: plane waves on the torus.
    """
    lattice = extents(shape, dimensions=_DIMENSIONS)
    terms = [4.0 * np.sin(math.pi * np.arange(size) / size) ** 2 for size in lattice]
    return reduce(np.add.outer, terms)


def scalar_free_log_z(m2: float, shape: Sequence[int]) -> float:
    """Logarithm of the partition function of the free scalar field.

    `log Z = (V/2) log pi - 1/2 sum_k log(m2 + khat^2)`

    Raises ValueError unless `m2` is finite and positive and `shape` has one to four positive extents.
    Source: a Gaussian integral for each momentum.
    """
    eigenvalues = _eigenvalues(m2, shape)
    return float(0.5 * (eigenvalues.size * math.log(math.pi) - np.log(eigenvalues).sum()))


def scalar_free_phi_squared(m2: float, shape: Sequence[int]) -> float:
    """Mean of the squared free scalar field at one site.

    `<phi^2> = (1/V) sum_k 1/(2 (m2 + khat^2))`

    Raises ValueError unless `m2` is finite and positive and `shape` has one to four positive extents.
    Source: a Gaussian integral for each momentum.
    """
    return float(np.mean(0.5 / _eigenvalues(m2, shape)))


def schwinger_dyson_residual(
    m2: float, lam: float, phi2: ArrayLike, phi4: ArrayLike, phi_neighbour: ArrayLike, *, dimension: int = 2
) -> float | NDArray[np.float64]:
    """What is left of the Schwinger-Dyson identity `<phi dS/dphi> = 1`; zero for the exact means.

    `2 m2 <phi^2> + 4 lam <phi^4> + 4 d (<phi^2> - <phi phi_nn>) - 1`, in two dimensions with the factor 8

    `phi2`, `phi4` and `phi_neighbour` are the means of `phi^2`, `phi^4` and `phi(x) phi(x+mu)`, the last averaged over
    the `d` directions; numbers or arrays of one shape, which the result has. Raises ValueError for an `m2` that is not
    finite, a `lam` that is negative or not finite, and a dimension outside 1 to 4.
    Source: partial integration in `phi(x)`.
    """
    m2, lam = finite("m2", m2), non_negative("lam", lam)
    if dimension not in _DIMENSIONS:
        raise ValueError(f"dimension = {dimension!r}: expected 1, 2, 3 or 4")
    square, quartic, neighbour = (np.asarray(mean, dtype=np.float64) for mean in (phi2, phi4, phi_neighbour))
    residual = 2.0 * m2 * square + 4.0 * lam * quartic + 4.0 * dimension * (square - neighbour) - 1.0
    return float(residual) if residual.ndim == 0 else residual


def _eigenvalues(m2: float, shape: Sequence[int]) -> NDArray[np.float64]:
    if finite("m2", m2) <= 0.0:
        raise ValueError(f"m2 = {m2!r}: expected a positive number, the free field has no other ground state")
    return float(m2) + khat_squared(shape)
