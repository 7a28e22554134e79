"""Has the chain reached equilibrium, and do the chains agree?"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from latticeflow.stats.series import as_replica


def split_r_hat(chains: ArrayLike) -> float:
    """Return the ratio of the spread of all half chains to the spread within one; 1 in equilibrium.

    ``sqrt(((n-1)/n W + B/n) / W)`` over the two halves, of ``n`` samples, of each chain, with ``W`` the mean of their
    variances and ``B/n`` the variance of their means (arXiv:1903.08008, section 2). Above 1.01 the chains have not
    mixed; infinite where they stand still in different places. ``chains`` is ``(n,)`` or ``(replica, n)``, an odd
    sample in the middle is left out. Raises ValueError for chains of unequal length, below 4 samples, or not finite.
    """
    halves = _halves(chains)
    length = halves.shape[1]
    if np.all(halves == halves[:, :1]):
        return 1.0 if np.all(halves == halves[0, 0]) else float("inf")
    within = halves.var(axis=1, ddof=1).mean()
    between = halves.mean(axis=1).var(ddof=1)
    return float(np.sqrt((length - 1) / length + between / within))


def thermalisation_cut(series: ArrayLike) -> int:
    """Return how many samples to leave out at the start: a proposal, to be checked against a plot.

    The cut ``c <= n/2`` that minimises the naive squared error of what remains, ``var(a[c:]) / (n - c)``: dropping
    samples that are still on their way lowers the variance, dropping good ones costs statistics (MSER, K. P. White,
    Simulation 69, 1997, 323). A result close to ``n/2`` says that the chain is too short. ``series`` is ``(n,)``.
    Raises ValueError for another shape, fewer than 4 samples, or values that are not finite.
    """
    chain, *more = as_replica(series)
    if more:
        raise ValueError(f"series must be one chain (n,), found {1 + len(more)} chains")
    deviations = chain - chain[-1]
    left = np.arange(chain.size, 0, -1)
    sums = np.cumsum(deviations[::-1])[::-1]
    squares = np.cumsum(deviations[::-1] ** 2)[::-1]
    squared_error = (squares - sums**2 / left) / left.astype(float) ** 2
    return int(np.argmin(squared_error[: chain.size // 2 + 1]))


def _halves(chains: ArrayLike) -> NDArray[np.float64]:
    replica = as_replica(chains)
    lengths = {chain.size for chain in replica}
    if len(lengths) > 1:
        raise ValueError(f"chains must have one length, found {sorted(lengths)}")
    half = lengths.pop() // 2
    return np.array([part for chain in replica for part in (chain[:half], chain[-half:])])
