"""What every flow layer is: an invertible map between latent `z` and field `x` with its log-determinant."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latticeflow.flows.asked import without

Map = Callable[[Tensor], tuple[Tensor, Tensor]]


class SingularWeightsError(ArithmeticError):
    """The weights of a linear layer have the determinant 0, so that it cannot be inverted."""

    def __init__(self, layer: nn.Module, name: str = "") -> None:
        self.layer = layer
        kind = type(layer).__name__
        super().__init__(f"the weights of {f'{name}, {kind},' if name else kind} are singular: their determinant is 0")


class Bijection(nn.Module, ABC):
    """An invertible map of fields `(batch, *shape)` that knows its Jacobian.

    `forward(z) -> (x, log|det dx/dz|)` and `inverse(x) -> (z, log|det dz/dx|)`, the log-determinants `(batch,)`.

    Where the Jacobian of a layer is the same for every input, `constant_jacobian`, its log-determinant is a constant of
    the density. `varying_inverse` and `constant_log_det` are the two parts of `inverse`; together they are the energy
    and the partition function of a flow that is read as an energy-based model (arXiv:2305.15267).
    """

    constant_jacobian: bool = False
    postpones: bool = False
    """Whether all its parameters are weights whose gradients `carry_score` can leave to `Postponed`."""

    @abstractmethod
    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map latent to field."""

    @abstractmethod
    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map field to latent."""

    def carry_score(self, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return `forward(z)` and the score of what comes out, `d log q(x) / dx`, given that of z at these weights.

            d log q(x) / dx = (dz/dx)^T d log q(z) / dz + d log|det dz/dx| / dx

        No gradient goes through the score. Couplings know it from their forward pass alone (arXiv:2207.08219, section
        3.2; 2403.15881), other maps from their inverse.
        """
        x, log_det = self.forward(z)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            back, log_inverse = self.varying_inverse(leaf)  # what is left out does not depend on x
            (carried,) = torch.autograd.grad((back * score).sum() + log_inverse.sum(), leaf)
        return x, log_det, carried

    def varying_inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map field to latent, without the log-determinants that are the same for every x, which are not computed."""
        return self.inverse(x)

    def constant_log_det(self, shape: Sequence[int]) -> Tensor:
        """Return what those add up to for fields of this shape, `log|det dx/dz|`, a number in float64.

        Raises SingularWeightsError, naming the layer, where it is infinite.
        """
        return torch.zeros((), dtype=torch.float64)


@dataclass(frozen=True)
class Move:
    """What a coupling did to the variables in `places` of the flattened field, each moved by itself.

    `change`, their displacement but for a constant, and `log_slope`, `(batch, places)`, know how they came from the
    field; `own_slope` is `d log_slope / dz` at fixed parameters.
    """

    places: Tensor
    change: Tensor
    log_slope: Tensor
    own_slope: Tensor

    def carry_score(self, z: Tensor, score: Tensor) -> Tensor:
        """Return the score of the field after the move; z, which requires a gradient, was the field before."""
        flat = score.flatten(1)
        moved = (flat.index_select(1, self.places) - self.own_slope) / self.log_slope.detach().exp()
        through = self.log_slope.sum() + (self.change * moved).sum()
        with without("weights"):
            (of_frozen,) = torch.autograd.grad(through, z, retain_graph=True)
        return (flat - of_frozen.flatten(1)).index_copy(1, self.places, moved).reshape(score.shape)


class Mover(Bijection):
    """A bijection that moves some variables, each by itself, by maps that networks read off the others.

    Its weights are those of products in conditioners. While `Postponed` collects them, it is left the gradient of
    `-log q(x)` at fixed x: with the score s of x, `d log q(x) = -s . d f(z) - d log|det df/dz|` at fixed z and s, in
    which the derivatives by the frozen variables are those that carry the score.
    """

    postpones = True

    @abstractmethod
    def move(self, z: Tensor) -> tuple[Tensor, Move]:
        """Return the field, and how it came about, given z that requires a gradient."""

    def carry_score(self, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept = torch.is_grad_enabled()
        with torch.enable_grad():
            source = z if z.requires_grad else z.detach().requires_grad_()
            x, move = self.move(source)
            carried, log_det = move.carry_score(source, score), move.log_slope.sum(1)
        return (x, log_det, carried) if kept else (x.detach(), log_det.detach(), carried)


class LinearBijection(Bijection):
    """An affine map, whose Jacobian is the same for every input."""

    constant_jacobian = True

    @abstractmethod
    def to_field(self, z: Tensor) -> Tensor:
        """Map latent to field."""

    @abstractmethod
    def to_latent(self, x: Tensor) -> Tensor:
        """Map field to latent."""

    @abstractmethod
    def log_det(self, shape: Sequence[int]) -> Tensor:
        """Return `log|det dx/dz|` for fields of this shape, a number in float64."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x = self.to_field(z)
        return x, self.log_det(z.shape[1:]).to(x.device).expand(len(z))

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, none = self.varying_inverse(x)
        return z, none - self.log_det(x.shape[1:])

    def varying_inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.to_latent(x), torch.zeros(len(x), dtype=torch.float64, device=x.device)

    def constant_log_det(self, shape: Sequence[int]) -> Tensor:
        return self.log_det(shape)


