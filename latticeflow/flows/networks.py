"""Conditioner networks."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class CellConvolution(nn.Module):
    """A periodic convolution over mask cells, written as a gather of neighbours and one matrix product.

    A window of one cell is the cell itself.

    `(batch, cells, channels_in) -> (batch, cells, channels_out)`. `neighbours (cells, window)` is any table of cell
    numbers, so sheared boundaries need no padding.
    """

    def __init__(self, channels_in: int, channels_out: int, neighbours: Tensor) -> None:
        super().__init__()
        self.register_buffer("neighbours", neighbours.flatten(), persistent=False)
        self.window = neighbours.shape[1]
        self.linear = nn.Linear(self.window * channels_in, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        if self.window == 1:
            return self.linear(x)
        batch, cells, channels = x.shape
        return self.linear(x.index_select(1, self.neighbours).view(batch, cells, self.window * channels))


def convolution_stack(
    channels: Sequence[int], neighbours: Sequence[Tensor], *, last_scale: float = 0.01
) -> nn.Sequential:
    """Return convolutions `channels[0] -> ... -> channels[-1]` with SiLU between them, one neighbour table each.

    The last one starts at `last_scale` times the usual size, so that a coupling starts near the identity.
    """
    layers: list[nn.Module] = []
    for (channels_in, channels_out), table in zip(pairwise(channels), neighbours, strict=True):
        layers += [CellConvolution(channels_in, channels_out, table), nn.SiLU()]
    layers.pop()
    with torch.no_grad():
        layers[-1].linear.weight.mul_(last_scale)
        layers[-1].linear.bias.zero_()
    return nn.Sequential(*layers)
