"""Pure U(1) gauge theory sector by sector: exact draws on top of a uniform flux."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Generator, Tensor, nn

from latticeflow.exact import u1_charge_distribution, u1_log_z
from latticeflow.lattice import check_shape, site_sum, volume
from latticeflow.priors.base import Prior
from latticeflow.priors.gauge import links_from_plaquettes
from latticeflow.streams import device_options, draw_options
from latticeflow.u1 import plaquette, random_gauge_transform, topological_charge, wrap

MOST_CELLS = 2**16


class QuenchedSectors(nn.Module, Prior):
    r"""Pure U(1) gauge theory in every topological sector, and the sectors with weights of their own:

        q(x) = w_Q exp(beta sum_x cos P(x)) / Z_Q,   Z_Q = Z P(Q),   Q the topological charge of x.

    The sectors are those that pure gauge theory has with a probability above 1e-16; others have density 0, so beta
    should not be far above that of the target, which would have more. The law is that of each, exactly;
    `log_weights` `(2 Q_max + 1,)`, a buffer, holds log w_Q from -Q_max to Q_max and starts as `log P(Q)`. In sector Q
    the plaquettes are independent with density proportional to `exp(beta cos P + t P)`, but for their sum `2 pi Q`,
    which t, being the same for all, does not change: t is chosen so that the mean is the uniform flux `2 pi Q / V`.
    All but one are drawn so, the last is what is missing, accepted with probability proportional to its own factor.

    Links are `(n, 2, L0, L1)`, densities with respect to Haar measure. Raises ValueError for a beta that is not
    positive and finite.
    """

    def __init__(self, beta: float, shape: Sequence[int]) -> None:
        super().__init__()
        if not 0 < beta < math.inf:
            raise ValueError(f"beta must be positive and finite, got {beta!r}")
        self.beta, self.shape = float(beta), check_shape(shape, dimensions=2)
        charges, probabilities = u1_charge_distribution(self.beta, self.shape)
        self.charges = [int(charge) for charge in charges]
        log_probability = torch.from_numpy(np.log(probabilities))
        self.plain_log_weights, self.log_z = log_probability, u1_log_z(self.beta, self.shape) + log_probability
        self.register_buffer("log_weights", log_probability.clone())
        cells = min(512 + round(30 * math.sqrt(self.beta)), MOST_CELLS)
        self.angles = np.linspace(-math.pi, math.pi, cells + 1)
        self.tilts = {charge: self._tilt(charge) for charge in self.charges}

    @property
    def log_w(self) -> Tensor:
        """The normalised `log w_Q` in float64, whatever precision the buffer was cast to."""
        return torch.log_softmax(self.log_weights.double(), dim=0)

    def set_log_weights(self, log_weights: Tensor) -> None:
        """Set the weights of all sectors, up to a factor. Raises ValueError for another number, NaN, or a zero."""
        if log_weights.shape != self.log_weights.shape or not bool(torch.isfinite(log_weights).all()):
            raise ValueError(f"expected {len(self.charges)} finite log weights of sectors, got {log_weights!r}")
        self.log_weights.copy_(torch.log_softmax(log_weights.double(), dim=0))

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        weights = self.log_w.exp().to(device_options(generator)["device"])
        chosen = torch.multinomial(weights, n, replacement=True, generator=generator) if n else torch.zeros(0).long()
        return self.in_sectors(chosen - self.charges[-1], generator)

    def in_sectors(self, charge: Tensor, generator: Generator | None = None) -> Tensor:
        """Return links with the given charges, `(n,) -> (n, 2, L0, L1)`."""
        options = device_options(generator)
        charge, plaquettes = charge.to(options["device"]), torch.zeros(len(charge), *self.shape, **options)
        for one in charge.unique().tolist():
            here = (charge == one).nonzero().flatten()
            plaquettes[here] = self._plaquettes(int(one), len(here), generator)
        holonomies = 2 * math.pi * torch.rand(len(charge), 2, **draw_options(generator))
        return wrap(random_gauge_transform(links_from_plaquettes(plaquettes, holonomies), generator))

    def log_prob(self, x: Tensor) -> Tensor:
        angle, index = plaquette(x), self.index(x)
        known = (index >= 0) & (index < len(self.charges))
        offset = (self.log_w.to(x.device) - self.log_z.to(x.device))[index.clamp(0, len(self.charges) - 1)]
        return torch.where(known, self.beta * site_sum(torch.cos(angle)) + offset, -math.inf)

    def index(self, x: Tensor) -> Tensor:
        """Return the place of each configuration's sector among the weights, `(n,)`."""
        return topological_charge(x).long() + self.charges[-1]

    def _tilt(self, charge: int) -> float:
        """Return t so that the mean plaquette angle is `2 pi Q / V`; to the accuracy of the sum, which costs only."""
        mean = 2 * math.pi * charge / volume(self.shape)

        def excess(t: float) -> float:
            log_density = self.beta * np.cos(self.angles) + t * self.angles
            density = np.exp(log_density - log_density.max())
            return float(density @ self.angles / density.sum() - mean)

        bound = 50 * (1 + self.beta)
        return brentq(excess, -bound, bound, xtol=1e-6) if charge else 0.0

    def _plaquettes(self, charge: int, n: int, generator: Generator | None) -> Tensor:
        """Return plaquette angles `(n, L0, L1)` in `(-pi, pi]` whose sum is `2 pi Q`."""
        size, tilt = volume(self.shape), self.tilts[charge]
        highest = float((self.beta * np.cos(self.angles) + tilt * self.angles).max()) + self.beta * 1e-4
        accepted, missing = [torch.zeros(0, size, **device_options(generator))], n
        while missing > 0:
            trials = min(missing * (1 + math.isqrt(size)) + 16, 1 + 2**22 // size)
            drawn = self._tilted(tilt, (trials, size - 1), generator)
            last = 2 * math.pi * charge - drawn.sum(1, keepdim=True)
            log_accept = self.beta * torch.cos(last[:, 0]) + tilt * last[:, 0] - highest
            keep = (last[:, 0].abs() < math.pi) & (torch.rand(trials, **draw_options(generator)).log() < log_accept)
            accepted.append(torch.cat([drawn, last], dim=1)[keep])
            missing -= int(keep.sum())
        return torch.cat(accepted)[:n].reshape(n, *self.shape)

    def _tilted(self, tilt: float, size: tuple[int, int], generator: Generator | None) -> Tensor:
        """Return angles in `(-pi, pi]` with density proportional to `exp(beta cos x + t x)`.

        By rejection from a step function that is nowhere below it: in a cell of width h the exponent is at most
        `beta h^2 / 8` above the larger of its values at the ends.
        """
        options = device_options(generator)
        edges = torch.from_numpy(self.angles).to(options["device"])
        width, exponent = float(edges[1] - edges[0]), self.beta * torch.cos(edges) + tilt * edges
        steps = torch.maximum(exponent[1:], exponent[:-1]) + self.beta * width**2 / 8
        cumulative = torch.cumsum(torch.exp(steps - steps.max()), dim=0)
        total, accepted = math.prod(size), [torch.zeros(0, **options)]
        missing = total
        while missing > 0:
            where, within, height = torch.rand(3, missing + missing // 8 + 16, **draw_options(generator))
            cell = torch.searchsorted(cumulative, where * cumulative[-1]).clamp(max=len(steps) - 1)
            angle = edges[cell] + width * within
            keep = torch.log(height) < self.beta * torch.cos(angle) + tilt * angle - steps[cell]
            accepted.append(angle[keep])
            missing -= int(keep.sum())
        return torch.cat(accepted)[:total].reshape(size)
