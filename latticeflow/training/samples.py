"""Weighted samples of a target: what they must be, and the random part that is held out of training."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latticeflow.streams import stream


@dataclass(frozen=True)
class Samples:
    """Fields `(n, *shape)` and their weights `(n,)`, float64, of mean 1."""

    fields: Tensor
    weights: Tensor

    def __getitem__(self, indices: Tensor) -> "Samples":
        return Samples(self.fields[indices], self.weights[indices])

    def normalised(self) -> "Samples":
        """Return them with the weights divided by their mean."""
        return Samples(self.fields, self.weights / self.weights.mean())

    def mean(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `mean(w f)` of a function of the fields, `(n,)`."""
        return (self.weights * of(self.fields)).mean()


def held_out_split(n: int, *, validation: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of the samples to train on and of those to hold out, a fraction `validation` of n."""
    order = torch.randperm(n, generator=stream(seed, "held-out split"))
    held_out = round(validation * n)
    return order[held_out:], order[:held_out]


def check_samples(sampler: nn.Module, data: Tensor, weights: Tensor | None) -> Samples:
    """Return the samples of positive weight in the dtype and on the device of the sampler's parameters.

    Raises ValueError for data that are not finite or not shaped like the sampler's draws, and as `check_weights`.
    """
    wrong = (~torch.isfinite(data.flatten(1) if data.dim() > 1 else data)).nonzero()
    if len(wrong):
        raise ValueError(f"data must be finite, sample {int(wrong[0, 0])} is not")
    shape = _shape_of_draws(sampler)
    if data.dim() < 2 or data.shape[1:] != shape:
        expected = f"(n, {', '.join(map(str, shape))})"
        raise ValueError(f"data have shape {tuple(data.shape)}, the sampler draws {expected}")
    checked = torch.ones(len(data), dtype=torch.float64) if weights is None else check_weights(weights, len(data))
    positive = checked > 0
    parameter = next(sampler.parameters())
    return Samples(data[positive.to(data.device)].to(parameter), checked[positive].to(parameter.device))


def check_weights(weights: Tensor, n: int) -> Tensor:
    """Return weights of n samples in float64 on the CPU; ValueError unless `(n,)`, finite, not negative, not all 0."""
    checked = torch.as_tensor(weights, dtype=torch.float64).detach().cpu()
    if checked.shape != (n,):
        raise ValueError(f"weights have shape {tuple(checked.shape)}, expected {(n,)}, one for each sample")
    wrong = (~(torch.isfinite(checked) & (checked >= 0))).nonzero().flatten()
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(f"weights must be finite and not negative, number {first} is {float(checked[first])!r}")
    if not checked.any():
        raise ValueError("weights must not all be zero")
    return checked


def _shape_of_draws(sampler: nn.Module) -> torch.Size:
    was_training, device = sampler.training, next(sampler.parameters()).device
    with torch.no_grad():
        x, _ = sampler.eval().sample(1, stream(0, "shape", device=device))
    sampler.train(was_training)
    return x.shape[1:]
