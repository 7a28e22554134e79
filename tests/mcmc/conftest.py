"""What the tests of the kernels share: seeded generators, chains with all that they leave behind, a smooth flow."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from latticeflow.flows import Bijection
from latticeflow.observables import observables
from latticeflow.u1 import wrap


@dataclass(frozen=True)
class Chains:
    """Series `(replica, steps)` of observables and history columns, the last state, and the rejected non-finite."""

    observables: dict
    history: dict
    state: object
    bad: int

    def mean(self, name):
        """Return mean and error from the replica's means, which are independent: all autocorrelation is in them."""
        means = self.observables[name].mean(1)
        return means.mean(), means.std(ddof=1) / math.sqrt(len(means))


class SineFlow(Bijection):
    """`x = z + a sin(z - b)` for every link, smooth and circular, `|a| < 1` and b random."""

    def __init__(self, shape, *, strength=0.6):
        super().__init__()
        random = torch.Generator().manual_seed(99)
        draw = {"generator": random, "dtype": torch.float64}
        self.register_buffer("a", strength * (2 * torch.rand(2, *shape, **draw) - 1))
        self.register_buffer("b", 2 * math.pi * torch.rand(2, *shape, **draw))

    def forward(self, z):
        return wrap(z + self.a * torch.sin(z - self.b)), self._log_slope(z)

    def inverse(self, x):
        low, high = x - self.a.abs(), x + self.a.abs()
        for _ in range(60):
            middle = (low + high) / 2
            below = middle + self.a * torch.sin(middle - self.b) < x
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return wrap(low), -self._log_slope(low)

    def _log_slope(self, z):
        return torch.log1p(self.a * torch.cos(z - self.b)).flatten(1).sum(1)


class Constant:
    """What chains start from: links or fields of one value."""

    def __init__(self, shape, value=0.0):
        self.shape, self.value = shape, value

    def sample(self, n, generator=None):
        return torch.full((n, *self.shape), self.value, dtype=torch.float64)

    def log_prob(self, x):
        return torch.zeros(len(x), dtype=torch.float64)


@pytest.fixture(scope="session")
def generator():
    return lambda seed: torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def sine_flow():
    return SineFlow


@pytest.fixture(scope="session")
def constant():
    return Constant


@pytest.fixture(scope="session")
def run_chains(generator):
    """Return a function that runs a kernel and keeps every `thin`-th step after `burn` ones."""

    def run(kernel, names=(), *, replica, steps, seed, burn=0, thin=1, state=None):
        draws, wanted = generator(seed), observables(kernel.action, names)
        state = kernel.start(replica, draws) if state is None else state
        measured, history, bad = {name: [] for name in names}, {name: [] for name in kernel.history}, 0
        for step in range(burn + thin * steps):
            state, info = kernel.step(state, draws)
            if step < burn or (step - burn + 1) % thin:
                continue
            bad += info.bad
            for name, observable in wanted.items():
                measured[name].append(observable(state.field).numpy())
            for name in history:
                history[name].append(info.history[name].numpy())
        stacked = [
            {name: np.stack(parts, axis=1).astype(float) for name, parts in columns.items()}
            for columns in (measured, history)
        ]
        return Chains(*stacked, state, bad)

    return run
