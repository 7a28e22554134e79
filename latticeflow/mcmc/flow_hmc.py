"""Hybrid Monte Carlo in the latent space of a flow."""

from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor

from latticeflow.actions import Action, ModifiedAction
from latticeflow.flows import Bijection
from latticeflow.mcmc.hmc import HMC
from latticeflow.samplers import FlowSampler


class FlowHMC(HMC):
    """Hybrid Monte Carlo in z where `x = f(z)` is a sampler's flow: the better the flow, the flatter the energy.

    FT-HMC: M. Luescher, arXiv:0907.5491; Foreman et al., arXiv:2112.01586. `settings` are those of `HMC`; the chains
    start from draws of the sampler, which is cast to float64. The force of a flow of splines jumps at their knots, so
    the energy violation falls more slowly than with the integrator's order, and a fourth-order one does not pay.
    """

    name = "flow_hmc"

    def __init__(self, action: Action, sampler: FlowSampler, **settings: Any) -> None:
        sampler = sampler.double()
        super().__init__(action, _Fields(sampler), **settings)
        self.flow = sampler.flow
        self.potential = PulledBack(action.bare, sampler.flow)


@dataclass(frozen=True)
class PulledBack(ModifiedAction):
    """The action of the latent variable, `S(f(z)) - log|det df/dz|`."""

    action: Action
    flow: Bijection

    def __call__(self, field: Tensor) -> Tensor:
        x, log_det = self.flow(field)
        return self.action(x) - log_det


@dataclass(frozen=True)
class _Fields:
    """The fields that a sampler draws, apart from their density."""

    sampler: FlowSampler

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        return self.sampler.sample(n, generator)[0]

    def log_prob(self, x: Tensor) -> Tensor:
        return self.sampler.log_prob(x)
