"""Monte Carlo histories as a tuple of replica, checked once."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

Series = ArrayLike | Sequence[ArrayLike]
SHORTEST_CHAIN = 4


def as_replica(
    series: Series, replica: Sequence[int] | None = None, *, name: str = "series"
) -> tuple[NDArray[np.float64], ...]:
    """Return the history as one float64 array per replica.

    ``series`` is one chain ``(n,)``, chains of equal length ``(replica, n)``, or a list of chains ``(n_r,)``.
    ``replica`` cuts one concatenated chain ``(n,)`` into pieces of the given lengths, whose sum must be ``n``.
    Raises ValueError for another shape, a chain of fewer than 4 samples, complex values, NaN or infinity (naming
    the index).
    """
    chains = _split_by_shape(series) if replica is None else _split_by_length(_float_array(series), replica)
    for number, chain in enumerate(chains):
        _check_chain(chain, name, f"replica {number}, " if len(chains) > 1 else "")
    return chains


def as_tables(series: Series) -> tuple[NDArray[np.float64], ...]:
    """Return the history of ``K`` observables as one float64 array ``(n_r, K)`` per replica.

    ``series`` is one chain ``(n, K)``, chains ``(replica, n, K)``, or a list of chains ``(n_r, K)``.
    Raises ValueError for another shape, unequal ``K``, a chain of fewer than 4 samples, complex values, NaN or infinity
    (naming replica, sample and observable).
    """
    tables = _split_by_shape(series, inner=2)
    widths = {table.shape[1:] for table in tables}
    if len(widths) != 1 or any(table.ndim != 2 or table.shape[1] == 0 for table in tables):
        shapes = [table.shape for table in tables]
        raise ValueError(f"series must be (n, K), (replica, n, K) or a list of (n_r, K) with one K, found {shapes}")
    for number, table in enumerate(tables):
        _check_table(table, f"replica {number}, " if len(tables) > 1 else "")
    return tables


def pooled_mean(chains: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return the mean over all samples of all chains ``(..., N_r)``, ``sum_r sum_i a / sum_r N_r``."""
    return sum(chain.sum(axis=-1) for chain in chains) / sum(chain.shape[-1] for chain in chains)


def check_values(
    values: NDArray[np.float64],
    name: str,
    *,
    legal: Callable[[NDArray[np.float64]], NDArray[np.bool_]] = np.isfinite,
) -> None:
    """Raise ValueError, with the index, where an array holds a value that is not legal."""
    allowed = legal(values)
    if not allowed.all():
        index = tuple(int(i) for i in np.unravel_index(np.argmin(allowed), values.shape))
        place = index[0] if len(index) == 1 else index
        raise ValueError(f"{name} must not hold {values[index]}, found at index {place}")


def _split_by_shape(series: Series, inner: int = 1) -> tuple[NDArray[np.float64], ...]:
    """Return the chains, each of ``inner`` axes, that an array or a list of them holds."""
    if isinstance(series, list | tuple) and len(series) > 0 and np.ndim(series[0]) >= inner:
        return tuple(_float_array(chain) for chain in series)
    array = _float_array(series)
    return (array,) if array.ndim <= inner else tuple(array)


def _split_by_length(array: NDArray[np.float64], lengths: Sequence[int]) -> tuple[NDArray[np.float64], ...]:
    if array.ndim != 1 or sum(lengths) != array.size:
        raise ValueError(f"replica lengths {tuple(lengths)} must add up to the samples of one chain {array.shape}")
    edges = np.concatenate(([0], np.cumsum(lengths)))
    return tuple(array[start:stop] for start, stop in pairwise(edges))


def _float_array(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values)
    if np.iscomplexobj(array):
        raise ValueError("series must be real: analyse the real and the imaginary part one by one")
    return array.astype(np.float64, copy=False)


def _check_chain(chain: NDArray[np.float64], name: str, where: str) -> None:
    if chain.ndim != 1:
        raise ValueError(f"{where}{name} must be (n,), (replica, n) or a list of (n,), found shape {chain.shape}")
    _check_length(chain, where)
    check_values(chain, f"{where}{name}")


def _check_table(table: NDArray[np.float64], where: str) -> None:
    _check_length(table, where)
    if not np.isfinite(table).all():
        sample, observable = np.argwhere(~np.isfinite(table))[0]
        value = table[sample, observable]
        raise ValueError(f"{where}series must not hold {value}, found at sample {sample}, observable {observable}")


def _check_length(chain: NDArray[np.float64], where: str) -> None:
    if len(chain) < SHORTEST_CHAIN:
        raise ValueError(f"{where}a chain needs at least {SHORTEST_CHAIN} samples, found {len(chain)}")