class Sequential(Bijection):
    """The composition of bijections, the first acting first on the latent; log-determinants are summed in float64.

    After each `cycle` layers every variable has moved; `cut` goes between such cycles only. The last `closing` layers
    are not counted there, and stay with what they close. `places` are cuts that have a name, and the layers before.

    With `recompute` (activation checkpointing) a gradient keeps the input of every layer and computes the rest again
    when it comes there: the memory of one layer in place of that of all, for the time of one more pass.
    """

    def __init__(
        self,
        layers: Iterable[Bijection] = (),
        *,
        cycle: int = 1,
        closing: int = 0,
        places: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.cycle, self.closing, self.places = cycle, closing, dict(places or {})
        self.recompute = False

    @property
    def constant_jacobian(self) -> bool:
        return all(layer.constant_jacobian for layer in self.layers)

    @property
    def postpones(self) -> bool:
        with_weights = (layer for layer in self.layers if next(layer.parameters(), None) is not None)
        return not self.recompute and all(layer.postpones for layer in with_weights)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._through(z, self.layers)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._through(x, (layer.inverse for layer in reversed(self.layers)))

    def carry_score(self, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.recompute:
            return super().carry_score(z, score)
        field, total = z, torch.zeros(len(z), dtype=torch.float64, device=z.device)
        with self._naming():
            for layer in self.layers:
                field, log_det, score = layer.carry_score(field, score)
                total = total + log_det.double()
        return field, total, score

    def varying_inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._through(x, (layer.varying_inverse for layer in reversed(self.layers)))

    def constant_log_det(self, shape: Sequence[int]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        with self._naming():
            for layer in self.layers:
                total = total + layer.constant_log_det(shape)
        return total

    def _through(self, field: Tensor, maps: Iterable[Map]) -> tuple[Tensor, Tensor]:
        total = torch.zeros(len(field), dtype=torch.float64, device=field.device)
        with self._naming():
            for one in maps:
                field, log_det = self._recomputed(one, field) if self.recompute else one(field)
                total = total + log_det.double()
        return field, total

    @staticmethod
    def _recomputed(one: Map, field: Tensor) -> tuple[Tensor, Tensor]:
        """Apply a layer, keeping for the gradient its input alone."""
        return checkpoint(one, field, use_reentrant=False, preserve_rng_state=False)

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Say which layer it is whose weights are singular."""
        try:
            yield
        except SingularWeightsError as error:
            name = next(name for name, module in self.named_modules() if module is error.layer)
            raise SingularWeightsError(error.layer, name) from None

    def cut(self, parts: Sequence[int] | Sequence[str]) -> list["Sequential"]:
        """Return parts of so many layers each, the first next to the latent, which share their layers with this flow.

        In place of numbers, the names of `places` say where to cut. Raises ValueError for numbers that are not positive
        or do not add up, for an unknown place or places in another order, and for a cut inside a cycle.
        """
        layers = len(self.layers) - self.closing
        sizes = self._sizes(parts) if any(isinstance(part, str) for part in parts) else parts
        if not sizes or any(size < 1 for size in sizes) or sum(sizes) != layers:
            raise ValueError(f"parts must be positive and add up to {layers} layers, got {list(sizes)}")
        ends = list(accumulate(sizes))
        if any(end % self.cycle for end in ends[:-1]):
            valid = list(range(self.cycle, layers, self.cycle))
            places = f"cuts may come after {', '.join(map(str, valid))}" if valid else "there is no place for a cut"
            raise ValueError(
                f"parts {list(sizes)} cut a cycle of {self.cycle} masks, after which all variables have moved; {places}"
            )
        ends[-1] += self.closing
        return [Sequential(self.layers[start:end]) for start, end in pairwise([0, *ends])]

    def _sizes(self, names: Sequence[str]) -> list[int]:
        unknown = [name for name in names if name not in self.places]
        if unknown:
            known = ", ".join(map(repr, self.places)) or "none"
            raise ValueError(f"there is no place {unknown[0]!r} to cut; the places with a name are: {known}")
        places = [0, *(self.places[name] for name in names), len(self.layers) - self.closing]
        if any(start >= end for start, end in pairwise(places)):
            raise ValueError(f"the places {list(names)} are not in the order of the layers: {list(self.places)}")
        return [end - start for start, end in pairwise(places)]
