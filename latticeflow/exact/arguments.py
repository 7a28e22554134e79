"""Argument checks shared by the closed-form answers: one place, so that every error reads alike."""

import math
import operator
from collections.abc import Sequence

LARGEST_BETA = 1e6


def finite(name: str, value: float) -> float:
    """Return `value` as a float; raises ValueError, naming it, when it is not finite."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} = {value!r}: expected a finite number")
    return number


def non_negative(name: str, value: float) -> float:
    """Return `value` as a float; raises ValueError, naming it, when it is negative or not finite."""
    number = finite(name, value)
    if number < 0.0:
        raise ValueError(f"{name} = {value!r}: expected a number >= 0")
    return number


def gauge_coupling(beta: float) -> float:
    """Return `beta` as a float; raises ValueError, naming it, when it is negative, not finite or above 1e6.

    The character sums have of the order of `sqrt(beta)` terms, so a slip of the exponent would exhaust the memory.
    """
    number = non_negative("beta", beta)
    if number > LARGEST_BETA:
        raise ValueError(f"beta = {beta!r}: expected at most {LARGEST_BETA:g}")
    return number


def extents(shape: Sequence[int], *, dimensions: Sequence[int] = (2,)) -> tuple[int, ...]:
    """Return the lattice shape as positive integers.

    Raises ValueError, naming the shape, when the number of extents is not one of `dimensions` or when an
    extent is not a positive integer.
    """
    try:
        result = tuple(operator.index(extent) for extent in shape)
    except TypeError:
        raise ValueError(f"shape = {shape!r}: expected a tuple of integers") from None
    if len(result) not in dimensions:
        expected = " or ".join(str(number) for number in dimensions)
        raise ValueError(f"shape = {shape!r}: expected {expected} extents, found {len(result)}")
    if min(result) < 1:
        raise ValueError(f"shape = {shape!r}: expected positive extents")
    return result
