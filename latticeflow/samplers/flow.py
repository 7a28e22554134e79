"""A flow on top of a prior."""

from itertools import chain

from torch import Generator, Tensor, nn

from latticeflow.flows import Bijection
from latticeflow.priors import Prior


class FlowSampler(nn.Module):
    """Draws `x = f(z)`, `z` from the prior, with `log q(x) = log prior(z) - log|det dx/dz|` in float64.

    The prior draws in float64; fields then take the dtype and device of the flow's parameters, else of the
    prior's (without any, float64 on the generator's device).
    """

    def __init__(self, prior: Prior, flow: Bijection) -> None:
        super().__init__()
        self.prior = prior
        self.flow = flow

    def sample(self, n: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return n independent fields and their `log q`, `(n,)`; gradients flow to the parameters."""
        z = self.latent(n, generator)
        x, log_det = self.flow(z)
        return x, self.prior.log_prob(z.double()) - log_det

    def latent(self, n: int, generator: Generator | None = None) -> Tensor:
        """Return n draws of the prior in the flow's dtype and device."""
        z = self.prior.sample(n, generator)
        parameter = next(chain(self.flow.parameters(), self.parameters()), z)
        return z.to(dtype=parameter.dtype, device=parameter.device)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return `log q` of given fields, `(batch,)`, with gradients to parameters and fields."""
        z, log_det = self.flow.inverse(x)
        return self.prior.log_prob(z.double()) + log_det
