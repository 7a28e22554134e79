r"""The model of arXiv:2308.13294 as one writes it first: what the package's own is measured against.

Everything is done on all sites and masks multiply the result. A coupling sees cosine and sine of the plaquettes and the
2x1 loops of both orientations, those that contain an updated link set to zero, six channels on the full lattice; a
circular `Conv2d` network gives the parameters of a spline at every site; every plaquette goes through its spline, and
those of the mask keep the result, which their links take over: `theta_mu(x) <- theta_mu(x) +- (P' - P)(x)`.

The Dirac operator is a dense `2V x 2V` matrix, and its determinant that of an LU decomposition. "elements" fills it
entry by entry in a loop over sites, so that every write is a node of the graph that copies the whole gradient on the
way back; "blocks" writes the 2x2 blocks of a hop at once; "vectorised" takes `latticeflow.dirac.wilson_matrix`.

`plain_flow` has the masks, the conventions and the precision of `latticeflow.flows.gauge_flow`, and the estimators the
signature of those of `latticeflow.training`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from latticeflow.actions import Action
from latticeflow.dirac import wilson_matrix
from latticeflow.flows import Bijection, Sequential
from latticeflow.flows.masks import StripeMask, stripe_cycle
from latticeflow.samplers import Sampler
from latticeflow.u1 import plaquette, wilson_loop, wrap

MIN_BIN, MIN_DERIVATIVE = 1e-2, 1e-3
Assembly = Literal["elements", "blocks", "vectorised"]
ASSEMBLIES: tuple[Assembly, ...] = ("elements", "blocks", "vectorised")
Estimate = tuple[Tensor, Tensor]


class PlainCoupling(Bijection):
    """A circular spline and a shift of the plaquettes of one mask, evaluated at all sites `(batch, 2, L0, L1)`."""

    def __init__(
        self, mask: StripeMask, *, bins: int, hidden: Sequence[int], kernel: int, dilations: Sequence[int]
    ) -> None:
        super().__init__()
        self.mu, self.sign = mask.mu, 1.0 if mask.mu == 0 else -1.0
        active = torch.zeros(math.prod(mask.shape))
        active[mask.sites(0)] = 1
        links = torch.zeros(1, 2, *mask.shape)
        links[0, mask.mu] = (active * torch.arange(1, len(active) + 1)).reshape(mask.shape)
        self.register_buffer("active", active.reshape(mask.shape), persistent=False)
        self.register_buffer("frozen", (loops(links) == 0).float(), persistent=False)
        self.network = convolutions([6, *hidden, 3 * bins + 1], kernel, dilations)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        parameters, angle = self._conditioned(z), plaquette(z)
        new, log_slope = spline_forward(parameters[..., 1:], angle)
        return self._moved(z, new + parameters[..., 0] - angle, log_slope)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        parameters, angle = self._conditioned(x), plaquette(x)
        old, log_slope = spline_inverse(parameters[..., 1:], angle - parameters[..., 0])
        return self._moved(x, old - angle, log_slope)

    def _conditioned(self, links: Tensor) -> Tensor:
        """Return the parameters of all sites, `(batch, L0, L1, 3 bins + 1)`."""
        angles = loops(links)
        features = torch.cat([torch.cos(angles) * self.frozen, torch.sin(angles) * self.frozen], dim=1)
        return self.network(features).movedim(1, -1)

    def _moved(self, links: Tensor, change: Tensor, log_slope: Tensor) -> tuple[Tensor, Tensor]:
        change = self.sign * self.active * change
        still = torch.zeros_like(change)
        both = torch.stack([change, still] if self.mu == 0 else [still, change], dim=1)
        return wrap(links + both), (self.active * log_slope).sum(dim=(1, 2))


def loops(links: Tensor) -> Tensor:
    """Return the angles of plaquettes and of the 2x1 loops of both orientations, `(batch, 3, L0, L1)`."""
    return torch.stack([wilson_loop(links, *sides) for sides in ((1, 1), (2, 1), (1, 2))], dim=1)


def convolutions(channels: Sequence[int], kernel: int, dilations: Sequence[int]) -> nn.Sequential:
    """Return circular convolutions with SiLU between them, the last nearly zero to begin with."""
    layers: list[nn.Module] = []
    for (before, after), dilation in zip(pairwise(channels), dilations, strict=True):
        padding = dilation * (kernel - 1) // 2
        layers.append(nn.Conv2d(before, after, kernel, dilation=dilation, padding=padding, padding_mode="circular"))
        layers.append(nn.SiLU())
    layers.pop()
    with torch.no_grad():
        layers[-1].weight.mul_(0.01)
        layers[-1].bias.zero_()
    return nn.Sequential(*layers)


def spline_forward(parameters: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Return `y(angle)` and `log dy/dx` of the circular splines `(..., 3 bins)` (arXiv:1906.04032, eqs. 4-5)."""
    x, y, slopes = knots(parameters)
    x0, width, y0, height, d0, d1 = one_bin(x, y, slopes, x, wrap(angle))
    s, t = height / width, (wrap(angle) - x0) / width
    below = s + (d0 + d1 - 2 * s) * t * (1 - t)
    return y0 + height * (s * t**2 + d0 * t * (1 - t)) / below, log_derivative(s, d0, d1, t)


