r"""Couplings of the holonomies: they move the two Polyakov loops and leave every plaquette as it is.

The links of direction mu on one slice of that direction are shifted by one angle, `delta = s(Phi) - Phi`: no
contractible loop changes, all Polyakov loops of direction mu turn by delta, and the log-determinant is that of s, a map
of the circle. Phi is a gauge-invariant angle that turns with them, and s depends on what the shift leaves unchanged.

Which angle: in the continuum the determinant of charge 0 depends on the holonomies through the constant mode of the
gauge field, the mean over the transverse coordinate y of the Polyakov loop as a continuous function of y. So

    Phi = L_mu(0) + sum_y w_y (L_mu(y + 1) - L_mu(y)),   w_y = 1/2 - (y + 1/2) / L,

the differences being column sums of plaquettes, from `sawtooth` of each. That is smooth everywhere. The circular mean
`arg sum_y exp(i L_mu(y))` is the same for smooth fields but has no value where the sum vanishes, as it does for a
constant flux: there the loops go around the whole circle, and no angle is translation invariant.

With charge, the holonomies say where the zero modes of the Dirac operator are, and the weight is that of the potential
there (Sachs and Wipf, Helv. Phys. Acta 65 (1992) 652; arXiv:1005.1822): the network is given the potential and weighs
it against the Polyakov loop at each place.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from latticeflow.flows.bijection import Bijection
from latticeflow.flows.networks import CellConvolution
from latticeflow.flows.site_masks import window
from latticeflow.flows.spline import circular_spline, spline_forward, spline_inverse
from latticeflow.lattice import Shape, check_shape
from latticeflow.u1 import plaquette, polyakov_loop, sawtooth, shift_holonomies, wrap

FEATURES, CONTEXTS = 7, 10


class HolonomyCoupling(Bijection):
    """A circular spline and a shift of the holonomy of direction `mu`, conditioned on all that they leave unchanged.

    At every site the network sees cos and sin of the plaquette, of the Polyakov loop of direction mu through the site
    relative to Phi, and of the one of the other direction, and the potential of the flux. `PooledConditioner` makes one
    answer of that, the smooth charge and the other direction's Phi. `hidden` are the channels of its convolution, of
    `kernel x kernel` sites, and of its dense layers. Any extents. Raises ValueError for a direction that is not 0 or 1,
    or no hidden channels.
    """

    def __init__(
        self, shape: Sequence[int], mu: int, *, bins: int = 6, hidden: Sequence[int] = (32, 32), kernel: int = 3
    ) -> None:
        super().__init__()
        if mu not in (0, 1):
            raise ValueError(f"mu must be 0 or 1, got {mu!r}")
        self.mu, extents = mu, check_shape(shape, dimensions=2)
        self.register_buffer("green", green_function(extents).to(torch.get_default_dtype()), persistent=False)
        self.network = PooledConditioner(extents, [*hidden, 3 * bins + 1], kernel)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        angle, parameters = self._seen(z)
        new, log_slope = spline_forward(circular_spline(parameters[:, 1:]), angle)
        return self._shifted(z, new + parameters[:, 0] - angle), log_slope

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        angle, parameters = self._seen(x)
        old, log_slope = spline_inverse(circular_spline(parameters[:, 1:]), angle - parameters[:, 0])
        return self._shifted(x, old - angle), log_slope

    def _shifted(self, links: Tensor, angle: Tensor) -> Tensor:
        still = torch.zeros_like(angle)
        return wrap(shift_holonomies(links, torch.stack([angle, still] if self.mu == 0 else [still, angle], dim=-1)))

    def _seen(self, links: Tensor) -> tuple[Tensor, Tensor]:
        """Return Phi `(batch,)` and the map's parameters, from invariants alone."""
        mu, nu = self.mu, 1 - self.mu
        loops = plaquette(links)
        cosine, sine = torch.cos(loops), torch.sin(loops)
        flux = sawtooth(cosine, sine)
        angle, other = (holonomy_angle(links, flux, direction) for direction in (mu, nu))
        across = polyakov_loop(links, nu).unsqueeze(nu - 2).expand_as(loops)
        potential = (flux.flatten(1) @ self.green).view_as(flux)
        sites = torch.stack([cosine, sine, torch.cos(across), torch.sin(across), potential], dim=-1).flatten(1, 2)
        along = (polyakov_loop(links, mu) - angle[:, None]).unsqueeze(mu - 2).expand_as(loops)
        turns = torch.stack([torch.cos(along), torch.sin(along)], dim=-1).flatten(1, 2)
        charge = flux.sum(dim=(1, 2)) / (2 * math.pi)
        charge = charge / torch.sqrt(1 + charge**2)
        context = torch.stack([charge, charge**2, torch.cos(other), torch.sin(other)], dim=-1)
        return angle, self.network(sites, turns, context)


