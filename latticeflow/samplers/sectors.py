"""Gauge fields by topological sectors: a piece for each charge, all of them by one flow."""

import math

import torch
from torch import Generator

from latticeflow.actions import Action
from latticeflow.priors import QuenchedSectors
from latticeflow.samplers.flow import FlowSampler

NEGLIGIBLE, CHUNK = 1e-3, 256


class SectorSampler(FlowSampler):
    r"""A mixture `q(x) = w_Q q_Q(x)` of one density for each topological charge Q, `q_Q` being zero elsewhere.

    The draws of a `QuenchedSectors` prior, each on top of its own uniform flux, pass a flow that keeps the charge
    (`gauge_flow(..., keep_charge=True)`) and knows it, so the sum over pieces has a single term. `refine` sets the
    weights to the pieces' own integrals. Source: arXiv:2305.02930 (piecewise flows), with the charge as the partition.
    """

    prior: QuenchedSectors

    @torch.no_grad()
    def refine(self, action: Action, generator: Generator | None = None, *, draws: int = 512) -> bool:
        """Set `w_Q` to `Z_Q = int_Q exp(-S) / Z`, from `draws` draws of every piece that is not negligible.

        That is a weight above 1e-3, by the present weights or by those of pure gauge theory. The other pieces keep
        their share of pure gauge theory in proportion to the nearest that was estimated. Nothing changes where a piece
        has no draw of finite weight.
        """
        prior, plain = self.prior, self.prior.plain_log_weights
        present, found = prior.log_w.cpu(), {}
        for place, charge in enumerate(prior.charges):
            if max(present[place], plain[place]) > math.log(NEGLIGIBLE):
                found[place] = self._log_integral(charge, action, draws, generator)
        log_weights = torch.stack(
            [
                found[place] if place in found else plain[place] + found[near] - plain[near]
                for place in range(len(plain))
                for near in [min(found, key=lambda other: abs(other - place))]
            ]
        )
        if torch.isfinite(log_weights).all():
            prior.set_log_weights(log_weights)
        return True

    def _log_integral(self, charge: int, action: Action, draws: int, generator: Generator | None) -> torch.Tensor:
        """Return the estimate of `log Z_Q` by the mean weight of its piece."""
        parts = []
        for start in range(0, draws, CHUNK):
            z = self._cast(self.prior.in_sectors(torch.full((min(CHUNK, draws - start),), charge), generator))
            x, log_det = self.flow(z)
            log_q = self.prior.log_prob(z.double()) - log_det
            parts.append(-action(x).double() - log_q)
        log_weight = torch.nan_to_num(torch.cat(parts), nan=-math.inf)
        present = self.prior.log_w[charge + self.prior.charges[-1]]
        return (present + torch.logsumexp(log_weight, 0) - math.log(draws)).cpu()
