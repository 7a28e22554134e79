"""Cutting samples of a target into pieces, one for each flow of a piecewise sampler."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from scipy.spatial.distance import cdist
from torch import Tensor

from latticeflow.lattice import check_integer

SCORED = 5000
"""The most samples that a silhouette score is computed from; its cost grows with their square."""
RESTARTS = 4
NOISE = -1


class Clusterer(Protocol):
    """What scikit-learn's clusterers have in common."""

    def fit_predict(self, X: Any, /) -> Any:
        """Return the number of the cluster of each row of `(n, d)`, `(n,)` integers, -1 for none."""


@dataclass(frozen=True, eq=False)
class Partition:
    """Which piece each of n samples belongs to.

    `labels`, `(n,)` int64, count from 0; `sizes[k]` is the number of samples of piece k, none of them 0; `silhouettes`
    has the score of every number of pieces that was tried, for one piece none.
    """

    labels: Tensor
    silhouettes: dict[int, float]
    sizes: tuple[int, ...]

    @property
    def pieces(self) -> int:
        """Return the number of pieces."""
        return len(self.sizes)

    @property
    def weights(self) -> tuple[float, ...]:
        """Return the fraction of the samples in each piece, `N_k / N`."""
        return tuple(size / sum(self.sizes) for size in self.sizes)


def partition(
    features: Tensor,
    *,
    clusters: int | None = None,
    smallest: int = 100,
    most: int = 20,
    clusterer: Clusterer | None = None,
    noise: Literal["refuse", "nearest"] = "refuse",
    seed: int = 0,
) -> Partition:
    """Cluster samples by their features: order parameters such as magnetisation or charge, or the samples themselves.

    Features are `(n,)`, `(n, d)` or `(n, ...)`, of any numbers; distances are Euclidean, so features of different units
    need scaling beforehand. Without `clusters` and `clusterer`, K-means runs for k = 2..`most` and the k of the largest
    silhouette score is taken, or, where it has a cluster with fewer than `smallest` samples, the best of the smaller k,
    in the end one piece. Above 5000 samples a score is that of 5000 of them, picked at random; clusters are those of
    all. The same arguments give the same result; `seed` is that of the starts of K-means and of that choice.

    `clusters` fixes k. `clusterer` is any object with scikit-learn's `fit_predict`; samples that it leaves without a
    cluster (label -1) are refused, or put to the nearest centre of a cluster (`noise="nearest"`).

    Raises ValueError for features that are not finite or do not vary, more clusters than distinct samples, a cluster
    below `smallest` where k is fixed or the clusterer's, and arguments that do not fit. Source: arXiv:2305.02930,
    section 3; Rousseeuw, J. Comput. Appl. Math. 20 (1987) 53 (silhouettes).
    """
    data = _check_features(features)
    check_integer("smallest", smallest, low=1)
    check_integer("most", most, low=2)
    if noise not in ("refuse", "nearest"):
        raise ValueError(f"noise must be 'refuse' or 'nearest', got {noise!r}")
    if clusters is not None and clusterer is not None:
        raise ValueError(f"clusters or clusterer, not both: got {clusters} and {type(clusterer).__name__}")
    if len(data) < smallest:
        raise ValueError(f"{len(data)} samples, expected at least {smallest}, the smallest cluster")
    if clusters is not None:
        labels, scores = _fixed(data, clusters, seed)
    elif clusterer is not None:
        labels, scores = _by_clusterer(data, clusterer, noise, seed)
    else:
        labels, scores = _searched(data, smallest, most, seed)
    return _checked(labels, scores, smallest, features.device)


def from_labels(labels: Tensor, *, smallest: int = 1) -> Partition:
    """Return the partition of samples whose pieces are known: topological sectors, signs of a magnetisation.

    `labels (n,)` are integers that count the pieces from 0, each with at least `smallest` samples, else ValueError.
    """
    if labels.dim() != 1 or labels.dtype.is_floating_point or labels.dtype.is_complex or not len(labels):
        found = f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise ValueError(f"labels must be integers of shape (n,), n > 0, got {found}")
    found = torch.unique(labels).tolist()
    if found != list(range(len(found))):
        raise ValueError(f"labels must be 0..k-1, each there, got {_shown(found)}")
    check_integer("smallest", smallest, low=1)
    return _checked(labels.cpu().numpy().astype(np.int64), {}, smallest, labels.device)


def _fixed(data: np.ndarray, clusters: int, seed: int) -> tuple[np.ndarray, dict[int, float]]:
    if not isinstance(clusters, int) or isinstance(clusters, bool) or not 1 <= clusters <= len(data):
        raise ValueError(f"clusters must be an integer of 1 to {len(data)}, the number of samples, got {clusters!r}")
    if clusters == 1:
        return np.zeros(len(data), dtype=np.int64), {}
    _check_variation(data)
    if (distinct := _distinct(data)) < clusters:
        raise ValueError(f"{clusters} clusters of {distinct} distinct samples, expected at most {distinct}")
    labels = _k_means(data, clusters, seed)
    return labels, _scores(data, [labels], seed)


