"""What every prior offers, and where and in which precision it draws."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Generator, Tensor


class Prior(ABC):
    """A distribution of fields that can be drawn exactly."""

    @abstractmethod
    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """Return n independent fields, float64, on the generator's device."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log density of each field, `(n, ...) -> (n,)`."""


def device_options(generator: Generator | None) -> dict[str, Any]:
    """Return the keywords of a float64 tensor on the generator's device, without one on the CPU."""
    device = generator.device if generator is not None else torch.device("cpu")
    return {"dtype": torch.float64, "device": device}


def draw_options(generator: Generator | None) -> dict[str, Any]:
    """Return the keywords of float64 random numbers from this generator, on its device."""
    return {"generator": generator, **device_options(generator)}
