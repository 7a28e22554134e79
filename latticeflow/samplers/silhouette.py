"""How well clusters are separated: silhouette scores of many labellings of the same points at once."""

from collections.abc import Sequence

import numpy as np
from scipy.spatial.distance import cdist

ROWS = 1000


def silhouettes(points: np.ndarray, labellings: Sequence[np.ndarray]) -> list[float]:
    """Return the mean over points of `(b - a) / max(a, b)` for each labelling.

    a is a point's mean distance from the others of its cluster, b the smallest mean distance from another cluster; a
    point alone in its cluster counts 0. Points are `(n, d)`, labels `(n,)`, of two clusters or more. All labellings
    share the n^2 distances. Source: Rousseeuw, J. Comput. Appl. Math. 20 (1987) 53.
    """
    members = [_indicators(labels) for labels in labellings]
    if not members:
        return []
    side_by_side = np.concatenate(members, axis=1)
    starts = range(0, len(points), ROWS)
    totals = np.concatenate([cdist(points[start : start + ROWS], points) @ side_by_side for start in starts])
    edges = np.cumsum([member.shape[1] for member in members])[:-1]
    return [_score(*pair) for pair in zip(np.split(totals, edges, axis=1), members, strict=True)]


def _indicators(labels: np.ndarray) -> np.ndarray:
    """Return `(n, clusters)`, 1 where the point is in the cluster, else 0."""
    numbers = np.unique(labels)
    if len(numbers) < 2:
        raise ValueError(f"a silhouette needs two clusters or more, got {len(numbers)}")
    return (labels[:, None] == numbers).astype(np.float64)


def _score(totals: np.ndarray, members: np.ndarray) -> float:
    sizes, own = members.sum(axis=0), members.astype(bool)
    alone = (members @ sizes) == 1
    within = totals[own] / np.maximum(members @ sizes - 1, 1)
    between = np.where(own, np.inf, totals / sizes).min(axis=1)
    largest = np.maximum(within, between)
    score = np.divide(between - within, largest, out=np.zeros_like(largest), where=(largest > 0) & ~alone)
    return float(score.mean())
