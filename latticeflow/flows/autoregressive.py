"""Masked autoregressive flows of real fields: each variable moves by an affine map that those before it choose.

The density takes one pass through a masked network (MADE, arXiv:1502.03509; stacked as MAF, 1705.07057). A draw goes
variable by variable, and computes at each only the hidden units that its value completes: one pass in all.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from latticeflow.flows.bijection import Bijection, Sequential
from latticeflow.flows.clamps import Clamp
from latticeflow.flows.coupling import AffineMap
from latticeflow.lattice import check_shape, volume

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {
    "elu": functional.elu,
    "gelu": functional.gelu,
    "relu": functional.relu,
    "silu": functional.silu,
    "softplus": functional.softplus,
    "tanh": torch.tanh,
}
NO_CLAMP = Clamp("none")


class MaskedLinear(nn.Linear):
    """A linear layer of ordered units: `y_a = b_a + sum_c W_ac x_c` over the c with `degrees_in[c] <= degrees_out[a]`.

    `(batch, inputs) -> (batch, outputs)`. Both lists of degrees ascend, so that what an output sees are the first
    inputs.
    """

    def __init__(self, degrees_in: Tensor, degrees_out: Tensor) -> None:
        super().__init__(len(degrees_in), len(degrees_out))
        self.register_buffer("mask", degrees_in <= degrees_out[:, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight * self.mask, self.bias)

    def block(self, x: Tensor, first: int, last: int) -> Tensor:
        """Return the outputs `first` to `last - 1`, which see just the inputs given, `(batch, first few)`."""
        return functional.linear(x, self.weight[first:last, : x.shape[1]], self.bias[first:last])


class MaskedNetwork(nn.Module):
    """Parameters `(s_i, t_i)` of each of D variables, from those before it: `(batch, D) -> (batch, D, 2)`.

    A hidden unit of degree m sees the first m variables, and `(s_i, t_i)` the units of degree below i (from 1). Degrees
    spread evenly over 1 to D - 1, so a layer narrower than that merges neighbours. For D = 1 there are no hidden
    layers. The last layer starts at a hundredth of the usual size.
    """

    def __init__(self, variables: int, hidden: Sequence[int], activation: Activation) -> None:
        super().__init__()
        inner = [_spread(width, variables - 1) for width in hidden] if variables > 1 else []
        degrees = [torch.arange(1, variables + 1), *inner, torch.arange(variables).repeat_interleave(2)]
        self.layers = nn.ModuleList(MaskedLinear(a, b) for a, b in pairwise(degrees))
        self.activation = activation
        self.known = [[int((units <= i).sum()) for i in range(variables)] for units in inner]
        with torch.no_grad():
            self.layers[-1].weight.mul_(0.01)
            self.layers[-1].bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x).unflatten(1, (-1, 2))

    def start(self, batch: Tensor) -> list[Tensor]:
        """Return the units that are known before any variable is: none, for the inputs and each hidden layer."""
        return [batch.new_empty(len(batch), 0) for _ in self.layers]

    def advance(self, units: list[Tensor], variable: int) -> Tensor:
        """Return the parameters `(batch, 2)` of a variable and add to `units` those that the one before it completes.

        `units[0]` are the variables before this one, `(batch, variable)`, and the others the hidden units known so far.
        """
        for depth, (layer, known) in enumerate(zip(self.layers[:-1], self.known, strict=True), start=1):
            first, last = units[depth].shape[1], known[variable]
            if first < last:
                fresh = self.activation(layer.block(units[depth - 1], first, last))
                units[depth] = torch.cat([units[depth], fresh], dim=1)
        return self.layers[-1].block(units[-1], 2 * variable, 2 * variable + 2)


class MaskedAutoregressive(Bijection):
    """One MADE block: `z_i = (x_i - t_i) exp(-c(s_i))`, `(s_i, t_i)` a function of `x_1 ... x_{i-1}`.

    Fields `(batch, *shape)`, the variables in row-major order, or with `reverse` from the last to the first. `hidden`
    are the widths of the hidden layers, D - 1 or more for D variables to be told apart. `activation` is a name or any
    elementwise function or module, which all layers share. `clamp` is c, the identity unless given. Raises ValueError
    for an unknown activation, widths that are not positive integers and fields of another shape. Source:
    arXiv:1502.03509, section 4; 1705.07057, section 3.1.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        hidden: Sequence[int] = (50, 50),
        activation: str | Activation = "tanh",
        reverse: bool = False,
        clamp: Clamp = NO_CLAMP,
    ) -> None:
        super().__init__()
        self.shape, self.reverse, self.site_map = check_shape(shape), reverse, AffineMap(clamp)
        self.network = MaskedNetwork(volume(self.shape), _check_widths(hidden), _find(activation))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        flat, log_slopes = self._ordered(z), []
        units = self.network.start(flat)
        for i, column in enumerate(flat.unbind(1)):
            value, log_slope = self.site_map.forward(self.network.advance(units, i), column)
            units[0] = torch.cat([units[0], value[:, None]], dim=1)
            log_slopes.append(log_slope)
        return self._restored(units[0], z), torch.stack(log_slopes, dim=1).sum(1)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = self._ordered(x)
        z, log_slope = self.site_map.inverse(self.network(flat), flat)
        return self._restored(z, x), log_slope.sum(1)

    def _ordered(self, field: Tensor) -> Tensor:
        if field.shape[1:] != self.shape:
            raise ValueError(f"a block for shape {list(self.shape)} was given fields of shape {list(field.shape)}")
        flat = field.flatten(1)
        return flat.flip(1) if self.reverse else flat

    def _restored(self, flat: Tensor, field: Tensor) -> Tensor:
        return (flat.flip(1) if self.reverse else flat).reshape(field.shape)


def autoregressive_flow(
    shape: Sequence[int],
    *,
    blocks: int = 6,
    hidden: Sequence[int] = (50, 50),
    activation: str | Activation = "tanh",
    clamp: Clamp = NO_CLAMP,
) -> Sequential:
    """Return `blocks` MADE blocks, every other one in reversed order; the settings are `MaskedAutoregressive`'s.

    Raises ValueError for fewer than one block.
    """
    if blocks < 1:
        raise ValueError(f"blocks must be at least 1, got {blocks!r}")
    settings = {"hidden": hidden, "activation": activation, "clamp": clamp}
    return Sequential(MaskedAutoregressive(shape, reverse=bool(i % 2), **settings) for i in range(blocks))


def _spread(width: int, highest: int) -> Tensor:
    """Return `width` ascending degrees, spread evenly over 1 to `highest` with both ends."""
    if width >= highest:
        return 1 + torch.arange(width) * highest // width
    return torch.linspace(1, highest, width, dtype=torch.float64).round().long() if width > 1 else torch.ones(1).long()


def _check_widths(hidden: Sequence[int]) -> tuple[int, ...]:
    widths = tuple(hidden)
    if any(not isinstance(width, int) or isinstance(width, bool) or width < 1 for width in widths):
        raise ValueError(f"hidden must hold positive integers, got {list(widths)}")
    return widths


def _find(activation: str | Activation) -> Activation:
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, or a function, got {activation!r}")
        return ACTIVATIONS[activation]
    if isinstance(activation, type) or not callable(activation):
        raise ValueError(f"activation must be a name, a function or a module instance, got {activation!r}")
    return activation
