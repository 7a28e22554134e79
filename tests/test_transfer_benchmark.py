"""The benchmark of transfer in volume: the prior that it tunes for a flow."""

import importlib
from pathlib import Path

import pytest
import torch

from latticeflow.priors import QuenchedU1
from latticeflow.stats import ess
from latticeflow.u1 import plaquette, smooth_charge

FOLDER = Path(__file__).parents[1] / "runs" / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("transfer")


def drawn(benchmark, prior, target, seed):
    z = prior.sample(3000, torch.Generator().manual_seed(seed))
    log_weight, zero = (target.log_prob(z) - prior.log_prob(z)).numpy(), torch.zeros(len(z)).numpy()
    cosine, smooth = torch.cos(plaquette(z)).sum((1, 2)).numpy(), smooth_charge(z).numpy()
    return benchmark.Proposals(log_weight, log_weight, zero, cosine, smooth)


def test_the_tuned_prior_is_the_target_where_that_is_a_quenched_law(benchmark):
    """ESS/N is 0.86 before and 1 at the optimum, which 200 evaluations come close to."""
    prior = QuenchedU1(2.2, (4, 4), smooth_sector=[(0.7, 3.0), (0.3, 0.4)])
    target = QuenchedU1(2.5, (4, 4), smooth_sector=[(0.5, 5.0), (0.5, 0.8)])
    found = benchmark.tuned(prior, drawn(benchmark, prior, target, seed=1))
    before = ess(drawn(benchmark, prior, target, seed=2).log_weight)
    after = ess(drawn(benchmark, found, target, seed=2).log_weight)
    assert before < 0.95
    assert after > 0.99
