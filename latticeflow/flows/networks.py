"""Conditioner networks: of gauge couplings over mask cells, of couplings of real fields over sites."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from latticeflow.flows.asked import Asked
from latticeflow.flows.site_masks import window

IN_CACHE = 2**18
"""Numbers in the windows that a convolution fills at a time: about what the cache of a CPU's core holds."""


@dataclass(frozen=True)
class _Met:
    """A product of weights with `x`, or with windows of it, and the derivative by what came out."""

    linear: nn.Linear
    x: Tensor
    table: Tensor | None
    of_output: Tensor


@dataclass
class Postponed:
    """Gradients of weights by `F = sum_i c_i F_i` over a batch whose factors c_i are known only afterwards.

    While they are collected, the products of conditioners take their weights as constants; differentiating
    `sum_i F_i` by what goes in leaves here what the weights' gradients need: each product's input and the derivative by
    its output, configuration by configuration.
    """

    met: list[_Met] = field(default_factory=list)
    current: ClassVar["Postponed | None"] = None

    @contextmanager
    def collected(self) -> Iterator[None]:
        Postponed.current = self
        try:
            yield
        finally:
            Postponed.current = None

    def wait(self, linear: nn.Linear, x: Tensor, table: Tensor | None, output: Tensor) -> None:
        """Note this product when its output is differentiated."""
        held = x.detach()
        output.register_hook(lambda of_output: self.met.append(_Met(linear, held, table, of_output)))

    @torch.no_grad()
    def gradients(self, factors: Tensor) -> dict[nn.Parameter, Tensor]:
        """Return the gradients for these factors, `(batch,)`; a product may hold several times the batch in turn."""
        found: dict[nn.Parameter, list[Tensor]] = defaultdict(list)
        for met in self.met:
            several = met.of_output.unflatten(0, (-1, len(factors)))
            own = factors.to(several.dtype).view(-1, *[1] * (several.ndim - 2))
            of_output = (several * own).flatten(0, 1)
            found[met.linear.weight].append(_gradient_of_weight(met.x, met.table, of_output))
            if met.linear.bias is not None:
                found[met.linear.bias].append(of_output.flatten(0, -2).sum(0))
        return {weight: sum(terms[1:], terms[0]) for weight, terms in found.items()}


def _collecting() -> bool:
    """Return whether products are to wait for what autograd makes of their output."""
    return Postponed.current is not None and torch.is_grad_enabled()


