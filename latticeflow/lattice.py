"""Lattice geometry: shapes, neighbours and wrapping boundaries, for any number of dimensions and any extents."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Shape = tuple[int, ...]


def check_shape(shape: Sequence[int], *, dimensions: int | None = None) -> Shape:
    """Return `shape` as a tuple of positive integers.

    Raises ValueError if an extent is not a positive integer, or if their number differs from `dimensions`.
    """
    extents = tuple(shape)
    if dimensions is not None and len(extents) != dimensions:
        raise ValueError(f"lattice shape {list(extents)} has {len(extents)} extents, expected {dimensions}")
    if not extents or any(not isinstance(extent, int) or extent < 1 for extent in extents):
        raise ValueError(f"lattice shape {list(extents)} must hold positive integers")
    return extents


def check_integer(name: str, value: int, *, low: int) -> int:
    """Return `value`; raise ValueError unless it is an integer of at least `low`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
    return value


def volume(shape: Sequence[int]) -> int:
    """Return the number of sites."""
    return math.prod(shape)


def shift(field: Tensor, mu: int, steps: int = 1, *, dimensions: int = 2) -> Tensor:
    """Return `field(x + steps * mu)` with periodic boundaries; the lattice axes are the last `dimensions` ones."""
    return torch.roll(field, -steps, mu - dimensions)


def site_index(shape: Sequence[int]) -> Tensor:
    """Return the row-major number of every site, an integer tensor of the lattice's shape."""
    return torch.arange(volume(shape)).reshape(*shape)


def site_mean(field: Tensor, dimensions: int = 2) -> Tensor:
    """Return the mean over the last `dimensions` axes."""
    return field.mean(dim=tuple(range(-dimensions, 0)))


def site_sum(field: Tensor, dimensions: int = 2) -> Tensor:
    """Return the sum over the last `dimensions` axes."""
    return field.sum(dim=tuple(range(-dimensions, 0)))
