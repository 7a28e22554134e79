"""Observables of gauge configurations: the links `(batch, 2, L0, L1)` alone decide."""

import torch
from torch import Tensor

from latticeflow import u1
from latticeflow.lattice import shift, site_mean


def plaquette(links: Tensor) -> Tensor:
    """Return the mean of `cos P` over the lattice, `(batch,)`."""
    return site_mean(torch.cos(u1.plaquette(links)))


def charge(links: Tensor) -> Tensor:
    """Return the topological charge Q, `(batch,)`."""
    return u1.topological_charge(links)


def charge_squared(links: Tensor) -> Tensor:
    """Return `Q^2`, `(batch,)`."""
    return u1.topological_charge(links) ** 2


def susceptibility(links: Tensor) -> Tensor:
    """Return `Q^2 / V`, whose mean is the topological susceptibility chi_t (`<Q> = 0` by charge conjugation)."""
    volume = links.shape[-2] * links.shape[-1]
    return charge_squared(links) / volume


def wilson_loops(links: Tensor) -> Tensor:
    """Return the mean over sites of the cosine of the `r0 x r1` loop, `(batch, L0//2, L1//2)`.

    Element `[r0 - 1, r1 - 1]` has the sides r0 in time and r1 in space; an extent of 1 has the side 1.
    """
    time, space = (_lines(links, mu, max(1, links.shape[mu - 2] // 2)) for mu in (0, 1))
    loops = links.new_empty(len(links), len(time), len(space))
    for r0, time_line in enumerate(time, start=1):
        for r1, space_line in enumerate(space, start=1):
            angle = time_line + shift(space_line, 0, r0) - shift(time_line, 1, r1) - space_line
            loops[:, r0 - 1, r1 - 1] = site_mean(torch.cos(angle))
    return loops


def _lines(links: Tensor, mu: int, longest: int) -> list[Tensor]:
    """Return the angles of the straight lines of 1..longest links of direction `mu` that begin at x."""
    link = links.select(-3, mu)
    lines = [link]
    for length in range(1, longest):
        lines.append(lines[-1] + shift(link, mu, length))
    return lines


def polyakov_loops(links: Tensor) -> dict[str, Tensor]:
    r"""Return the mean Polyakov loop of each direction, `(batch,)` each, by name.

    `P = mean_x exp(i phi(x))`, `phi` being the angle of the loop that winds once around the direction at the position
    x: `polyakov_time_real`, `polyakov_time_imaginary`, `polyakov_time_abs = |P|`, and `polyakov_space_...` likewise.
    """
    found = {}
    for mu, direction in enumerate(("time", "space")):
        angle = u1.polyakov_loop(links, mu)
        real, imaginary = torch.cos(angle).mean(-1), torch.sin(angle).mean(-1)
        found |= {
            f"polyakov_{direction}_real": real,
            f"polyakov_{direction}_imaginary": imaginary,
            f"polyakov_{direction}_abs": torch.hypot(real, imaginary),
        }
    return found


def polyakov_correlator(links: Tensor) -> Tensor:
    """Return `Re mean_x P(x)^* P(x + r)` of the temporal Polyakov loop `P = exp(i phi)`, r = 0..L1//2.

    `(batch, L1//2 + 1)`; the first element is 1.
    """
    angle = u1.polyakov_loop(links)
    distances = range(angle.shape[-1] // 2 + 1)
    return torch.stack([torch.cos(torch.roll(angle, -r, -1) - angle).mean(-1) for r in distances], dim=-1)