def _by_clusterer(data: np.ndarray, clusterer: Clusterer, noise: str, seed: int) -> tuple[np.ndarray, dict[int, float]]:
    if not callable(getattr(clusterer, "fit_predict", None)):
        raise ValueError(f"clusterer must have the method fit_predict, {type(clusterer).__name__} has none")
    _check_variation(data)
    name, found = type(clusterer).__name__, np.asarray(clusterer.fit_predict(data))
    if found.shape != (len(data),) or found.dtype.kind not in "iu":
        raise ValueError(
            f"{name}.fit_predict must return {len(data)} integers, got {found.dtype} of shape {found.shape}"
        )
    lost = found == NOISE
    if lost.all():
        raise ValueError(f"{name} puts none of {len(data)} samples into a cluster")
    if lost.any() and noise == "refuse":
        raise ValueError(
            f"{name} leaves {int(lost.sum())} of {len(data)} samples without a cluster (label -1); "
            "noise='nearest' puts each to the nearest centre"
        )
    numbers, labels = np.unique(found[~lost], return_inverse=True)
    complete = np.empty(len(data), dtype=np.int64)
    complete[~lost] = labels
    centres = np.stack([data[~lost][labels == k].mean(axis=0) for k in range(len(numbers))])
    complete[lost] = _nearest(data[lost], centres)
    return complete, _scores(data, [complete], seed)


def _searched(data: np.ndarray, smallest: int, most: int, seed: int) -> tuple[np.ndarray, dict[int, float]]:
    _check_variation(data)
    largest = min(most, _distinct(data), len(data) - 1)
    tried = {k: _k_means(data, k, seed) for k in range(2, largest + 1)}
    scores = _scores(data, tried.values(), seed)
    fitting = sorted(scores)
    while fitting:
        best = max(fitting, key=scores.__getitem__)
        if np.bincount(tried[best]).min() >= smallest:
            return tried[best], scores
        fitting = [k for k in fitting if k < best]
    return np.zeros(len(data), dtype=np.int64), scores


def _k_means(data: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    return KMeans(clusters, n_init=RESTARTS, random_state=seed).fit_predict(data).astype(np.int64)


def _scores(data: np.ndarray, labellings: Iterable[np.ndarray], seed: int) -> dict[int, float]:
    """Return silhouette scores by the number of clusters, without those that have no meaning: of one cluster, say."""
    from sklearn.metrics import silhouette_score

    chosen = slice(None)
    if len(data) > SCORED:
        chosen = np.random.default_rng(seed).choice(len(data), SCORED, replace=False)
    points = data[chosen]
    distances = cdist(points, points)
    scored = {int(labels.max()) + 1: labels[chosen] for labels in labellings}
    scored = {k: labels for k, labels in scored.items() if 2 <= len(np.unique(labels)) < len(labels)}
    return {k: float(silhouette_score(distances, labels, metric="precomputed")) for k, labels in scored.items()}


def _nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return ((points[:, None] - centres) ** 2).sum(-1).argmin(axis=1)


def _checked(labels: np.ndarray, scores: dict[int, float], smallest: int, device: torch.device) -> Partition:
    sizes = tuple(np.bincount(labels).tolist())
    if min(sizes) < smallest:
        k = sizes.index(min(sizes))
        raise ValueError(f"cluster {k} of {len(sizes)} has {sizes[k]} samples, expected at least {smallest}")
    return Partition(torch.from_numpy(labels).to(device), scores, sizes)


def _check_features(features: Tensor) -> np.ndarray:
    """Return the features as `(n, d)` in double precision."""
    if not isinstance(features, Tensor) or features.dim() == 0 or not features.numel() or features.is_complex():
        found = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"features must be a real tensor (n, d) or (n,), none of them 0, got {found}")
    data = features.detach().cpu().double().reshape(len(features), -1).numpy()
    bad = np.flatnonzero(~np.isfinite(data).all(axis=1))
    if len(bad):
        raise ValueError(f"features must be finite, {len(bad)} of {len(data)} samples are not, the first is {bad[0]}")
    return data


def _check_variation(data: np.ndarray) -> None:
    constant = np.flatnonzero((data == data[0]).all(axis=0)).tolist()
    if constant:
        raise ValueError(f"features must vary: of {data.shape[1]} columns {_shown(constant)} are constant")


def _distinct(data: np.ndarray) -> int:
    return len(np.unique(data, axis=0))


def _shown(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 12 else f"[{', '.join(map(str, numbers[:12]))}, ...]"
