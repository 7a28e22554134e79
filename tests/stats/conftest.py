import numpy as np
import pytest
from scipy.signal import lfilter


@pytest.fixture(scope="session")
def ar1():
    """Stationary chains ``x_t = a x_{t-1} + noise`` of variance one: ``tau_int = (1 + a) / (2 (1 - a))``."""

    def generate(a, shape, seed):
        noise = np.random.default_rng(seed).normal(size=shape)
        noise[..., 1:] *= np.sqrt(1 - a**2)
        return lfilter([1], [1, -a], noise, axis=-1)

    return generate


@pytest.fixture(scope="session")
def metropolis_states():
    """Run independence Metropolis chains on a finite set: uniform proposals, weights ``w``; one row per chain."""

    def generate(weights, chains, steps, seed):
        rng = np.random.default_rng(seed)
        state = rng.choice(weights.size, size=chains, p=weights / weights.sum())
        states, accepted = np.empty((steps, chains), dtype=int), np.empty((steps, chains), dtype=bool)
        for step in range(steps):
            proposal = rng.integers(weights.size, size=chains)
            accepted[step] = rng.random(chains) * weights[state] < weights[proposal]
            state = np.where(accepted[step], proposal, state)
            states[step] = state
        return states.T, accepted.T

    return generate
