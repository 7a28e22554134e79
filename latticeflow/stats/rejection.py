"""What the rejections alone say about an independence Metropolis chain."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def rejection_tau(accepted: ArrayLike) -> float:
    """Return the integrated autocorrelation time of a chain that forgets everything at each acceptance.

    ``1/2 + sum_{t>=1} rho_acc(t)``, ``rho_acc(t) = sum_k max(L_k - t + 1, 0) / (N - t + 1)`` with ``L_k`` the lengths
    of the runs of rejections: the share of all ``t`` steps in a row that were all rejected (arXiv:1904.12072). A
    diagnostic, never an error bar: observables that are tied to the weights are slower.
    ``accepted`` holds booleans, ``(n,)`` or ``(replica, n)``. Raises ValueError for anything else.
    """
    chains = _as_chains(accepted)
    runs = np.concatenate([rejection_runs(chain) for chain in chains])
    if runs.size == 0:
        return 0.5
    histogram = np.bincount(runs)
    longer = np.cumsum(histogram[::-1])[::-1]  # runs of at least this length
    rejected = np.cumsum(longer[::-1])[::-1][1:]  # sum_k max(L_k - t + 1, 0) for t = 1, 2, ...
    steps = chains.shape[1] - np.arange(rejected.size)
    return 0.5 + float(np.sum(rejected / (chains.shape[0] * steps)))


def longest_rejection_run(accepted: ArrayLike) -> int:
    """Return the largest number of rejections in a row, 0 if there are none; shapes and errors as ``rejection_tau``."""
    return max(int(rejection_runs(chain).max(initial=0)) for chain in _as_chains(accepted))


def rejection_runs(accepted: Sequence[bool] | NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the lengths of the runs of rejections, in order, of one chain ``(n,)``."""
    bounded = np.concatenate(([True], np.asarray(accepted, dtype=bool), [True]))
    gaps = np.diff(np.flatnonzero(bounded)) - 1
    return gaps[gaps > 0]


def _as_chains(accepted: ArrayLike) -> NDArray[np.bool_]:
    array = np.atleast_2d(np.asarray(accepted))
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"accepted must be (n,) or (replica, n) with n > 0, found shape {np.shape(accepted)}")
    if not np.isin(array, (0, 1)).all():
        raise ValueError(f"accepted must hold booleans, found {array[~np.isin(array, (0, 1))][0]}")
    return array.astype(bool)
