"""LOFT, the log soft extension: what lies far out comes back to where floating-point numbers and gradients are good."""

import math

import torch
from torch import Tensor

from latticeflow.flows.bijection import Bijection


class LOFT(Bijection):
    r"""The identity up to `tau`, a logarithm beyond it, on every variable.

        x = sign(z) ( log1p(max(|z| - tau, 0)) + min(|z|, tau) ),   log_det = -sum log1p(max(|z| - tau, 0))

    and back `z = sign(x) ( expm1(max(|x| - tau, 0)) + min(|x|, tau) )`. Fields `(batch, *shape)` of any shape; no
    parameters. Raises ValueError unless tau is positive and finite. Source: arXiv:2402.16408, section 4.
    """

    def __init__(self, tau: float = 100.0) -> None:
        super().__init__()
        if not 0 < tau < math.inf:
            raise ValueError(f"tau must be positive and finite, got {tau!r}")
        self.tau = float(tau)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        beyond = torch.log1p((z.abs() - self.tau).clamp(min=0))
        return self._inner(z) + torch.copysign(beyond, z), -beyond.flatten(1).sum(1)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        farthest = 0.25 * math.log(torch.finfo(x.dtype).max)  # no draw is there; an infinite z would be NaN further on
        beyond = (x.abs() - self.tau).clamp(0, farthest)
        return self._inner(x) + torch.copysign(torch.expm1(beyond), x), beyond.flatten(1).sum(1)

    def _inner(self, x: Tensor) -> Tensor:
        return x.clamp(-self.tau, self.tau)
