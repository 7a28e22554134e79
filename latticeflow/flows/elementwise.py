"""Layers that act on each variable by itself: affine maps, softplus, the reflection; permutations of the variables."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from latticeflow.actions.positive import softplus, softplus_inverse
from latticeflow.flows.bijection import Bijection
from latticeflow.lattice import check_shape, volume


class ElementwiseAffine(Bijection):
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

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        log_det = self._log_det(z)
        x = z * torch.exp(self.log_scale)
        return x if self.shift is None else x + self.shift, log_det

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = self._log_det(x)
        z = x if self.shift is None else x - self.shift
        return z * torch.exp(-self.log_scale), -log_det

    def _log_det(self, field: Tensor) -> Tensor:
        self._check(field)
        return self.log_scale.expand(self.shape).double().sum().expand(len(field))

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

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if self._first():
            mean, deviation = self._moments(z)
            self._set(-torch.log(deviation), -mean / deviation)
        return super().forward(z)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self._first():
            mean, deviation = self._moments(x)
            self._set(torch.log(deviation), mean)
        return super().inverse(x)

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


class Permutation(Bijection):
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

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._reorder(z, self.order)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._reorder(x, self.back)

    def _reorder(self, field: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        if volume(field.shape[1:]) != len(order):
            raise ValueError(f"a permutation of {len(order)} variables was given fields of shape {list(field.shape)}")
        flat = field.flatten(1)
        return flat.index_select(1, order).reshape(field.shape), torch.zeros_like(flat[:, 0])


class Reflection(Bijection):
    """`x = -z`, the Z2 symmetry of phi^4; the log-determinant is 0."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return -z, torch.zeros_like(z.flatten(1)[:, 0])

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward(x)


class Softplus(Bijection):
    """`x = log(1 + exp(z))`, from all real numbers to the positive ones; `log_det = sum log sigmoid(z)`."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, log_slope = softplus(z)
        return x, log_slope.flatten(1).sum(1)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = softplus_inverse(x)
        return z, -softplus(z)[1].flatten(1).sum(1)


def _check_axes(shared: bool | Sequence[int], dimensions: int) -> tuple[int, ...]:
    """Return the axes along which the parameters are the same."""
    if isinstance(shared, bool):
        return tuple(range(dimensions)) if shared else ()
    if any(axis not in range(dimensions) for axis in shared):
        raise ValueError(f"shared axes {list(shared)} must be from 0 to {dimensions - 1}")
    return tuple(shared)
