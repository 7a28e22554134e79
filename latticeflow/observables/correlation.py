"""Correlators on a periodic axis: products at a distance, and the folding of distances t and L - t."""

import torch
from torch import Tensor


def autocorrelation(series: Tensor) -> Tensor:
    """Return `C(t) = sum_s f(s + t) f(s)` at the distances t = 0..L//2, `(..., L) -> (..., L//2 + 1)`.

    C is even in t on a periodic axis.
    """
    distances = range(series.shape[-1] // 2 + 1)
    return torch.stack([(torch.roll(series, -t, -1) * series).sum(-1) for t in distances], dim=-1)


def fold(correlator: Tensor, sign: int = 1) -> Tensor:
    """Return `(C(t) + sign C(L - t))/2` for t = 0..L//2, `(..., L) -> (..., L//2 + 1)`.

    `sign` is 1 for a correlator that is even in t and -1 for an odd one.
    """
    reflected = torch.roll(correlator.flip(-1), 1, -1)
    return ((correlator + sign * reflected) / 2)[..., : correlator.shape[-1] // 2 + 1]
