"""The data of a Bayesian model: checked once, so that every error reads alike, and kept in float64."""

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


def check_features(features: ArrayLike | Tensor) -> Tensor:
    """Return a copy of the features, `(observations, d)`, float64.

    Raises ValueError unless they are a matrix of finite numbers with at least one row and one column.
    """
    found = _finite("features", features)
    if found.dim() != 2 or 0 in found.shape:
        raise ValueError(f"features must be a matrix (observations, d), none of them 0, got shape {tuple(found.shape)}")
    return found


def check_responses(name: str, values: ArrayLike | Tensor, features: Tensor) -> Tensor:
    """Return a copy of what was observed, `(observations,)`, float64.

    Raises ValueError unless they are finite numbers, one for each row of the features.
    """
    found = _finite(name, values)
    if found.shape != features.shape[:1]:
        raise ValueError(
            f"{name} must have shape ({len(features)},), one for each row of features, got {tuple(found.shape)}"
        )
    return found


def check_labels(values: ArrayLike | Tensor, features: Tensor) -> Tensor:
    """Return a copy of binary labels, `(observations,)`, float64; raises ValueError for one that is not 0 or 1."""
    labels = check_responses("labels", values, features)
    others = torch.nonzero((labels != 0) & (labels != 1))
    if len(others):
        first = int(others[0])
        raise ValueError(f"labels must be 0 or 1, got {float(labels[first]):g} at index {first}")
    return labels


def _finite(name: str, values: ArrayLike | Tensor) -> Tensor:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    try:
        found = torch.from_numpy(np.array(array, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers: {error}") from None
    bad = torch.nonzero(~torch.isfinite(found))
    if len(bad):
        first = tuple(bad[0].tolist())
        raise ValueError(f"{name} must be finite, got {float(found[first])} at index {list(first)}")
    return found