class CellConvolution(nn.Module):
    """A periodic convolution over mask cells, written as a gather of neighbours and one matrix product.

    `(batch, cells_in, channels_in) -> (batch, cells, channels_out)`. `neighbours (cells, window)` is any table of the
    numbers of the cells that come in, so sheared boundaries need no padding, and the cells need not be the same. A
    window of one cell is the cell itself.
    """

    def __init__(self, channels_in: int, channels_out: int, neighbours: Tensor) -> None:
        super().__init__()
        self.register_buffer("neighbours", neighbours.flatten(), persistent=False)
        self.cells, self.window = neighbours.shape
        self.register_buffer("readers", _readers(neighbours), persistent=False)
        self.linear = nn.Linear(self.window * channels_in, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        if self.window == 1:
            return _product(self.linear, x)
        if self.readers is None:
            return _product(self.linear, _gather(x, self.neighbours, self.cells))
        if not _collecting():
            return self._windows_product(x, self.linear.weight, self.linear.bias)
        output = self._windows_product(x, self.linear.weight.detach(), self.linear.bias.detach())
        Postponed.current.wait(self.linear, x, self.neighbours, output)
        return output

    def pull(self, of_output: Tensor, channels: int) -> Tensor:
        """Return the derivative by what came in, of so many channels, given that by what went out."""
        if self.window == 1:
            return of_output @ self.linear.weight
        return _gradient_of_input(self.linear.weight, channels, self.readers, of_output)

    def _windows_product(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _WindowProduct.apply(x, weight, bias, self.neighbours, self.readers)

    @torch.no_grad()
    def gather_images(self, distance: Tensor, channels: Sequence[int] | None = None) -> None:
        """Give the places of the window that are always the same cell all their weight at those of least distance.

        `distance (window,)`; of these input channels only, where given. What comes out stays, but for rounding.
        """
        table = self.neighbours.view(self.cells, self.window)
        weight = self.linear.weight.view(len(self.linear.weight), self.window, -1)
        chosen = torch.arange(weight.shape[2]) if channels is None else torch.as_tensor(channels)
        for images in {tuple((table == table[:, [k]]).all(0).nonzero().flatten().tolist()) for k in range(self.window)}:
            places = torch.tensor(images)
            nearest = places[distance[places] == distance[places].min()]
            total = weight[:, places][..., chosen].sum(1)
            for k in images:
                weight[:, k, chosen] = total / len(nearest) if k in nearest else 0.0


def _product(linear: nn.Linear, x: Tensor) -> Tensor:
    if not _collecting():
        return linear(x)
    output = nn.functional.linear(x, linear.weight.detach(), None if linear.bias is None else linear.bias.detach())
    Postponed.current.wait(linear, x, None, output)
    return output


def _gather(x: Tensor, table: Tensor, cells: int) -> Tensor:
    """Return what the window of each cell holds, `(batch, cells, window * channels)`."""
    return x.index_select(1, table).view(len(x), cells, -1)


def _readers(neighbours: Tensor) -> Tensor | None:
    """Return, for every cell, which cell sees it at each place of the window; None where that is not one each."""
    cells, window = neighbours.shape
    if window == 1 or not bool((neighbours.sort(dim=0).values == torch.arange(cells)[:, None]).all()):
        return None
    return neighbours.argsort(dim=0).flatten()


class _WindowProduct(torch.autograd.Function):
    """`x -> W (windows of x) + b`, keeping x alone, a ninth of its 3x3 windows; the gradient gathers as well.

    The transpose of a gather by permutations is a gather by their inverses, of the cells that read each cell. Windows
    are filled and multiplied for a few configurations at a time: they stay in the cache, where the gather costs little.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, neighbours: Tensor, readers: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, neighbours, readers)
        output = x.new_empty(*x.shape[:2], len(weight))
        for some, windows in _windows(x, neighbours):
            torch.addmm(bias, windows, weight.t(), out=output[some].flatten(0, 1))
        return output

    @staticmethod
    def backward(ctx: FunctionCtx, of_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, neighbours, readers = ctx.saved_tensors
        of_output = of_output.contiguous()
        if torch.is_grad_enabled():
            return _recorded_gradient(x, weight, neighbours, of_output)
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = _gradient_of_input(weight, x.shape[2], readers, of_output)
        if ctx.needs_input_grad[1] and Asked.weights:
            of_weight, of_bias = _gradient_of_weight(x, neighbours, of_output), of_output.sum((0, 1))
        return of_x, of_weight, of_bias, None, None


def _windows(x: Tensor, table: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield some configurations and their windows, `(some * cells, window * channels)`, all in the same memory."""
    batch, cells, channels = x.shape
    at_once = x.is_cuda or torch.compiler.is_compiling()
    pieces = 1 if at_once else min(batch, -(-batch * len(table) * channels // IN_CACHE))
    size = max(1, -(-batch // max(1, pieces)))  # all of about one size
    memory = x.new_empty(size, len(table), channels)
    for first in range(0, batch, size):
        some = slice(first, min(first + size, batch))
        windows = memory[: some.stop - first]
        torch.index_select(x[some], 1, table, out=windows)
        yield some, windows.view(-1, len(table) // cells * channels)


def _gradient_of_weight(x: Tensor, table: Tensor | None, of_output: Tensor) -> Tensor:
    """Return the gradient of W in `y = W (windows of x) + b`, or `y = W x + b` without a table."""
    if table is None:
        return of_output.flatten(0, -2).t() @ x.flatten(0, -2)
    of_weight = x.new_zeros(of_output.shape[-1], len(table) // x.shape[1] * x.shape[2])
    for some, windows in _windows(x, table):
        of_weight.addmm_(of_output[some].flatten(0, 1).t(), windows)
    return of_weight


def _gradient_of_input(weight: Tensor, channels: int, readers: Tensor, of_output: Tensor) -> Tensor:
    """Gather the gradient of the output, or what W makes of it where that is smaller."""
    batch, cells, outputs = of_output.shape
    window = len(readers) // cells
    if outputs <= 2 * channels:
        transposed = weight.view(outputs, window, channels).transpose(0, 1).reshape(-1, channels)
        of_x = of_output.new_empty(batch, cells, channels)
        for some, windows in _windows(of_output, readers):
            torch.mm(windows, transposed, out=of_x[some].flatten(0, 1))
        return of_x
    places = readers * window + torch.arange(window, device=readers.device).repeat(cells)
    of_windows = (of_output @ weight).view(batch, cells * window, channels)
    return of_windows.index_select(1, places).view(batch, cells, window, channels).sum(2)


def _recorded_gradient(x: Tensor, weight: Tensor, table: Tensor, of_output: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients in a form that can be differentiated again."""
    windows = _gather(x, table, x.shape[1])
    of_x = torch.zeros_like(x).index_add(1, table, (of_output @ weight).view(len(x), len(table), -1))
    return of_x, of_output.flatten(0, 1).mT @ windows.flatten(0, 1), of_output.sum((0, 1)), None, None


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
        return self.outputs(cells, context)[-1]

    def outputs(self, cells: Tensor, context: Tensor | None = None) -> list[Tensor]:
        """Return what comes out of every layer."""
        x = self.layers[0](cells)
        found = [x if self.context is None else x + _product(self.context, context)[:, None]]
        for layer in self.layers[1:]:
            found.append(layer(nn.functional.silu(found[-1])))
        return found

    def pull(self, cells: Tensor, outputs: list[Tensor], of_last: Tensor) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """Return the derivatives by every layer's output, by the cells and by the context, given that by the last."""
        found = [of_last]
        for layer, before in zip(self.layers[:0:-1], outputs[-2::-1], strict=True):
            found.append(torch.ops.aten.silu_backward(layer.pull(found[-1], before.shape[2]), before))
        of_context = None if self.context is None else found[-1].sum(1) @ self.context.weight
        return found[::-1], self.layers[0].pull(found[-1], cells.shape[2]), of_context

    def postpone(self, cells: Tensor, context: Tensor | None, outputs: list[Tensor], of_outputs: list[Tensor]) -> None:
        """Leave the gradients of the weights to what collects them."""
        waiting = Postponed.current.met
        inputs = [cells, *map(nn.functional.silu, outputs[:-1])]
        for layer, x, of_output in zip(self.layers, inputs, of_outputs, strict=True):
            waiting.append(_Met(layer.linear, x, layer.neighbours if layer.window > 1 else None, of_output))
        if self.context is not None:
            waiting.append(_Met(self.context, context, None, of_outputs[0].sum(1)))


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
