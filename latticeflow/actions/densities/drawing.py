"""Exact independent draws: which densities have them, and the pieces that they are made of."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from latticeflow.streams import device_options, draw_options


@runtime_checkable
class Drawable(Protocol):
    """A density with exact independent draws; `isinstance(density, Drawable)` tells whether it has any.

    Not `draw`, which an action has already: the Gibbs step along the orbits of a marginal action.
    """

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """Return n independent draws, `(n, D)`, float64, on the generator's device."""


def choices(weights: Sequence[float], n: int, generator: Generator | None = None) -> Tensor:
    """Return n numbers from `0..len(weights) - 1`, drawn with probability proportional to the weights."""
    uniform = torch.rand(n, **draw_options(generator))
    edges = torch.cumsum(torch.tensor(weights, **device_options(generator)), dim=0)
    return torch.bucketize(uniform * edges[-1], edges[:-1], right=True)


def ring_radii(means: Tensor, width: float, generator: Generator | None = None) -> Tensor:
    """Return draws r > 0 of the density proportional to `r exp(-(r - m)^2 / (2 width^2))`, one for each mean m > 0.

    Rejection from the normal around the density's maximum, `r_0 = (m + sqrt(m^2 + 4 width^2)) / 2`, of the same width,
    accepted with `(r/r_0) e^{1 - r/r_0} <= 1`.
    """
    radii, left = torch.zeros_like(means), torch.arange(len(means), device=means.device)
    while len(left):
        peak = 0.5 * (means[left] + torch.sqrt(means[left] ** 2 + 4 * width**2))
        drawn = peak + width * torch.randn(len(left), **draw_options(generator))
        ratio = drawn / peak
        radii[left] = drawn
        left = left[torch.rand(len(left), **draw_options(generator)) >= ratio * torch.exp(1 - ratio)]
    return radii


def accepted(n: int, propose: Callable[[int], tuple[Tensor, Tensor]], generator: Generator | None = None) -> Tensor:
    """Return the first n accepted proposals, `(n, 2)`.

    `propose(m)` returns m points of the plane, `(m, 2)`, and the logarithms of their probabilities of acceptance.
    """
    found, missing = [torch.zeros(0, 2, **device_options(generator))], n
    while missing > 0:
        points, log_probability = propose(3 * missing + 16)
        kept = points[torch.rand(len(points), **draw_options(generator)) < torch.exp(log_probability)]
        found.append(kept)
        missing -= len(kept)
    return torch.cat(found)[:n]


def on_circles(radii: Tensor, generator: Generator | None = None) -> Tensor:
    """Return a point at each of these distances from the origin in a uniform direction, `(n,) -> (n, 2)`."""
    angle = 2 * math.pi * torch.rand(len(radii), **draw_options(generator))
    return radii[:, None] * torch.stack([torch.cos(angle), torch.sin(angle)], dim=1)
