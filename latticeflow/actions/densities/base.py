"""What every density is: an action of D real variables, `(batch, D) -> (batch,)`, perhaps with a known integral."""

import math
from abc import abstractmethod

from torch import Tensor

from latticeflow.actions.base import Action


class Density(Action):
    """A density of D real variables: `exp(-S(x))` for fields x of shape `(batch, D)`, in the field's precision.

    `dimension` is D; `log_z` is the exact logarithm of the integral of `exp(-S)` over x, None where it is unknown.
    Densities with exact independent draws have `sample(n, generator)` (`Drawable`), the others no such method.
    Calling it raises ValueError unless the field is `(batch, D)`.
    """

    field_name = "x"
    dimension: int
    log_z: float | None = None

    def __call__(self, field: Tensor) -> Tensor:
        if field.dim() != 2 or field.shape[1] != self.dimension:
            expected = f"(batch, {self.dimension})"
            raise ValueError(f"{self.theory}: field has shape {tuple(field.shape)}, expected {expected}")
        return self._action(field)

    @abstractmethod
    def _action(self, x: Tensor) -> Tensor:
        """Return S of each configuration, the shape being right."""

    def field_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return `(D,)`, the shape of one configuration; raises ValueError if the lattice has another shape."""
        if tuple(shape) != (self.dimension,):
            raise ValueError(
                f"{self.theory}: lattice shape {list(shape)} does not fit dimension {self.dimension}, "
                f"expected [{self.dimension}]"
            )
        return (self.dimension,)


def check_positive(name: str, value: float) -> float:
    """Return `value` as a float; raise ValueError unless it is positive and finite."""
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
    return number
