"""Observables of the fermions on gauge configurations."""

import torch
from torch import Tensor

from latticeflow.dirac import log_abs_det


def log_det(links: Tensor, kappa: float) -> Tensor:
    """Return `log|det M|` of one flavour, `(batch,)`."""
    return log_abs_det(links, kappa)[0]


def condensate(links: Tensor, kappa: float) -> Tensor:
    r"""Return `Re Tr M^-1 / V`, `(batch,)`, exactly and without a solver.

    `M = 1 - kappa H`, so `kappa d log|det M| / d kappa = -kappa Re Tr M^-1 H = 2 V - Re Tr M^-1`.
    Multiply by `2 kappa` for the trace of `D^-1`.
    """
    volume = links.shape[-2] * links.shape[-1]
    hopping = torch.full((len(links),), kappa, dtype=links.dtype, device=links.device, requires_grad=True)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(log_abs_det(links.detach(), hopping)[0].sum(), hopping)
    return 2 - kappa * slope / volume
