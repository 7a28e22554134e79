"""What every sampler offers."""

from abc import ABC, abstractmethod

import torch
from torch import Generator, Tensor, nn

from latticeflow.actions import Action
from latticeflow.streams import SharedStream


class Sampler(nn.Module, ABC):
    """A trainable distribution of fields that can be drawn from and whose density is known."""

    @abstractmethod
    def sample(self, n: int, generator: Generator | SharedStream | None = None) -> tuple[Tensor, Tensor]:
        """Return n independent fields and their `log q`, `(n,)` float64; gradients flow to the parameters.

        Of a stream that processes share they are those of this process.
        """

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Return `log q` of given fields, `(batch,)` float64, with gradients to parameters and fields."""

    def sample_held(self, n: int, generator: Generator | SharedStream | None = None) -> tuple[Tensor, Tensor]:
        """Return n draws and their log q, whose gradients are those of the density at these fields, held fixed."""
        with torch.no_grad():
            x, _ = self.sample(n, generator)
        return x, self.log_prob(x)

    def refine(self, action: Action, generator: Generator | None = None, *, draws: int = 512) -> bool:
        """Adapt to the action what gradients do not; return whether there was anything."""
        return False
