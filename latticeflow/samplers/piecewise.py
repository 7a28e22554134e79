"""Piecewise flows (arXiv:2305.02930): a mixture of samplers, one for each part of a target, its density exact."""

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from latticeflow.flows import Bijection, ElementwiseAffine, Reflection, Sequential
from latticeflow.priors import Prior
from latticeflow.samplers.base import Sampler
from latticeflow.samplers.flow import FlowSampler
from latticeflow.streams import SharedStream, draw_options


class PiecewiseSampler(Sampler):
    """Draws a piece k with probability `w_k`, then x from it; of all pieces together,

        log q(x) = logsumexp_k( log w_k + log q_k(x) ),

    in float64, is exactly the density of that. Fields `(batch, *shape)`. `weights` are divided by their sum; they are
    a buffer, not trained. Pieces may share modules. Gradients reach the parameters through the draws of each piece
    and through the densities of all; where a piece has density zero it contributes none.

    Raises ValueError for no pieces and as `set_weights`. Source: arXiv:2305.02930, without its boxes, outside of which
    a piece would have density zero.
    """

    def __init__(self, pieces: Sequence[FlowSampler], weights: Sequence[float] | Tensor) -> None:
        super().__init__()
        if not len(pieces):
            raise ValueError("a piecewise sampler needs at least one piece, got none")
        self.pieces = nn.ModuleList(pieces)
        self.register_buffer("log_weights", torch.zeros(len(pieces), dtype=torch.float64))
        self.set_weights(weights)

    @property
    def weights(self) -> Tensor:
        """The probabilities of the pieces, `(pieces,)`, float64."""
        return self._log_weights().exp()

    @torch.no_grad()
    def set_weights(self, weights: Sequence[float] | Tensor) -> None:
        """Give the pieces other weights; ValueError unless there is one for each, all positive and finite."""
        values = torch.as_tensor(weights, dtype=torch.float64).detach().cpu()
        if values.shape != (len(self.pieces),):
            raise ValueError(f"weights have shape {tuple(values.shape)}, expected {(len(self.pieces),)}")
        for k, weight in enumerate(values.tolist()):
            if weight == 0:
                raise ValueError(f"a piece whose weight is zero is never drawn: leave out piece {k}")
            if not 0 < weight < math.inf:
                raise ValueError(f"weights must be positive and finite, that of piece {k} is {weight!r}")
        self.log_weights.copy_(torch.log_softmax(values.log(), dim=0))

    def sample(self, n: int, generator: Generator | SharedStream | None = None) -> tuple[Tensor, Tensor]:
        """Return n independent fields and their `log q`, `(n,)`; gradients flow to the parameters, given the pieces."""
        if isinstance(generator, SharedStream):
            labels, asked = self._shared(generator)
        else:
            labels = self._labels(n, generator)
            counts = self._counts(labels)
            asked = [(k, count, generator) for k, count in enumerate(counts) if count or n == 0]
        drawn = torch.cat([self.pieces[k].sample(count, own)[0] for k, count, own in asked])
        place = torch.argsort(torch.argsort(labels, stable=True))
        x = drawn.index_select(0, place.to(drawn.device))
        return x, self.log_prob(x)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return `log q` of given fields, `(batch,)`, with gradients to parameters and fields."""
        log_q = torch.stack([_log_prob(piece, x) for piece in self.pieces], dim=1)
        return torch.logsumexp(self._log_weights().to(log_q.device) + log_q, dim=1)

    def _shared(self, stream: SharedStream) -> tuple[Tensor, list[tuple[int, int, SharedStream]]]:
        """Return the pieces of the rows of this process; of every piece their number and where they are in its draws.

        The draws of a piece come in the order of the rows, so those of a process follow each other.
        """
        everything, generator = self._labels(stream.total, stream.generator), stream.generator
        ends = [self._counts(everything[:end]) for end in (stream.rows.start, stream.rows.stop, stream.total)]
        places = [SharedStream(generator, slice(*place), total) for *place, total in zip(*ends, strict=True)]
        asked = [(k, own.rows.stop - own.rows.start, own) for k, own in enumerate(places) if own.total]
        return everything[stream.rows], asked

    def _counts(self, labels: Tensor) -> list[int]:
        return torch.bincount(labels, minlength=len(self.pieces)).tolist()

    def _labels(self, n: int, generator: Generator | None) -> Tensor:
        """Return the pieces of n independent draws, which come in any order."""
        uniform = torch.rand(n, **draw_options(generator))
        edges = self.weights.cumsum(0)[:-1].to(uniform.device)
        return torch.searchsorted(edges, uniform, right=True)

    def _log_weights(self) -> Tensor:
        return torch.log_softmax(self.log_weights.double(), dim=0)  # a single-precision copy is normalised again


def _log_prob(piece: FlowSampler, x: Tensor) -> Tensor:
    """Return the piece's log density; where it is -inf, gradients of zero in place of its own, zero times infinity."""
    log_q = piece.log_prob(x).double()
    empty = torch.isneginf(log_q)
    if not empty.any():
        return log_q
    inside = (~empty).nonzero().flatten()
    nowhere = torch.full_like(log_q, -math.inf, requires_grad=False)
    return nowhere.index_copy(0, inside, piece.log_prob(x.index_select(0, inside)).double())


def mirrored(sampler: FlowSampler) -> PiecewiseSampler:
    """Return the sampler and its mirror image as two pieces of one network: `q(x) = (q_1(x) + q_1(-x)) / 2`.

    For a target with the symmetry `x -> -x` that is broken, phi^4 with two wells: q has it exactly, and the flow has
    one well to fit.
    """
    image = FlowSampler(sampler.prior, Sequential([sampler.flow, Reflection()]))
    return PiecewiseSampler([sampler, image], [0.5, 0.5])


@torch.no_grad()
def standardised(piece_flow: Bijection, prior: Prior, data: Tensor, *, weights: Tensor | None = None) -> FlowSampler:
    """Return `x = mean + deviation f(z)`: a flow near the identity starts at the place and width of its cluster.

    `data (n, *shape)`, with weights `(n,)`, set a trainable elementwise affine map after the flow; the prior should
    have mean 0 and width 1. The support is all of the flow's: nothing is put into a box, outside of which the target
    would have no proposals. Raises ValueError for data that are not finite and for features that do not vary, by
    number in row-major order.
    """
    if data.dim() < 2 or not torch.isfinite(data).all():
        raise ValueError(f"data must be finite and of shape (n, *shape), got {tuple(data.shape)}")
    share = torch.ones(len(data)).double() if weights is None else weights.detach().double()
    if share.shape != (len(data),) or not bool((share >= 0).all() & torch.isfinite(share.sum()) & (share.sum() > 0)):
        raise ValueError(f"weights must be {len(data)} numbers that are not negative, finite and not all zero")
    flat = data.double().flatten(1)[(share > 0).to(data.device)]
    share = (share[share > 0] / share.sum()).to(flat)
    constant = (flat == flat[0]).all(0).nonzero().flatten().tolist()
    if constant:
        raise ValueError(f"the data of a piece must vary, features {constant} are constant over {len(flat)} samples")
    mean = share @ flat
    deviation = (share @ (flat - mean) ** 2).sqrt()
    affine = ElementwiseAffine(tuple(data.shape[1:]))
    parameter = next(piece_flow.parameters(), affine.shift)
    affine.to(dtype=parameter.dtype, device=parameter.device)
    affine.shift.copy_(mean.reshape(affine.shape))
    affine.log_scale.copy_(deviation.log().reshape(affine.shape))
    return FlowSampler(prior, Sequential([piece_flow, affine]))
