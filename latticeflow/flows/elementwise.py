"""Layers that act on each variable by itself: affine maps, softplus, logits, the reflection; permutations."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from latticeflow.actions.positive import softplus, softplus_inverse
from latticeflow.flows.bijection import Bijection, LinearBijection
from latticeflow.lattice import check_shape, volume


class ElementwiseAffine(LinearBijection):
    """`x = exp(log_scale) z + shift`, both trainable and 0 at first, `log_det = sum log_scale`.

    Fields `(batch, *shape)`. The parameters have the field's shape, or with `shared` none: one scale and shift for all
    sites, which fits a lattice of any size. `shared` may also name the axes of `shape` along which they are the same,
    and have extent 1: (1, 2) gives each channel of `(C, H, W)` one scale and shift. Without `shift` the map is odd.
    Raises ValueError for axes that `shape` lacks and for fields of another shape.
    """

    def __init__(self, shape: Sequence[int], *, shared: bool | Sequence[int] = False, shift: bool = True) -> None:
        super().__init__()
        self.shape = check_shape(shape)
        self.shared_axes = _check_axes(shared, len(self.shape))
        own = () if shared is True else [1 if i in self.shared_axes else size for i, size in enumerate(self.shape)]
        self.log_scale = nn.Parameter(torch.zeros(own))
        self.shift = nn.Parameter(torch.zeros(own)) if shift else None

    def to_field(self, z: Tensor) -> Tensor:
        self._check(z)
        x = z * torch.exp(self.log_scale)
        return x if self.shift is None else x + self.shift

    def to_latent(self, x: Tensor) -> Tensor:
        self._check(x)
        z = x if self.shift is None else x - self.shift
        return z * torch.exp(-self.log_scale)

    def log_det(self, shape: Sequence[int]) -> Tensor:
        return self.log_scale.expand(*shape).double().sum()

    def _check(self, field: Tensor) -> None:
        if field.shape[1:] != self.shape:
            raise ValueError(f"an affine map of shape {list(self.shape)} was given fields of {list(field.shape)}")


class ActNorm(ElementwiseAffine):
    """An elementwise affine map whose first batch, in training mode, sets it to give mean 0 and variance 1.

    With `shared` the moments are over all sites too, or over the axes named. That batch is taken in the direction in
    which it comes: `forward` makes x standard, `inverse` makes z standard. Whether it has come is part of the state, so
    that a layer that was saved and loaded does not start again. Raises ValueError for a first batch of one. Source:
    arXiv:1807.03039, section 3.1.
    """

    def __init__(self, shape: Sequence[int], *, shared: bool | Sequence[int] = False) -> None:
        super().__init__(shape, shared=shared)
        self.register_buffer("initialised", torch.tensor(data=False))

    def to_field(self, z: Tensor) -> Tensor:
        if self._first():
            mean, deviation = self._moments(z)
            self._set(-torch.log(deviation), -mean / deviation)
        return super().to_field(z)

    def to_latent(self, x: Tensor) -> Tensor:
        if self._first():
            mean, deviation = self._moments(x)
            self._set(torch.log(deviation), mean)
        return super().to_latent(x)

    def _first(self) -> bool:
        return self.training and not bool(self.initialised)

    def _moments(self, field: Tensor) -> tuple[Tensor, Tensor]:
        self._check(field)
        values, axes = field.detach(), (0, *(1 + axis for axis in self.shared_axes))
        if values.numel() < 2 * self.log_scale.numel():
            raise ValueError("the first batch of an ActNorm has one configuration, which has no variance")
        mean, deviation = values.mean(axes, keepdim=True), values.std(axes, unbiased=False, keepdim=True)
        own = self.log_scale.shape
        return mean.reshape(own), deviation.clamp(min=1e-6).reshape(own)

    @torch.no_grad()
    def _set(self, log_scale: Tensor, shift: Tensor) -> None:
        self.log_scale.copy_(log_scale)
        self.shift.copy_(shift)
        self.initialised.fill_(value=True)


class Permutation(LinearBijection):
    """The variables in another order, `x_i = z_{order[i]}` in row-major numbering; the log-determinant is 0.

    Raises ValueError unless `order` holds every number from 0 to its length less 1 once.
    """

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__()
        permutation = torch.as_tensor(order)
        if not torch.equal(permutation.sort().values, torch.arange(len(permutation))):
            raise ValueError(f"order must hold each of 0 to {len(permutation) - 1} once, got {permutation.tolist()}")
        self.register_buffer("order", permutation, persistent=False)
        self.register_buffer("back", torch.argsort(permutation), persistent=False)

    def to_field(self, z: Tensor) -> Tensor:
        return self._reorder(z, self.order)

    def to_latent(self, x: Tensor) -> Tensor:
        return self._reorder(x, self.back)

    def log_det(self, shape: Sequence[int]) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.order.device)

    def _reorder(self, field: Tensor, order: Tensor) -> Tensor:
        if volume(field.shape[1:]) != len(order):
            raise ValueError(f"a permutation of {len(order)} variables was given fields of shape {list(field.shape)}")
        return field.flatten(1).index_select(1, order).reshape(field.shape)


class Reflection(LinearBijection):
    """`x = -z`, the Z2 symmetry of phi^4; the log-determinant is 0."""

    def to_field(self, z: Tensor) -> Tensor:
        return -z

    def to_latent(self, x: Tensor) -> Tensor:
        return -x

    def log_det(self, shape: Sequence[int]) -> Tensor:
        return torch.zeros((), dtype=torch.float64)


class Softplus(Bijection):
    """`x = log(1 + exp(z))`, from all real numbers to the positive ones; `log_det = sum log sigmoid(z)`."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, log_slope = softplus(z)
        return x, log_slope.flatten(1).sum(1)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = softplus_inverse(x)
        return z, -softplus(z)[1].flatten(1).sum(1)


class Logit(Bijection):
    """Variables between two bounds from those on the whole line, `z = log(u / (1 - u))`:

        u = margin + (1 - 2 margin) (x - low) / (high - low)

    Fields `(batch, *shape)` of any shape. The margin keeps the bounds themselves finite. It is what grey levels pass
    before a flow sees them. Raises ValueError unless `low < high`, both finite, and `0 <= margin < 1/2`. Source:
    arXiv:1605.08803, section 4.1.
    """

    def __init__(self, low: float, high: float, *, margin: float = 0.0) -> None:
        super().__init__()
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"low and high must be finite and ascending, got {low!r} and {high!r}")
        if not 0 <= margin < 0.5:
            raise ValueError(f"margin must be at least 0 and below 1/2, got {margin!r}")
        self.low, self.margin, self.scale = float(low), float(margin), (1 - 2 * margin) / (high - low)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.low + (torch.sigmoid(z) - self.margin) / self.scale, self._log_slope(z)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.logit(self.margin + self.scale * (x - self.low))
        return z, -self._log_slope(z)

    def _log_slope(self, z: Tensor) -> Tensor:
        return (logsigmoid(z) + logsigmoid(-z) - math.log(self.scale)).double().flatten(1).sum(1)


def _check_axes(shared: bool | Sequence[int], dimensions: int) -> tuple[int, ...]:
    """Return the axes along which the parameters are the same."""
    if isinstance(shared, bool):
        return tuple(range(dimensions)) if shared else ()
    if any(axis not in range(dimensions) for axis in shared):
        raise ValueError(f"shared axes {list(shared)} must be from 0 to {dimensions - 1}")
    return tuple(shared)
