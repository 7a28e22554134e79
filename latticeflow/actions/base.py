"""What every action is: `S(field) -> (batch,)`, with its force."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Generator, Tensor


class Action(ABC):
    """A lattice action: `exp(-S)` is the unnormalised density of the field.

    `theory` names it in files, `field_name` names its field; `field_shape` gives the shape of one configuration.

    An action may be a marginal over the orbits of a finite group, `exp(-S_bar(x)) = mean_g exp(-S(g x))`; a chain then
    accepts and rejects with `S_bar` and draws g afterwards. `orbit`, `marginal` and `draw` say how; here the group
    has one element and they do nothing.
    """

    theory: str
    field_name: str

    @abstractmethod
    def __call__(self, field: Tensor) -> Tensor:
        """Return S of each configuration, `(batch, ...) -> (batch,)`."""

    @abstractmethod
    def field_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of one configuration on a lattice of this shape."""

    def orbit(self, field: Tensor) -> Tensor:
        """Return `S(g x)` for every g, `(batch, *group)`; the first element is the field itself."""
        return self(field)[:, None]

    def marginal(self, orbit: Tensor) -> Tensor:
        """Return the action that is accepted and rejected with, from the orbit, `(batch,)`."""
        return orbit.flatten(1)[:, 0]

    def draw(self, field: Tensor, orbit: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw g with probability proportional to `exp(-S(g x))`; return `g x` and its orbit."""
        return field, orbit

    @property
    def bare(self) -> "Action":
        """Return the action of which this one may be a marginal."""
        return self

    def wrap(self, field: Tensor) -> Tensor:
        """Return the same field by its standard representative: angles on `(-pi, pi]`; here nothing changes."""
        return field

    def force(self, field: Tensor) -> Tensor:
        """Return `-dS/dfield`, the field's shape."""
        with torch.enable_grad():
            leaf = field.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self(leaf).sum(), leaf)
        return -gradient


class ModifiedAction(Action):
    """An action made of another one, `action`, for the same field."""

    action: Action

    @property
    def theory(self) -> str:
        return self.action.theory

    @property
    def field_name(self) -> str:
        return self.action.field_name

    def field_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.action.field_shape(shape)

    def wrap(self, field: Tensor) -> Tensor:
        return self.action.wrap(field)


def check_coupling(name: str, value: float, *, low: float = -math.inf, below: float = math.inf) -> float:
    """Return `value` as a float; raise ValueError unless it is finite with `low <= value < below`."""
    number = float(value)
    if not math.isfinite(number) or not low <= number < below:
        raise ValueError(f"{name} must be a finite number in [{low:g}, {below:g}), got {value!r}")
    return number
