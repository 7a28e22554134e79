"""Compact U(1) links in two dimensions: loops, topological charge, gauge transformations and holonomy shifts.

Links are angles `theta[..., mu, x0, x1]` of shape `(batch, 2, L0, L1)`, on any branch; `U = exp(i theta)`.
"""

import math

import torch
from torch import Generator, Tensor

from latticeflow.lattice import shift, site_sum

SAWTOOTH = tuple(-2 * (-1) ** k / k * math.sin(math.pi * k / 3) / (math.pi * k / 3) for k in (1, 2))


def wrap(angle: Tensor) -> Tensor:
    """Return the angle on the branch `(-pi, pi]`."""
    return math.pi - torch.remainder(math.pi - angle, 2 * math.pi)


def links_gradient(of_plaquettes: Tensor) -> Tensor:
    """Return the derivative by the links, given that by their plaquettes: the transpose of `plaquette`."""
    behind = [shift(of_plaquettes, mu, -1) for mu in (0, 1)]
    return torch.stack([of_plaquettes - behind[1], behind[0] - of_plaquettes], dim=-3)


def plaquette(links: Tensor) -> Tensor:
    """Return the unwrapped plaquette angle `P(x) = theta_0(x) + theta_1(x+0) - theta_0(x+1) - theta_1(x)`.

    `(batch, 2, L0, L1) -> (batch, L0, L1)`.
    """
    time, space = links.unbind(-3)
    return time + shift(space, 0) - shift(time, 1) - space


def wilson_loop(links: Tensor, r0: int, r1: int) -> Tensor:
    """Return the unwrapped angle of the `r0 x r1` loop whose lowest corner is x, `(batch, L0, L1)`.

    Raises ValueError if a side is not positive.
    """
    if r0 < 1 or r1 < 1:
        raise ValueError(f"wilson_loop: sides must be positive, got {r0} x {r1}")
    time, space = links.unbind(-3)
    time_line = sum(shift(time, 0, step) for step in range(r0))
    space_line = sum(shift(space, 1, step) for step in range(r1))
    return time_line + shift(space_line, 0, r0) - shift(time_line, 1, r1) - space_line


def polyakov_loop(links: Tensor, mu: int = 0) -> Tensor:
    """Return the angle of the straight loop that winds once around direction `mu`: `(batch, extent of the other)`."""
    return links.select(-3, mu).sum(dim=mu - 2)


def topological_charge(links: Tensor) -> Tensor:
    """Return `Q = (1/2pi) sum_x wrap(P(x))`, an integer in the floating dtype of the links, `(batch,)`."""
    return torch.round(site_sum(wrap(plaquette(links))) / (2 * math.pi))


def sawtooth(cosine: Tensor, sine: Tensor) -> Tensor:
    """Return a smooth, periodic stand-in for `wrap(angle)` from the angle's cosine and sine.

    Its first two Fourier terms with Lanczos factors: slope 0.83 at 0, going smoothly through 0 at pi.
    """
    return sine * (SAWTOOTH[0] + 2 * SAWTOOTH[1] * cosine)


def sawtooth_slope(cosine: Tensor, sine: Tensor) -> Tensor:
    """Return the derivative of `sawtooth` by the angle."""
    return SAWTOOTH[0] * cosine + 2 * SAWTOOTH[1] * (cosine * cosine - sine * sine)


def smooth_charge(links: Tensor) -> Tensor:
    """Return `(1/2pi) sum_x sawtooth(P(x))`, close to the topological charge and without its jumps, `(batch,)`."""
    angle = plaquette(links)
    return site_sum(sawtooth(torch.cos(angle), torch.sin(angle))) / (2 * math.pi)


def gauge_transform(links: Tensor, angles: Tensor) -> Tensor:
    """Return `theta_mu(x) + alpha(x) - alpha(x+mu)` for site angles `alpha` of shape `(batch, L0, L1)`."""
    return links + torch.stack([angles - shift(angles, mu) for mu in (0, 1)], dim=-3)


def random_gauge_transform(links: Tensor, generator: Generator | None = None) -> Tensor:
    """Return the links at a Haar-uniform point of their gauge orbits."""
    batch, _, *shape = links.shape
    angles = torch.rand(batch, *shape, generator=generator, dtype=links.dtype, device=links.device)
    return gauge_transform(links, 2 * math.pi * angles)


def shift_holonomies(links: Tensor, angles: Tensor) -> Tensor:
    """Add `angles[..., mu]` to the links of direction mu on the last slice of that direction.

    The two Polyakov loops move by these angles and no contractible loop changes. `angles` has shape `(batch, 2)` or
    `(2,)`.
    """
    shifted = links.clone()
    shifted[..., 0, -1, :] += angles[..., 0, None]
    shifted[..., 1, :, -1] += angles[..., 1, None]
    return shifted
