"""Observables of the variables of a density, `(batch, D)`."""

from torch import Tensor


def first_coordinate(x: Tensor) -> Tensor:
    """Return `x_0`, `(batch,)`: in a funnel the one that sets the width of the others."""
    return x[:, 0]


def coordinate_mean(x: Tensor) -> Tensor:
    """Return `(1/D) sum_i x_i`, `(batch,)`."""
    return x.mean(dim=1)


def coordinates(x: Tensor) -> Tensor:
    """Return `x_i`, `(batch, D)`."""
    return x


def coordinates_squared(x: Tensor) -> Tensor:
    """Return `x_i^2`, `(batch, D)`."""
    return x**2
