"""Linear layers of all variables: dense, in triangular factors, and convolutions; flows that are made of them.

They act from data to latent, `z = W x + b`, which is the cheap way: a density needs W, a draw its inverse. The
log-determinants do not depend on x. Flows that are read as energies leave them out while they train
(arXiv:2305.15267).
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from latticeflow.flows.activations import Cubic, SmoothLeakyReLU
from latticeflow.flows.bijection import Bijection, LinearBijection, Sequential, SingularWeightsError
from latticeflow.lattice import check_integer, check_shape, volume

LINEAR = ("dense", "lu", "convolution")
ACTIVATIONS = ("leaky_relu", "cubic")


class TriangularFactors(nn.Module):
    r"""An invertible matrix `A = P L (U + diag(s))` of `size` rows, which no value of its parameters makes singular.

    One parameter, `factors (size, size)`, holds L below its diagonal, U above it and log|s| on it. P and the signs of s
    stay as they are at the start, a random rotation or reflection, and are kept in the state_dict. Source:
    arXiv:1807.03039, eqs. (10) and (11).
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        start = nn.init.orthogonal_(torch.empty(size, size, dtype=torch.float64))
        permutation, lower, upper = torch.linalg.lu(start)
        scale, dtype = upper.diagonal(), torch.get_default_dtype()
        factors = lower.tril(-1) + upper.triu(1) + torch.diag(scale.abs().log())
        self.factors = nn.Parameter(factors.to(dtype))
        self.register_buffer("pivots", permutation.argmax(1))
        self.register_buffer("signs", scale.sign().to(dtype))

    def triangles(self) -> tuple[Tensor, Tensor]:
        """Return L and `U + diag(s)`."""
        unit, scale = torch.ones_like(self.signs), self.signs * self.factors.diagonal().exp()
        return self.factors.tril(-1) + unit.diag(), self.factors.triu(1) + scale.diag()

    def log_det(self) -> Tensor:
        """Return `log|det A| = sum log|s|` in float64."""
        return self.factors.diagonal().double().sum()

    def multiply(self, v: Tensor) -> Tensor:
        """Return `A v` for columns `(size, n)`."""
        lower, upper = self.triangles()
        return (lower @ (upper @ v))[self.pivots]

    def solve(self, v: Tensor) -> Tensor:
        """Return `A^-1 v` for columns `(size, n)`."""
        lower, upper = self.triangles()
        unpermuted = torch.empty_like(v).index_copy(0, self.pivots, v)
        half = torch.linalg.solve_triangular(lower, unpermuted, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, half, upper=True)


class AllVariables(LinearBijection):
    """`z = W x + b` on all variables of a field `(batch, *shape)` as one vector; b is 0 without `shift`.

    Raises ValueError for fields of another shape.
    """

    def __init__(self, shape: Sequence[int], *, shift: bool = True) -> None:
        super().__init__()
        self.shape = check_shape(shape)
        self.shift = nn.Parameter(torch.zeros(volume(self.shape))) if shift else None

    @abstractmethod
    def multiply(self, v: Tensor) -> Tensor:
        """Return `W v` for columns `(variables, n)`."""

    @abstractmethod
    def solve(self, v: Tensor) -> Tensor:
        """Return `W^-1 v` for columns `(variables, n)`."""

    def to_latent(self, x: Tensor) -> Tensor:
        z = self.multiply(self._columns(x)).T
        return (z if self.shift is None else z + self.shift).reshape(x.shape)

    def to_field(self, z: Tensor) -> Tensor:
        columns = self._columns(z)
        return self.solve(columns if self.shift is None else columns - self.shift[:, None]).T.reshape(z.shape)

    def _columns(self, field: Tensor) -> Tensor:
        self._check(field)
        return field.flatten(1).T

    def _check(self, field: Tensor) -> None:
        if field.shape[1:] != self.shape:
            raise ValueError(f"a linear map of shape {list(self.shape)} was given fields of {list(field.shape)}")


