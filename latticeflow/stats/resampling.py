"""Errors from blocks of samples: the jackknife and the blocking curve."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from latticeflow.stats.series import check_values

FEWEST_BLOCKS = 4


@dataclass(frozen=True)
class BlockingResult:
    """The naive error of the mean of block averages against the block size; all arrays have one length."""

    block: NDArray[np.int64]
    error: NDArray[np.float64]
    error_error: NDArray[np.float64]


def jackknife(
    function: Callable[[NDArray[np.float64]], ArrayLike], data: ArrayLike, *, block: int = 1, of_mean: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a function of the data and its jackknife error, both of the shape that the function returns.

    ``error^2 = (B-1)/B sum_b (f_b - mean f_b)^2``, where ``f_b`` is ``function`` without block ``b`` of the ``B``.
    ``data`` is ``(n, ...)``, samples first; it is cut into ``n // block`` blocks of (nearly) equal length. ``function``
    takes samples ``(m, ...)``, or with ``of_mean`` the mean of the samples, of shape ``(...)``, which is much faster.
    Raises ValueError for data that are not finite and for fewer than two blocks.
    """
    samples = np.asarray(data, dtype=np.float64)
    edges = _block_edges(samples, block)
    arguments = _means_without(samples, edges) if of_mean else _samples_without(samples, edges)
    value = np.asarray(function(samples.mean(axis=0) if of_mean else samples), dtype=np.float64)
    replicates = np.array([function(argument) for argument in arguments], dtype=np.float64)
    return value[()], np.sqrt((len(replicates) - 1) * replicates.var(axis=0))


def blocking(series: ArrayLike) -> BlockingResult:
    """Return the error of the mean from averages over blocks of 1, 2, 4, ... samples, while there are four blocks.

    ``error^2 = var(block means) / (B - 1)``, uncertain by ``1 / sqrt(2 (B - 1))`` of itself. The error rises with the
    block size to a plateau at the true one. ``series`` is ``(n,)``; samples beyond the last full block are left out.
    Raises ValueError for a series that is not finite or shorter than four samples.
    """
    chain = np.asarray(series, dtype=np.float64)
    if chain.ndim != 1 or chain.size < FEWEST_BLOCKS:
        raise ValueError(f"series must be (n,) with n >= {FEWEST_BLOCKS}, found shape {chain.shape}")
    check_values(chain, "series")
    sizes = 2 ** np.arange(int(np.log2(chain.size // FEWEST_BLOCKS)) + 1)
    counts = chain.size // sizes
    errors = np.array([_naive_error(chain, size, count) for size, count in zip(sizes, counts, strict=True)])
    return BlockingResult(block=sizes, error=errors, error_error=errors / np.sqrt(2 * (counts - 1)))


def _naive_error(chain: NDArray[np.float64], size: int, count: int) -> float:
    means = chain[: size * count].reshape(count, size).mean(axis=1)
    return float(np.sqrt(means.var() / (count - 1)))


def _block_edges(samples: NDArray[np.float64], block: int) -> NDArray[np.int64]:
    if samples.ndim == 0 or block < 1 or samples.shape[0] // block < 2:
        raise ValueError(f"data of shape {samples.shape} must hold at least two blocks of {block} >= 1 samples")
    check_values(samples, "data")
    count = samples.shape[0] // block
    return np.arange(count + 1) * samples.shape[0] // count


def _samples_without(samples: NDArray[np.float64], edges: NDArray[np.int64]) -> Iterator[NDArray[np.float64]]:
    return (np.concatenate((samples[:start], samples[stop:])) for start, stop in pairwise(edges))


def _means_without(samples: NDArray[np.float64], edges: NDArray[np.int64]) -> NDArray[np.float64]:
    sums = np.add.reduceat(samples, edges[:-1], axis=0)
    left = (samples.shape[0] - np.diff(edges)).reshape(-1, *[1] * (samples.ndim - 1))
    return (samples.sum(axis=0) - sums) / left