class PooledConditioner(nn.Module):
    """What a whole lattice says to one variable, the same wherever its origin is.

    `sites (batch, V, 5)`, `turns (batch, V, 2)` and `context (batch, 4) -> (batch, channels[-1])`: a periodic
    convolution of sites and turns; the means over the sites of its channels, and of their products with the turns, a
    Fourier sum with learned weights; with those of the inputs and the context, dense layers. SiLU after each but the
    last, which starts at `last_scale` times the usual size. Raises ValueError for fewer than two numbers of channels.
    """

    def __init__(self, shape: Shape, channels: Sequence[int], kernel: int, *, last_scale: float = 0.01) -> None:
        super().__init__()
        if len(channels) < 2:
            raise ValueError("hidden must hold the channels of one layer or more, got none")
        everywhere = torch.ones(*shape, dtype=torch.bool)
        self.convolution = CellConvolution(FEATURES, channels[0], window(everywhere, everywhere, kernel))
        sizes = zip([3 * channels[0] + CONTEXTS, *channels[1:-1]], channels[1:], strict=True)
        self.dense = nn.ModuleList(nn.Linear(a, b) for a, b in sizes)
        with torch.no_grad():
            self.dense[-1].weight.mul_(last_scale)
            self.dense[-1].bias.zero_()

    def forward(self, sites: Tensor, turns: Tensor, context: Tensor) -> Tensor:
        channels = nn.functional.silu(self.convolution(torch.cat([sites, turns], dim=-1)))
        sums = torch.einsum("bvc,bvt->btc", channels, nn.functional.pad(turns, (1, 0), value=1.0)).flatten(1)
        means = torch.cat([sums / channels.shape[1], sites[..., :4].mean(1), turns.mean(1)], dim=-1)
        x = torch.cat([means, context], dim=-1)
        for layer in self.dense[:-1]:
            x = nn.functional.silu(layer(x))
        return self.dense[-1](x)


def holonomy_angle(links: Tensor, flux: Tensor, mu: int) -> Tensor:
    """Return Phi of direction mu, `(batch,)`, from the links and the smoothed angles of their plaquettes.

    `(batch, 2, L0, L1)` and `(batch, L0, L1)`. It is gauge invariant and turns with the Polyakov loops of direction mu.
    """
    columns = flux.sum(dim=mu - 2)  # L_mu(y) - L_mu(y + 1) for mu = 0, minus that for mu = 1
    extent = columns.shape[1]
    step = torch.arange(extent, dtype=links.dtype, device=links.device)
    weight = (step + 0.5) / extent - 0.5
    return polyakov_loop(links, mu)[:, 0] + (1 - 2 * mu) * (columns @ weight)


def green_function(shape: Shape) -> Tensor:
    """Return the inverse of minus the lattice Laplacian without its zero mode, `(V, V)` in float64.

    `green @ F` is the potential of a flux density F, the constant part of which it leaves out.
    """
    momenta = (2 * math.pi * torch.fft.fftfreq(extent, dtype=torch.float64) for extent in shape)
    first, second = (4 * torch.sin(momentum / 2) ** 2 for momentum in momenta)
    eigenvalue = first[:, None] + second
    eigenvalue[0, 0] = math.inf
    propagator = torch.fft.ifft2(1 / eigenvalue).real
    x, y = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, shape), indexing="ij"))
    return propagator[(x[:, None] - x) % shape[0], (y[:, None] - y) % shape[1]]