class Dense(AllVariables):
    """All variables times any matrix, `z = W x + b`; W starts as a random rotation or reflection.

    Fields `(batch, *shape)` with D variables: W is `weight (D, D)`, b is `shift (D,)` or, without `shift`, 0. The
    log-determinant costs O(D^3), the rest of a density O(D^2). Draws are by one LU factorisation, which is kept until
    the weights change where no gradients are asked for. Raises ValueError for fields of another shape, and
    SingularWeightsError for a W without an inverse. Source: arXiv:2305.15267, section 3.
    """

    def __init__(self, shape: Sequence[int], *, shift: bool = True) -> None:
        super().__init__(shape, shift=shift)
        size = volume(self.shape)
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(size, size)))
        self._factors = Kept(self)

    def to_latent(self, x: Tensor) -> Tensor:
        self._check(x)
        return functional.linear(x.flatten(1), self.weight, self.shift).reshape(x.shape)  # faster than by columns

    def multiply(self, v: Tensor) -> Tensor:
        return self.weight @ v

    def solve(self, v: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            (factors, pivots), log_det = self._factors(self._factorised)
            check_regular(self, log_det)
            return torch.linalg.lu_solve(factors, pivots, v)
        try:
            return torch.linalg.solve(self.weight, v)
        except torch.linalg.LinAlgError:
            raise SingularWeightsError(self) from None

    def log_det(self, shape: Sequence[int]) -> Tensor:
        if torch.is_grad_enabled():
            return check_regular(self, -torch.linalg.slogdet(self.weight).logabsdet.double())
        return check_regular(self, self._factors(self._factorised)[1])

    def _factorised(self) -> tuple[tuple[Tensor, Tensor], Tensor]:
        factors, pivots, _ = torch.linalg.lu_factor_ex(self.weight)
        return (factors, pivots), -factors.diagonal().double().abs().log().sum()


class LUDense(AllVariables):
    """All variables times a matrix in triangular factors, `z = P L (U + diag(s)) x + b`.

    As `Dense`, but its log-determinant costs O(D), draws O(D^2) each, and no weights are singular; see
    `TriangularFactors`. Raises ValueError for fields of another shape.
    """

    def __init__(self, shape: Sequence[int], *, shift: bool = True) -> None:
        super().__init__(shape, shift=shift)
        self.matrix = TriangularFactors(volume(self.shape))

    def multiply(self, v: Tensor) -> Tensor:
        return self.matrix.multiply(v)

    def solve(self, v: Tensor) -> Tensor:
        return self.matrix.solve(v)

    def log_det(self, shape: Sequence[int]) -> Tensor:
        return -self.matrix.log_det()


class PeriodicConvolution(LinearBijection):
    r"""A convolution with periodic boundaries, the same at every site, whose matrix is (block) circulant:

        z_a(y) = b_a + sum_{c, r} w_ac(r) x_c(y - r),   log|det dz/dx| = sum_k log|det w(k)|

    where `w(k) = sum_r w(r) exp(-i k r)` is a matrix of channels for every momentum of the lattice. Fields `(batch,
    *shape)` in any dimension, or with `channels` `(batch, channels, *shape)`. The window has `kernel` sites in each
    direction, odd and centred; without `kernel`, and where that is larger, the whole extent. Both ways are by fast
    Fourier transform. The start is the identity. `shift` false leaves b out.

    Raises ValueError for an even kernel, a number of channels that is not positive, and fields of another shape;
    SingularWeightsError where a w(k) has no inverse. Source: the convolution theorem; as a layer of flows,
    arXiv:1901.11137, section 3.2.
    """

    def __init__(
        self, shape: Sequence[int], *, kernel: int | None = None, channels: int | None = None, shift: bool = True
    ) -> None:
        super().__init__()
        self.shape, self.channels = check_shape(shape), channels
        if kernel is not None and check_integer("kernel", kernel, low=1) % 2 == 0:
            raise ValueError(f"kernel must be odd, got {kernel}")
        count = 1 if channels is None else check_integer("channels", channels, low=1)
        window = [extent if kernel is None else min(kernel, extent) for extent in self.shape]
        weight = torch.zeros(count, count, *window)
        centre = tuple(extent // 2 for extent in window)
        weight[(..., *centre)] = torch.eye(count)
        self.weight = nn.Parameter(weight)
        self.shift = nn.Parameter(torch.zeros(count)) if shift else None
        self._window, self._centre, self._axes = window, centre, tuple(range(-len(window), 0))
        self._spectra = Kept(self)

    def to_latent(self, x: Tensor) -> Tensor:
        z = self._transformed(x, lambda spectrum, modes: spectrum @ modes)
        return z if self.shift is None else z + self._shift(z)

    def to_field(self, z: Tensor) -> Tensor:
        centred = z if self.shift is None else z - self._shift(z)
        self.log_det(self.shape)  # refuses singular weights
        return self._transformed(centred, torch.linalg.solve)

    def log_det(self, shape: Sequence[int]) -> Tensor:
        return check_regular(self, -self._spectra(self._log_determinant))

    def spectrum(self) -> Tensor:
        """Return `w(k)` at all momenta, `(*shape, channels, channels)`, complex."""
        placed = self.weight.new_zeros(*self.weight.shape[:2], *self.shape)
        placed[(..., *(slice(0, extent) for extent in self._window))] = self.weight
        shifted = placed.roll([-offset for offset in self._centre], self._axes)
        return torch.fft.fftn(shifted, dim=self._axes).flatten(2).permute(2, 0, 1).unflatten(0, self.shape)

    def _log_determinant(self) -> Tensor:
        return torch.linalg.slogdet(self.spectrum()).logabsdet.double().sum()

    def _transformed(self, field: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        expected = self.shape if self.channels is None else (self.channels, *self.shape)
        if field.shape[1:] != expected:
            raise ValueError(f"a convolution of shape {list(expected)} was given fields of {list(field.shape)}")
        if len(field) == 0:  # which the transform refuses
            return field
        half = (*self.shape[:-1], self.shape[-1] // 2 + 1)
        channels = field.reshape(len(field), -1, *self.shape)
        modes = torch.fft.rfftn(channels, dim=self._axes).flatten(2).permute(2, 1, 0)
        moved = product(self.spectrum()[..., : half[-1], :, :].flatten(0, -3), modes)
        back = moved.permute(2, 1, 0).unflatten(2, half)
        return torch.fft.irfftn(back, s=self.shape, dim=self._axes).reshape(field.shape)

    def _shift(self, field: Tensor) -> Tensor:
        return self.shift if self.channels is None else self.shift.reshape(-1, *[1] * len(self.shape))


class Kept:
    """What is made of a layer's weights, kept until they change; made anew each time where gradients are recorded."""

    def __init__(self, layer: nn.Module) -> None:
        self.weights: Callable[[], Any] = layer.parameters
        self.made_of: list[Tensor] = []
        self.value: Any = None

    def __call__(self, make: Callable[[], Any]) -> Any:
        if torch.is_grad_enabled():
            return make()
        now = list(self.weights())
        if len(now) != len(self.made_of) or not all(map(_same, now, self.made_of)):
            self.made_of, self.value = [weight.detach().clone() for weight in now], make()
        return self.value


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def check_regular(layer: nn.Module, log_det: Tensor) -> Tensor:
    """Return the log-determinant of a layer; raise SingularWeightsError where it is infinite."""
    if bool(torch.isinf(log_det)):
        raise SingularWeightsError(layer)
    return log_det


def linear_flow(
    shape: Sequence[int],
    *,
    layers: int = 2,
    linear: str = "dense",
    activation: str = "leaky_relu",
    slope: float = 0.3,
    kernel: int | None = None,
    odd: bool = False,
) -> Sequential:
    """Return `layers` linear maps with an activation between each two, from data to latent `W, s, W, ..., W`.

    `linear` is "dense", "lu" or "convolution", whose window is `kernel`; `activation` "leaky_relu" with the smallest
    `slope`, or "cubic", with one strength for all sites. With `odd`, which needs the cubic activation, nothing is
    shifted and the flow commutes with `x -> -x`. Raises ValueError for another name, fewer than one layer, a kernel
    without convolutions, and an odd flow with an activation that is not.
    """
    check_integer("layers", layers, low=1)
    for name, value, known in (("linear", linear, LINEAR), ("activation", activation, ACTIVATIONS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if kernel is not None and linear != "convolution":
        raise ValueError(f"kernel is the window of convolutions, got it with linear = {linear!r}")
    if odd and activation != "cubic":
        raise ValueError(f"an odd flow needs the cubic activation, got {activation!r}")

    def layer() -> LinearBijection:
        match linear:
            case "dense":
                return Dense(shape, shift=not odd)
            case "lu":
                return LUDense(shape, shift=not odd)
        return PeriodicConvolution(shape, kernel=kernel, shift=not odd)

    flow: list[Bijection] = [layer()]
    for _ in range(layers - 1):
        flow += [Cubic() if activation == "cubic" else SmoothLeakyReLU(slope), layer()]
    return Sequential(flow)
