"""A base distribution whose draws a network accepts or rejects, so that it can have several modes."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import logsigmoid

from latticeflow.lattice import check_integer
from latticeflow.priors.base import Prior
from latticeflow.streams import draw_options, stream

CHUNK = 2**14


class Resampled(nn.Module, Prior):
    r"""Learned accept/reject: draws of `base` are accepted with probability a(z), the T-th one, `truncation`, always:

        q(z) = base(z) [ (1 - alpha) a(z) / Z + alpha ],   Z = E_base[a],   alpha = (1 - Z)^(T - 1)

    a is a fully connected network of the flattened field with layers `hidden`, SiLU between them and a sigmoid at the
    end; at first it is nearly constant, and q nearly the base. Fields are those of the base, any shape; densities are
    in float64. Draws carry no gradient, so it is trained by maximum likelihood (or reinforce), not along paths.

    log_prob is exact up to the error of Z: a relative error e of Z multiplies the accepted part of q by `1 + e` and
    little else. While training (module in training mode, gradients enabled) Z comes from `samples` fresh draws of the
    base, of a stream of their own that a checkpoint continues, and carries gradients; the logarithm of a mean of that
    many has a bias of the order `1 / samples`. Otherwise Z is the one that `normalise` fixed; without one it is fixed
    first, by 2^17 draws that are always the same, and kept until the next training step.

    Raises ValueError for a truncation below 1, fewer samples than 2 and layers that are not positive integers.
    Source: Bauer and Mnih, arXiv:1810.11428, equations (8) to (11); Stimper et al., arXiv:2110.15828 (bases of flows).
    """

    def __init__(
        self,
        base: Prior,
        *,
        truncation: int = 100,
        hidden: Sequence[int] = (256, 256),
        samples: int = 1024,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_integer("truncation", truncation, low=1)
        check_integer("samples", samples, low=2)
        for width in hidden:
            check_integer("hidden", width, low=1)
        self.base, self.truncation, self.samples, self.seed = base, truncation, samples, seed
        self.shape = tuple(base.sample(0, torch.Generator()).shape[1:])
        self.network = _network(math.prod(self.shape), hidden)
        scalar = {"dtype": torch.float64}
        self.register_buffer("log_rejection", torch.tensor(math.nan, **scalar))
        self.register_buffer("relative_error", torch.tensor(math.nan, **scalar))
        self.register_buffer("estimates", torch.zeros((), dtype=torch.int64))

    def log_acceptance(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return `log a` and `log(1 - a)` of each field, `(n,)` float64."""
        first = self.network[0].weight
        logit = self.network(z.to(first).flatten(1))[:, 0].double()
        return logsigmoid(logit), logsigmoid(-logit)

    @torch.no_grad()
    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """Return n independent fields, float64; at most T - 1 draws of the base are rejected for each."""
        z = self.base.sample(n, generator)
        left = torch.arange(n, device=z.device)
        for _ in range(self.truncation - 1):
            uniform = torch.rand(len(left), **draw_options(generator))
            left = left[uniform >= torch.exp(self.log_acceptance(z[left])[0].to(z.device))]
            if not len(left):
                break
            z[left] = self.base.sample(len(left), generator)
        return z

    def log_prob(self, x: Tensor) -> Tensor:
        """Return `log q`, `(n,)` float64."""
        log_base = self.base.log_prob(x.double())
        if self.truncation == 1:
            return log_base
        log_rejection = self._log_rejection().to(log_base.device)
        trials = torch.arange(self.truncation - 1, device=log_base.device)
        log_accepted = self.log_acceptance(x)[0].to(log_base) + torch.logsumexp(trials * log_rejection, dim=0)
        return log_base + torch.logaddexp(log_accepted, (self.truncation - 1) * log_rejection)

    @torch.no_grad()
    def normalise(self, samples: int = 2**17, generator: Generator | None = None) -> float:
        """Fix Z for evaluation by the mean of a over draws of the base and return its relative standard error.

        Both are kept in the state_dict. Leaves the module in evaluation mode; training discards them. Without a
        generator the draws are those of a stream of their own, always the same. Raises ValueError for fewer samples
        than 2.
        """
        check_integer("samples", samples, low=2)
        self.eval()
        return self._fix(samples, generator)

    def _log_rejection(self) -> Tensor:
        """Return `log(1 - Z)`: of fresh draws while training, else the fixed one."""
        if self.training and torch.is_grad_enabled():
            self.estimates += 1
            for fixed in (self.log_rejection, self.relative_error):
                fixed.fill_(math.nan)
            draws = self.base.sample(self.samples, self._stream("resampled training", int(self.estimates)))
            return torch.logsumexp(self.log_acceptance(draws)[1], dim=0) - math.log(self.samples)
        if torch.isnan(self.log_rejection):
            with torch.no_grad():
                self._fix(2**17, None)
        return self.log_rejection.double()

    def _fix(self, samples: int, generator: Generator | None) -> float:
        generator = self._stream("resampled evaluation") if generator is None else generator
        sizes = [CHUNK] * (samples // CHUNK) + [samples % CHUNK] * (samples % CHUNK > 0)
        pairs = [self.log_acceptance(self.base.sample(size, generator)) for size in sizes]
        log_accepted, log_rejected = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        self.log_rejection.copy_(torch.logsumexp(log_rejected, dim=0) - math.log(samples))
        shares = torch.exp(log_accepted - log_accepted.max())
        self.relative_error.copy_(shares.std() / shares.mean() / math.sqrt(samples))
        return float(self.relative_error)

    def _stream(self, purpose: str, block: int = 0) -> Generator:
        return stream(self.seed, purpose, block, device=self.network[0].weight.device)


def _network(inputs: int, hidden: Sequence[int]) -> nn.Sequential:
    """Return the network of the acceptance's logit, whose last layer starts at a hundredth of the usual size."""
    sizes = list(pairwise([inputs, *hidden, 1]))
    layers = [layer for pair in sizes for layer in (nn.Linear(*pair), nn.SiLU())][:-1]
    with torch.no_grad():
        layers[-1].weight.mul_(0.01)
        layers[-1].bias.zero_()
    return nn.Sequential(*layers)
