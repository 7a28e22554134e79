"""Functions that give one or several observables, evaluated in chunks so that memory stays bounded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Observable = Callable[[Tensor], Tensor]
CHUNK = 256
BUDGET = 2**27  # bytes


def copies_of_the_field(shape: tuple[int, ...]) -> int:
    """Return the bytes of 16 real copies of a configuration of this shape."""
    return 16 * 8 * torch.Size(shape).numel()


@dataclass(frozen=True)
class Measurement:
    """Observables that one function computes together: `function(field)` holds each of them by name.

    `(batch, *shape) -> (batch, *own_shape)` each. `memory(shape)` is about the bytes that one configuration takes while
    it is measured; as many are measured at once as fit in 2^27 bytes, and at most 256.
    """

    names: tuple[str, ...]
    function: Callable[[Tensor], Mapping[str, Tensor]]
    memory: Callable[[tuple[int, ...]], int] = copies_of_the_field

    def __call__(self, field: Tensor) -> dict[str, Tensor]:
        chunk = min(CHUNK, max(1, BUDGET // self.memory(tuple(field.shape[1:]))))
        parts = [self.function(part) for part in field.split(chunk)]
        return {name: torch.cat([part[name] for part in parts]) for name in self.names}


@dataclass(frozen=True)
class Member:
    """One observable of a measurement, `(batch, *shape) -> (batch, *own_shape)`."""

    measurement: Measurement
    name: str

    def __call__(self, field: Tensor) -> Tensor:
        return self.measurement(field)[self.name]


def members(*measurements: Measurement) -> dict[str, Observable]:
    """Return the observables of these measurements by name."""
    return {name: Member(measurement, name) for measurement in measurements for name in measurement.names}


def single(name: str, function: Observable, memory: Callable[..., int] = copies_of_the_field) -> Measurement:
    """Return the measurement of one observable."""
    return Measurement((name,), lambda field: {name: function(field)}, memory)


def measure(field: Tensor, wanted: Mapping[str, Observable]) -> dict[str, Tensor]:
    """Evaluate observables on `(n, *shape)` configurations in chunks, `(n, *own_shape)` each.

    What is computed together is computed once, however many of its observables are wanted. A function that is no member
    of a measurement gets 256 configurations at a time.
    """
    found: dict[str, Tensor] = {}
    done: dict[Measurement, dict[str, Tensor]] = {}
    for name, observable in wanted.items():
        if isinstance(observable, Member):
            shared = observable.measurement
            if shared not in done:
                done[shared] = shared(field)
            found[name] = done[shared][observable.name]
        else:
            found[name] = torch.cat([observable(chunk) for chunk in field.split(CHUNK)])
    return found
