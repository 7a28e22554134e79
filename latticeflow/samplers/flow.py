"""A flow on top of a prior."""

from itertools import chain

import torch
from torch import Generator, Tensor
from torch.autograd.function import FunctionCtx

from latticeflow.flows import Bijection
from latticeflow.flows.networks import Postponed
from latticeflow.priors import Prior
from latticeflow.samplers.base import Sampler
from latticeflow.streams import SharedStream, own_rows


class FlowSampler(Sampler):
    """Draws `x = f(z)`, `z` from the prior, with `log q(x) = log prior(z) - log|det dx/dz|` in float64.

    The prior draws in float64; fields then take the dtype and device of the flow's parameters, else of the
    prior's (without any, float64 on the generator's device).
    """

    def __init__(self, prior: Prior, flow: Bijection) -> None:
        super().__init__()
        self.prior = prior
        self.flow = flow

    def sample(self, n: int, generator: Generator | SharedStream | None = None) -> tuple[Tensor, Tensor]:
        z = self.latent(n, generator)
        x, log_det = self.flow(z)
        return x, self.prior.log_prob(z.double()) - log_det

    def sample_with_score(
        self, n: int, generator: Generator | SharedStream | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return n draws, their log q, and their score `d log q(x) / dx`, which carries no gradient."""
        z = self.latent(n, generator)
        x, log_det, score = self.flow.carry_score(z, self._prior_score(z))
        return x, self.prior.log_prob(z.double()) - log_det, score

    def sample_held(self, n: int, generator: Generator | SharedStream | None = None) -> tuple[Tensor, Tensor]:
        """Return n draws and their log q, whose gradients are those of the density at these fields, held fixed.

        A flow of couplings finds them on its way, with no inverse pass: the score tells what a change of a layer would
        do to the density, and its gradient waits for the weights of the draws (`latticeflow.flows.bijection.Mover`).
        """
        x, log_q, _ = self._held_with_score(n, generator)
        return x, log_q

    def _held_with_score(
        self, n: int, generator: Generator | SharedStream | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Do so, and return the score where it was found."""
        if not self.flow.postpones:
            return *super().sample_held(n, generator), None
        postponed = Postponed()
        with torch.no_grad(), postponed.collected():
            z = self.latent(n, generator)
            x, log_det, score = self.flow.carry_score(z, self._prior_score(z))
        log_q = self.prior.log_prob(z.double()) - log_det
        return x, _Held.apply(log_q, postponed, *self.flow.parameters()), score

    @torch.enable_grad()
    def _prior_score(self, z: Tensor) -> Tensor:
        leaf = z.detach().requires_grad_()
        log_prob = self.prior.log_prob(leaf.double())
        return torch.autograd.grad(log_prob.sum(), leaf)[0] if log_prob.requires_grad else torch.zeros_like(leaf)

    def latent(self, n: int, generator: Generator | SharedStream | None = None) -> Tensor:
        """Return n draws of the prior in the flow's dtype and device."""
        return self._cast(own_rows(self.prior.sample, n, generator))

    def _cast(self, z: Tensor) -> Tensor:
        parameter = next(chain(self.flow.parameters(), self.parameters()), z)
        return z.to(dtype=parameter.dtype, device=parameter.device)

    def log_prob(self, x: Tensor) -> Tensor:
        z, log_det = self.flow.inverse(x)
        return self.prior.log_prob(z.double()) + log_det

    def energy(self, x: Tensor) -> Tensor:
        """Return `E(x) = -log q(x) - log Z`, `(batch,)` float64: `-log q` but for what is the same for every x.

        That are the log-determinants of layers with a constant Jacobian, `log Z = sum log|det dx/dz|`, which are not
        computed. The score is `-dE/dx`. Source: arXiv:2305.15267, eq. (8).
        """
        z, log_det = self.flow.varying_inverse(x)
        return -self.prior.log_prob(z.double()) - log_det


class _Held(torch.autograd.Function):
    """The log q of held fields, whose derivatives by a flow's weights `Postponed` has."""

    @staticmethod
    def forward(ctx: FunctionCtx, log_q: Tensor, postponed: Postponed, *weights: Tensor) -> Tensor:
        ctx.postponed, ctx.weights = postponed, weights
        return log_q.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, of_log_q: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.postponed.gradients(-of_log_q)
        return of_log_q, None, *(gradients.get(weight) for weight in ctx.weights)
