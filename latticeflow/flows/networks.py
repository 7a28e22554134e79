"""Conditioner networks: of gauge couplings over mask cells, of couplings of real fields over sites."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from latticeflow.flows.site_masks import window


class CellConvolution(nn.Module):
    """A periodic convolution over mask cells, written as a gather of neighbours and one matrix product.

    A window of one cell is the cell itself.

    `(batch, cells_in, channels_in) -> (batch, cells, channels_out)`. `neighbours (cells, window)` is any table of the
    numbers of the cells that come in, so sheared boundaries need no padding, and the cells need not be the same.
    """

    def __init__(self, channels_in: int, channels_out: int, neighbours: Tensor) -> None:
        super().__init__()
        self.register_buffer("neighbours", neighbours.flatten(), persistent=False)
        self.cells, self.window = neighbours.shape
        self.linear = nn.Linear(self.window * channels_in, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        if self.window == 1:
            return self.linear(x)
        batch, _, channels = x.shape
        return self.linear(x.index_select(1, self.neighbours).view(batch, self.cells, self.window * channels))


class Conditioner(nn.Module):
    """Convolutions `channels[0] -> ... -> channels[-1]` over cells, SiLU between them, one neighbour table each.

    `cells (batch, cells, channels[0])` and `context (batch, contexts)`, what is known of the whole configuration,
    which enters the first layer: `-> (batch, cells, channels[-1])`. The last layer starts at `last_scale` times the
    usual size, so that a coupling starts near the identity, and the context with weight 0.
    """

    def __init__(
        self, channels: Sequence[int], neighbours: Sequence[Tensor], *, contexts: int = 0, last_scale: float = 0.01
    ) -> None:
        super().__init__()
        sizes = zip(pairwise(channels), neighbours, strict=True)
        self.layers = nn.ModuleList(CellConvolution(a, b, table) for (a, b), table in sizes)
        self.context = nn.Linear(contexts, channels[1], bias=False) if contexts else None
        with torch.no_grad():
            self.layers[-1].linear.weight.mul_(last_scale)
            self.layers[-1].linear.bias.zero_()
            if self.context is not None:
                self.context.weight.zero_()

    def forward(self, cells: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.layers[0](cells)
        if self.context is not None:
            x = x + self.context(context)[:, None]
        for layer in self.layers[1:]:
            x = layer(nn.functional.silu(x))
        return x


class SiteConditioner(nn.Module):
    """What the frozen sites say to each active one: `(batch, frozen) -> (batch, active, outputs)`.

    "dense": one network that sees all frozen sites and `log(1 + |frozen|^2)`, for scales that follow the size of the
    whole as in heavy tails, and knows every active site by its own weights. "convolution": windows of `kernel^d` sites
    around each active one, over the frozen sites in the first layer and of `inner_kernel^d` over the active ones in
    the others, with the same weights everywhere, so that they fit a lattice of any size. Raises ValueError for another
    conditioner, and for convolutions of a mask that does not look the same everywhere.
    """

    def __init__(
        self,
        mask: Tensor,
        outputs: int,
        *,
        hidden: Sequence[int],
        conditioner: str = "convolution",
        kernel: int = 3,
        inner_kernel: int = 1,
    ) -> None:
        super().__init__()
        if conditioner not in ("convolution", "dense"):
            raise ValueError(f"conditioner must be 'convolution' or 'dense', got {conditioner!r}")
        active = int(mask.sum())
        self.dense = conditioner == "dense"
        self.shape = (active, outputs)
        if self.dense:
            tables = [torch.zeros(1, 1, dtype=torch.int64)] * (len(hidden) + 1)
            channels = [mask.numel() - active, *hidden, active * outputs]
        else:
            tables = [window(mask, ~mask, kernel), *[window(mask, mask, inner_kernel)] * len(hidden)]
            channels = [1, *hidden, outputs]
        self.network = Conditioner(channels, tables, contexts=int(self.dense))
        if self.dense:
            nn.init.uniform_(self.network.context.weight, -1, 1)  # the usual size for one input: it must be noticed

    def forward(self, frozen: Tensor) -> Tensor:
        if not self.dense:
            return self.network(frozen[..., None])
        size = torch.log1p((frozen**2).sum(1, keepdim=True))
        return self.network(frozen[:, None], size).reshape(len(frozen), *self.shape)
