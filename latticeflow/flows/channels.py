"""Layers that mix the channels of a field `(batch, C, H, W)`, the same at every site: 1x1 convolutions and couplings.

They are the two that Glow (arXiv:1807.03039) alternates; `glow` puts them together.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from latticeflow.flows.bijection import Bijection, LinearBijection
from latticeflow.flows.clamps import Clamp
from latticeflow.flows.coupling import DEFAULT_CLAMP, AffineMap
from latticeflow.flows.linear import TriangularFactors
from latticeflow.lattice import check_integer, volume


class InvertibleConvolution(LinearBijection):
    r"""A 1x1 convolution, `x = W z` at every site, with an invertible matrix W in LU form.

        W = P L (U + diag(s)),   log_det = sites sum log|s|

    Fields `(batch, channels, *sites)`; W is `TriangularFactors`, which no weights make singular. Raises ValueError for
    another number of channels. Source: arXiv:1807.03039, eqs. (9) to (11); W acts from data to latent there.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = check_integer("channels", channels, low=1)
        self.matrix = TriangularFactors(channels)

    def to_field(self, z: Tensor) -> Tensor:
        return self._at_every_site(self.matrix.multiply, z)

    def to_latent(self, x: Tensor) -> Tensor:
        return self._at_every_site(self.matrix.solve, x)

    def log_det(self, shape: Sequence[int]) -> Tensor:
        return volume(shape[1:]) * self.matrix.log_det()

    def _at_every_site(self, map_of: Callable[[Tensor], Tensor], field: Tensor) -> Tensor:
        if field.dim() < 2 or field.shape[1] != self.channels:
            raise ValueError(f"a convolution of {self.channels} channels was given fields of {list(field.shape)}")
        identity = torch.eye(self.channels, dtype=field.dtype, device=field.device)
        flat = field.flatten(1).unflatten(1, (self.channels, -1))
        return (map_of(identity) @ flat).reshape(field.shape)


class ChannelCoupling(Bijection):
    r"""An affine map of the first half of the channels, with parameters that a network reads off the second half.

        x_1 = z_1 exp(c(s)) + t,   x_2 = z_2,   (s, t) = network(z_2),   log_det = sum c(s)

    Fields `(batch, channels, H, W)` of any H and W. The network is a convolution of 3x3 sites, one of 1x1 and one of
    3x3, `hidden` channels and SiLU between them; its last layer starts at a hundredth of the usual size. What lies
    outside is zero, or with `periodic` the other side of the lattice. `clamp` is c. Raises ValueError for a number of
    channels that is not even and for fields with another one. Source: arXiv:1605.08803, eqs. (7) and (8); 1807.03039,
    section 3.3.
    """

    def __init__(
        self, channels: int, *, hidden: int = 64, clamp: Clamp = DEFAULT_CLAMP, periodic: bool = False
    ) -> None:
        super().__init__()
        if check_integer("channels", channels, low=1) % 2:
            raise ValueError(f"channels must be even to be split in two halves, got {channels}")
        self.channels, self.site_map = channels, AffineMap(clamp)
        self.network = _network(channels // 2, check_integer("hidden", hidden, low=1), channels, periodic=periodic)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._apply_map(self.site_map.forward, z)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._apply_map(self.site_map.inverse, x)

    def _apply_map(
        self, site_map: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], field: Tensor
    ) -> tuple[Tensor, Tensor]:
        if field.dim() != 4 or field.shape[1] != self.channels:
            raise ValueError(f"a coupling of {self.channels} channels was given fields of {list(field.shape)}")
        active, frozen = field.chunk(2, dim=1)
        parameters = self.network(frozen).unflatten(1, (2, -1)).movedim(1, -1)
        moved, log_slope = site_map(parameters, active)
        return torch.cat([moved, frozen], dim=1), log_slope.flatten(1).sum(1)


def _network(inputs: int, hidden: int, outputs: int, *, periodic: bool) -> nn.Sequential:
    window = {"kernel_size": 3, "padding": 1, "padding_mode": "circular" if periodic else "zeros"}
    first, inner = nn.Conv2d(inputs, hidden, **window), nn.Conv2d(hidden, hidden, 1)
    last = nn.Conv2d(hidden, outputs, **window)
    with torch.no_grad():
        last.weight.mul_(0.01)
        last.bias.zero_()
    return nn.Sequential(first, nn.SiLU(), inner, nn.SiLU(), last)
