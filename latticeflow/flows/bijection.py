"""What every flow layer is: an invertible map between latent `z` and field `x` with its log-determinant."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Bijection(nn.Module, ABC):
    """An invertible map of fields `(batch, *shape)` that knows its Jacobian.

    `forward(z) -> (x, log|det dx/dz|)` and `inverse(x) -> (z, log|det dz/dx|)`, the log-determinants `(batch,)`.
    """

    @abstractmethod
    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map latent to field."""

    @abstractmethod
    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map field to latent."""


class Sequential(Bijection):
    """The composition of bijections, the first acting first on the latent; log-determinants are summed in float64."""

    def __init__(self, layers: Iterable[Bijection] = ()) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros(len(z), dtype=torch.float64, device=z.device)
        for layer in self.layers:
            z, log_det = layer(z)
            total = total + log_det.double()
        return z, total

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for layer in reversed(self.layers):
            x, log_det = layer.inverse(x)
            total = total + log_det.double()
        return x, total
