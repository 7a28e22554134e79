"""What every prior offers."""

from abc import ABC, abstractmethod

from torch import Generator, Tensor


class Prior(ABC):
    """A distribution of fields that can be drawn exactly."""

    @abstractmethod
    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """Return n independent fields, float64, on the generator's device."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log density of each field, `(n, ...) -> (n,)`."""
