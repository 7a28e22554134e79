"""What every flow layer is: an invertible map between latent `z` and field `x` with its log-determinant."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn


class Bijection(nn.Module, ABC):
    """An invertible map of fields `(batch, *shape)` that knows its Jacobian.

    `forward(z) -> (x, log|det dx/dz|)` and `inverse(x) -> (z, log|det dz/dx|)`, the log-determinants `(batch,)`.
    """

    @abstractmethod
    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map latent to field."""

    @abstractmethod
    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map field to latent."""


class Sequential(Bijection):
    """The composition of bijections, the first acting first on the latent; log-determinants are summed in float64.

    After each `cycle` layers every variable has moved; `cut` goes between such cycles only. The last `closing` layers
    are not counted there, and stay with what they close. `places` are cuts that have a name, and the layers before.
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

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros(len(z), dtype=torch.float64, device=z.device)
        for layer in self.layers:
            z, log_det = layer(z)
            total = total + log_det.double()
        return z, total

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for layer in reversed(self.layers):
            x, log_det = layer.inverse(x)
            total = total + log_det.double()
        return x, total

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