def spline_inverse(parameters: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Return x with `y(x) = angle` and `log dx/dy` (arXiv:1906.04032, eqs. 6-8)."""
    x, y, slopes = knots(parameters)
    x0, width, y0, height, d0, d1 = one_bin(x, y, slopes, y, wrap(angle))
    s, u = height / width, wrap(angle) - y0
    bend = u * (d0 + d1 - 2 * s)
    a, b, c = height * (s - d0) + bend, height * d0 - bend, -s * u
    t = 2 * c / (-b - torch.sqrt((b**2 - 4 * a * c).clamp(min=torch.finfo(b.dtype).tiny)))
    return x0 + width * t, -log_derivative(s, d0, d1, t)


def knots(parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the knots from -pi to pi along both axes and the derivative at each, the last as the first."""
    widths, heights, slopes = parameters.chunk(3, dim=-1)
    derivative = MIN_DERIVATIVE + F.softplus(slopes + math.log(math.expm1(1 - MIN_DERIVATIVE)))
    return knots_of(widths), knots_of(heights), torch.cat([derivative, derivative[..., :1]], dim=-1)


def knots_of(logits: Tensor) -> Tensor:
    lengths = MIN_BIN + (1 - MIN_BIN * logits.shape[-1]) * torch.softmax(logits, dim=-1)
    return math.pi * (2 * F.pad(torch.cumsum(lengths, dim=-1), (1, 0)) - 1)


def one_bin(x: Tensor, y: Tensor, slopes: Tensor, along: Tensor, position: Tensor) -> tuple[Tensor, ...]:
    """Return left x, width, left y, height and both derivatives of the bins that the positions are in."""
    inner = along[..., 1:-1].contiguous()
    index = torch.searchsorted(inner, position.detach()[..., None].contiguous(), right=True)

    def at(values: Tensor, index: Tensor) -> Tensor:
        return values.gather(-1, index).squeeze(-1)

    x0, y0 = at(x, index), at(y, index)
    return x0, at(x, index + 1) - x0, y0, at(y, index + 1) - y0, at(slopes, index), at(slopes, index + 1)


def log_derivative(s: Tensor, d0: Tensor, d1: Tensor, t: Tensor) -> Tensor:
    above = s**2 * (d1 * t**2 + 2 * s * t * (1 - t) + d0 * (1 - t) ** 2)
    return torch.log(above) - 2 * torch.log(s + (d0 + d1 - 2 * s) * t * (1 - t))


def plain_flow(
    shape: tuple[int, int],
    *,
    layers: int = 48,
    bins: int = 8,
    hidden: Sequence[int] = (64, 64),
    kernel: int = 3,
    dilations: Sequence[int] = (1, 2, 3),
) -> Sequential:
    """Return the flow of the paper: `layers` couplings with the stripe masks in turn."""
    settings = {"bins": bins, "hidden": hidden, "kernel": kernel, "dilations": dilations}
    return Sequential(PlainCoupling(mask, **settings) for mask in stripe_cycle(shape, layers))


def dense_matrix(links: Tensor, kappa: float, assembly: Assembly) -> Tensor:
    """Return the Wilson-Dirac operator `(batch, 2V, 2V)`, rows and columns site first, spin last.

    Raises ValueError for an extent below 3 where hops are written one by one: two of them would be the same entries.
    """
    if assembly == "vectorised":
        return wilson_matrix(links, kappa)
    if min(links.shape[-2:]) < 3:
        raise ValueError(f"hops written one by one need extents of at least 3, got {tuple(links.shape[-2:])}")
    return _written(links, kappa, write_elements if assembly == "elements" else write_block)


def _written(links: Tensor, kappa: float, write: "Write") -> Tensor:
    batch, _, extent_time, extent = links.shape
    hops = -kappa * torch.exp(1j * links)
    size = 2 * extent_time * extent
    matrix = torch.eye(size, dtype=hops.dtype, device=links.device).repeat(batch, 1, 1)
    for t in range(extent_time):
        for x in range(extent):
            site = 2 * (t * extent + x)
            sign = -1 if t == extent_time - 1 else 1
            ahead = (sign, 2 * ((t + 1) % extent_time * extent + x)), (1, 2 * (t * extent + (x + 1) % extent))
            for mu, (phase, neighbour) in enumerate(ahead):
                hop = phase * hops[:, mu, t, x]
                write(matrix, site, neighbour, hop, FORWARD[mu])
                write(matrix, neighbour, site, hop.conj(), BACKWARD[mu])
    return matrix


Spins = tuple[tuple[complex, complex], tuple[complex, complex]]
FORWARD: tuple[Spins, Spins] = (((1, -1), (-1, 1)), ((1, 1j), (-1j, 1)))
"""`1 - g_mu`."""
BACKWARD: tuple[Spins, Spins] = (((1, 1), (1, 1)), ((1, -1j), (1j, 1)))
"""`1 + g_mu`."""


def write_elements(matrix: Tensor, row: int, column: int, hop: Tensor, spins: Spins) -> None:
    for a in (0, 1):
        for b in (0, 1):
            matrix[:, row + a, column + b] = spins[a][b] * hop


def write_block(matrix: Tensor, row: int, column: int, hop: Tensor, spins: Spins) -> None:
    matrix[:, row : row + 2, column : column + 2] = hop[:, None, None] * matrix.new_tensor(spins)


Write = type(write_elements)


@dataclass(frozen=True)
class PlainAction(Action):
    """The action of the two-flavour Schwinger model with the dense determinant, in the precision of the links."""

    beta: float
    kappa: float
    assembly: Assembly = "elements"

    theory = "schwinger"
    field_name = "links"

    def __call__(self, field: Tensor) -> Tensor:
        _, log_abs_det = torch.linalg.slogdet(dense_matrix(field, self.kappa, self.assembly))
        return -self.beta * torch.cos(plaquette(field)).sum(dim=(1, 2)) - 2 * log_abs_det

    def field_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (2, *shape)


def reinforce(sampler: Sampler, action: Action, batch: int, generator: Generator | None) -> Estimate:
    """Draw without a graph, then `mean( log q(x) (signal - mean signal) )` by the inverse pass with one."""
    with torch.no_grad():
        x, log_q = sampler.sample(batch, generator)
        signal = log_q + action(x)
    return (sampler.log_prob(x) * (signal - signal.mean())).mean(), -signal


def reparametrisation(sampler: Sampler, action: Action, batch: int, generator: Generator | None) -> Estimate:
    """Draw with a graph and differentiate `mean(log q + S)` through the determinant."""
    x, log_q = sampler.sample(batch, generator)
    signal = log_q + action(x)
    return signal.mean(), -signal.detach()


def path(sampler: Sampler, action: Action, batch: int, generator: Generator | None) -> Estimate:
    """Draw with a graph; the gradient of `log q + S` with respect to the field comes from a second, inverse pass."""
    x, log_q = sampler.sample(batch, generator)
    field = x.detach().requires_grad_()
    value = action(field)
    (gradient,) = torch.autograd.grad((sampler.log_prob(field) + value).sum(), field)
    return (x * gradient).sum() / batch, -(log_q + value).detach()


PLAIN_ESTIMATORS = {"reinforce": reinforce, "reparametrisation": reparametrisation, "path": path}
