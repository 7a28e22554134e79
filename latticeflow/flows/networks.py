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


class Conditioner(nn.Module):
    """Convolutions `channels[0] -> ... -> channels[-1]` over cells, SiLU between them, one neighbour table each.

    `cells (batch, cells, channels[0])` and `context (batch, contexts)`, what is known of the whole configuration,
    which enters the first layer: `-> (batch, cells, channels[-1])`. The last layer starts at `last_scale` times the
    usual size, so that a coupling starts near the identity, and the context with weight 0.
    """

    def __init__(
        self, channels: Sequence[int], neighbours: Sequence[Tensor], *, contexts: int, last_scale: float = 0.01
    ) -> None:
        super().__init__()
        sizes = zip(pairwise(channels), neighbours, strict=True)
        self.layers = nn.ModuleList(CellConvolution(a, b, table) for (a, b), table in sizes)
        self.context = nn.Linear(contexts, channels[1], bias=False)
        with torch.no_grad():
            self.layers[-1].linear.weight.mul_(last_scale)
            self.layers[-1].linear.bias.zero_()
            self.context.weight.zero_()

    def forward(self, cells: Tensor, context: Tensor) -> Tensor:
        x = self.layers[0](cells) + self.context(context)[:, None]
        for layer in self.layers[1:]:
            x = layer(nn.functional.silu(x))
        return x
