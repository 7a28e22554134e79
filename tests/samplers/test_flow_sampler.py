"""The flow sampler: its density is normalised, belongs to its draws, and comes in double precision.

Statistical tests compare at five standard deviations (false-alarm rate 6e-7 each); seeds are fixed.
"""

import math

import pytest
import torch
from torch.testing import assert_close

from latticeflow.flows import Sequential, gauge_flow
from latticeflow.priors import HaarUniform, Normal, QuenchedU1
from latticeflow.samplers import FlowSampler
from latticeflow.u1 import plaquette, topological_charge, wrap

SHAPE = (4, 4)
SAMPLES = 10_000


def weak_flow(seed, *, shape=SHAPE, strength=0.03):
    """Return a cycle of couplings whose spline parameters are of order `strength`."""
    flow, generator = gauge_flow(shape, layers=8, hidden=[4], bins=3).double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for layer in flow.layers:
            layer.network.layers[-1].linear.weight.mul_(
                strength / math.sqrt(layer.network.layers[-1].linear.in_features)
            )
            layer.network.layers[-1].linear.bias.mul_(strength)
    return flow


def generator(seed):
    return torch.Generator().manual_seed(seed)


def assert_mean(values, expected):
    error = values.std().item() / math.sqrt(len(values))
    assert abs(values.mean().item() - expected) < 5 * error
    return error


@pytest.fixture(scope="module", params=["haar", "quenched"])
def sampler(request):
    prior = HaarUniform(SHAPE) if request.param == "haar" else QuenchedU1(0.2, SHAPE, sector=0.1)
    return FlowSampler(prior, weak_flow(3))


@pytest.fixture(scope="module")
def drawn(sampler):
    with torch.no_grad():
        return sampler.sample(SAMPLES, generator(2))


def test_log_prob_is_the_density_of_the_draws(sampler, drawn):
    x, log_q = drawn
    assert log_q.dtype == torch.float64
    assert log_q.shape == (SAMPLES,)
    assert x.shape == (SAMPLES, 2, *SHAPE)
    assert_close(sampler.log_prob(x), log_q, rtol=0, atol=1e-9)
    assert log_q.std() > 0.5


def test_sample_is_the_flow_of_the_prior(sampler):
    x, log_q = sampler.sample(50, generator(3))
    z = sampler.prior.sample(50, generator(3))
    expected, log_det = sampler.flow(z)
    assert torch.equal(sampler.latent(50, generator(3)), z)
    assert torch.equal(x, expected)
    assert_close(log_q, sampler.prior.log_prob(z) - log_det)


def test_density_is_normalised_over_haar_draws(sampler):
    """The mean of q over Haar-uniform fields is one."""
    x = HaarUniform(SHAPE).sample(SAMPLES, generator(4))
    with torch.no_grad():
        error = assert_mean(torch.exp(sampler.log_prob(x)), 1.0)
    assert error < 0.05


def test_draws_are_distributed_as_the_density_says(sampler, drawn):
    """The mean of 1/q over its own draws is one: an oracle that the Haar draws above do not share."""
    _, log_q = drawn
    assert assert_mean(torch.exp(-log_q), 1.0) < 0.05


def test_means_of_observables_agree_between_draws_and_density(sampler, drawn):
    """`E_q[O] = E_Haar[q O]` for loops and log q itself, both sides estimated; combined errors."""
    uniform = HaarUniform(SHAPE).sample(2 * SAMPLES, generator(5))
    with torch.no_grad():
        log_q = sampler.log_prob(uniform)
    shifts = []
    for direct, plain in zip(observables(*drawn), observables(uniform, log_q), strict=True):
        weighted = torch.exp(log_q) * plain
        error = math.hypot(direct.std() / math.sqrt(len(direct)), weighted.std() / math.sqrt(len(weighted)))
        assert abs(direct.mean() - weighted.mean()) < 5 * error
        shifts.append(abs(direct.mean() - plain.mean()) / error)
    assert max(shifts) > 10  # the flow is far enough from Haar for the agreement to mean something


def observables(links, log_q):
    cosines = torch.cos(plaquette(links))
    return cosines.mean((-2, -1)), cosines[:, 0, 1] * cosines[:, 0, 2], topological_charge(links) ** 2, log_q


@pytest.mark.parametrize("prior", [HaarUniform(SHAPE), QuenchedU1(2.0, SHAPE, sector=0.3), Normal((3, 5), scale=0.7)])
def test_without_a_flow_it_is_the_prior(prior):
    sampler = FlowSampler(prior, Sequential())
    x, log_q = sampler.sample(20, generator(6))
    assert torch.equal(x, prior.sample(20, generator(6)))
    assert_close(log_q, prior.log_prob(x))
    assert_close(sampler.log_prob(x), prior.log_prob(x))
    assert x.dtype == log_q.dtype == torch.float64
    assert list(sampler.parameters()) == []


def test_same_seed_same_draws(sampler):
    first, again, other = (sampler.sample(5, generator(seed)) for seed in (7, 7, 8))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_global_random_state_is_not_used(sampler):
    before = torch.random.get_rng_state()
    sampler.sample(5, generator(7))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_single_precision_flow():
    """Fields take the flow's dtype, densities stay double, and both agree with the double-precision flow."""
    double = FlowSampler(QuenchedU1(1.0, SHAPE), weak_flow(9))
    single = FlowSampler(QuenchedU1(1.0, SHAPE), weak_flow(9)).float()
    x, log_q = single.sample(200, generator(10))
    exact, exact_log_q = double.sample(200, generator(10))
    assert x.dtype == single.latent(2, generator(10)).dtype == torch.float32
    assert log_q.dtype == single.log_prob(x).dtype == torch.float64
    assert wrap(x.double() - exact).abs().max() < 1e-4
    assert_close(log_q, exact_log_q, rtol=0, atol=1e-3)
    assert_close(single.log_prob(x), log_q, rtol=0, atol=1e-3)
    assert not torch.equal(log_q, log_q.float().double())
    widened = single.double()
    assert widened.sample(2, generator(10))[0].dtype == torch.float64


def test_gradients_reach_parameters_and_fields(sampler):
    x, log_q = sampler.sample(10, generator(11))
    for value in (x.cos().sum(), log_q.sum()):
        gradients = torch.autograd.grad(value, list(sampler.parameters()), retain_graph=True)
        assert all(torch.isfinite(g).all() for g in gradients)
        assert max(g.abs().max() for g in gradients) > 0
    leaf = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(sampler.log_prob(leaf).sum(), leaf)
    step = 1e-6 * torch.randn(leaf.shape, generator=generator(12), dtype=torch.float64)
    rise = sampler.log_prob(x.detach() + step) - sampler.log_prob(x.detach() - step)
    assert_close(2 * (gradient * step).flatten(1).sum(1), rise.detach(), rtol=1e-4, atol=1e-8)
    assert gradient.abs().max() > 0.01


def test_batch_of_one(sampler):
    x, log_q = sampler.sample(1, generator(13))
    assert x.shape == (1, 2, *SHAPE)
    assert log_q.shape == sampler.log_prob(x).shape == (1,)
