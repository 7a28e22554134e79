"""Flows in parts that learn by themselves (Learning Flows By Parts, Bhatt and Inouye)."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Generator, Tensor, nn

from latticeflow.flows import Sequential
from latticeflow.priors import Prior
from latticeflow.samplers.flow import FlowSampler
from latticeflow.streams import SharedStream

Draws = tuple[Tensor, Tensor]


class GivenDraws(Prior):
    """Fields z that have been drawn already, with their `log q(z)` and, where it is asked for, its gradient.

    Near the draws `log q(z')` is continued linearly, `log q(z) + (d log q / dz) (z' - z)`: value and gradient are exact
    at the draws themselves, which is where every estimator asks for them, and the only place: without a gradient to
    carry it returns `log q(z)`. `make_score()` returns `d log q / dz`; it is called once at most.
    """

    def __init__(self, draws: Draws, make_score: Callable[[], Tensor]) -> None:
        self.draws, self.make_score = draws, make_score

    @cached_property
    def score(self) -> Tensor:
        return self.make_score().double().contiguous()

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        if n != len(self.draws[0]):
            raise ValueError(f"{len(self.draws[0])} draws were given, {n} are asked for")
        return self.draws[0]

    def log_prob(self, x: Tensor) -> Tensor:
        z, log_q = self.draws
        if not x.requires_grad:
            return log_q
        return log_q + (self.score * (x - z)).flatten(1).sum(1)


class Part(FlowSampler):
    """One part on top of what is before it; the last draws are kept, for the part behind it."""

    drawn: Draws | None = None
    score: Tensor | None = None

    def latent(self, n: int, generator: Generator | SharedStream | None = None) -> Tensor:
        given = isinstance(self.prior, GivenDraws)  # which are those of this process already
        return super().latent(n, None if given else generator)

    def sample(self, n: int, generator: Generator | SharedStream | None = None) -> Draws:
        x, log_q = super().sample(n, generator)
        self._keep(x, log_q, None)
        return x, log_q

    def sample_with_score(
        self, n: int, generator: Generator | SharedStream | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, log_q, score = super().sample_with_score(n, generator)
        self._keep(x, log_q, score)
        return x, log_q, score

    def sample_held(self, n: int, generator: Generator | SharedStream | None = None) -> Draws:
        x, log_q, score = self._held_with_score(n, generator)
        self._keep(x, log_q, score)
        return x, log_q

    def _keep(self, x: Tensor, log_q: Tensor, score: Tensor | None) -> None:
        """Keep draws in the one layout that another process gets them in."""
        self.drawn, self.score = (x.detach().contiguous(), log_q.detach()), score

    def passed_on(self) -> GivenDraws:
        """Return the last draws as what the next part begins with."""
        return GivenDraws(self.drawn, lambda: score(self, self.drawn[0]) if self.score is None else self.score)


class PartwiseSampler(FlowSampler):
    r"""A flow `g_K o ... o g_1` whose parts can be trained one by one, with gradients inside one part only.

    `parts` are the layers of each, the first next to the prior, or the names of cuts (`Sequential.cut`). Each way of
    training has its own truncated objective; the input of a part is a constant for it.

    * Sampling, latent to field: part k minimises `<S(g_k(z)) - log|det g_k'(z)|>`, z being drawn by the parts before
      it. Parts 1 ... k are a sampler of their own, `prefix(k)`, and the truncated objective is its reverse KL.
    * Density estimation, data to latent: part k minimises `<-log p(f_k(y)) - log|det f_k'(y)|>`, y being what the parts
      behind it make of the data, `f = g^-1`, and p the prior, which learns with the first part.

    Raises ValueError as `Sequential.cut`. Source: Learning Flows By Parts; METHODS.md, section D.
    """

    def __init__(self, prior: Prior, flow: Sequential, parts: Sequence[int] | Sequence[str]) -> None:
        super().__init__(prior, flow)
        self.parts = tuple(flow.cut(parts))  # a tuple: the modules are registered once, by the flow

    def own_parameters(self, k: int) -> list[nn.Parameter]:
        """Return what part k, counted from 0, trains: its layers, with the first part the prior too."""
        prior = self.prior.parameters() if k == 0 and isinstance(self.prior, nn.Module) else ()
        return [*prior, *self.parts[k].parameters()]

    def prefix(self, k: int) -> FlowSampler:
        """Return the sampler of the first k parts."""
        return FlowSampler(self.prior, Sequential(layer for part in self.parts[:k] for layer in part.layers))

    def part(self, k: int, n: int, generator: Generator | SharedStream | None = None) -> Part:
        """Return part k, counted from 0, on n draws of the parts before it, which are constants for it."""
        if k == 0:
            return Part(self.prior, self.parts[0])
        before = self.prefix(k)
        with torch.no_grad():
            draws = before.sample(n, generator)
        return Part(GivenDraws(draws, lambda: score(before, draws[0])), self.parts[k])

    def chain(self, share: Iterable[int] | None = None, *, given: Prior | None = None) -> Iterator[Part]:
        """Yield all parts, or a share that follow each other, each on the draws that the one before it was asked for.

        The first of them stands on `given`, by default the prior.
        """
        before = self.prior if given is None else given
        for k in range(len(self.parts)) if share is None else share:
            part = Part(before, self.parts[k])
            yield part
            before = part.passed_on()

    def on_data(self, k: int) -> "PartOnData":
        """Return part k, counted from 0, with what makes its input from data."""
        return PartOnData(self, k)


class PartOnData(FlowSampler):
    """A part that reads data through the parts behind it, which are constants for it; the parts before are left out."""

    def __init__(self, sampler: PartwiseSampler, k: int) -> None:
        prior = sampler.prior if k == 0 else _constant(sampler.prior)
        super().__init__(prior, sampler.parts[k])
        self.behind = tuple(reversed(sampler.parts[k + 1 :]))

    def log_prob(self, x: Tensor) -> Tensor:
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        with torch.no_grad():
            for part in self.behind:
                x, log_det = part.inverse(x)
                total = total + log_det
        return super().log_prob(x) + total


def score(sampler: FlowSampler, x: Tensor) -> Tensor:
    """Return `d log q / dx`, a constant; parameters keep the gradients that they have."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(sampler.log_prob(leaf).sum(), leaf)
    return gradient


def _constant(prior: Prior) -> Prior:
    """Return the prior with parameters that learn nothing."""
    return copy.deepcopy(prior).requires_grad_(requires_grad=False) if isinstance(prior, nn.Module) else prior
