"""Gradients that are written out, scores found on the way, and layers computed again or compiled."""

import copy
import math

import pytest
import torch
from torch.testing import assert_close

from latticeflow.actions import U1Action
from latticeflow.config import ConfigError
from latticeflow.config.loading import parse_config
from latticeflow.flows import ElementwiseAffine, Sequential, compile_couplings, coupling_flow, gauge_flow, linear_flow
from latticeflow.flows import networks as module
from latticeflow.flows.asked import without
from latticeflow.flows.bijection import Bijection
from latticeflow.flows.compiling import compiler
from latticeflow.flows.masks import StripeMask
from latticeflow.flows.networks import CellConvolution
from latticeflow.flows.spline import (
    circular_spline,
    spline_forward,
    spline_inverse,
    tailed_forward,
    tailed_inverse,
    tailed_spline,
)
from latticeflow.priors import HaarUniform, StudentT
from latticeflow.samplers import FlowSampler
from latticeflow.streams import stream
from latticeflow.training.estimators import make_estimator

BOUND = 2.0
SPLINES = {
    "circle": (3, lambda p, x: spline_forward(circular_spline(p), x)),
    "circle, inverse": (3, lambda p, x: spline_inverse(circular_spline(p), x)),
    "line": (2, lambda p, x: tailed_forward(tailed_spline(p, BOUND), x, BOUND)),
    "line, inverse": (2, lambda p, x: tailed_inverse(tailed_spline(p, BOUND), x, BOUND)),
}
SMALL = {"hidden": [6], "bins": 3}
FLOWS = {
    "gauge": ((2, 8, 4), lambda: gauge_flow((8, 4), layers=3, **SMALL)),
    "gauge, no hidden layer": ((2, 4, 4), lambda: gauge_flow((4, 4), layers=3, hidden=[], bins=3)),
    "gauge, dilated": (
        (2, 8, 8),
        lambda: gauge_flow((8, 8), layers=2, conditioner="local", dilations=[1, 2, 3], hidden=[5, 9], bins=3),
    ),
    "gauge, local": ((2, 4, 8), lambda: gauge_flow((4, 8), layers=3, conditioner="local", **SMALL)),
    "gauge, charge kept": ((2, 4, 4), lambda: gauge_flow((4, 4), layers=3, keep_charge=True, **SMALL)),
    "gauge, holonomies": ((2, 4, 4), lambda: gauge_flow((4, 4), layers=2, polyakov=True, holonomy_pairs=1, **SMALL)),
    "affine": ((4, 4), lambda: coupling_flow((4, 4), layers=3, hidden=[6])),
    "splines, odd": ((4, 4), lambda: coupling_flow((4, 4), layers=3, transform="spline", odd=True, hidden=[6], bins=3)),
    "linear": ((6,), lambda: linear_flow((6,), layers=2)),
    "mixed": ((5,), lambda: Sequential([coupling_flow((5,), layers=2, conditioner="dense"), ElementwiseAffine((5,))])),
}


def built(name):
    """Return a flow with weights away from the identity, and fields and scores to give it."""
    shape, make = FLOWS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        flow = make().double()
        for parameter in flow.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        return flow, torch.randn(4, *shape, dtype=torch.float64), torch.randn(4, *shape, dtype=torch.float64)


def gradients(surrogate, model):
    found = torch.autograd.grad(surrogate, list(model.parameters()), allow_unused=True)
    return [torch.zeros(()) if one is None else one for one in found]


# ---------------------------------------------------------------- splines and convolutions


@pytest.mark.parametrize("name", SPLINES)
@pytest.mark.parametrize("bins", [1, 2, 5])
def test_gradients_of_a_spline_once_and_twice(name, bins):
    kind, run = SPLINES[name]
    generator = torch.Generator().manual_seed(bins)
    parameters = torch.randn(7, 3 * bins - 3 + kind, generator=generator, dtype=torch.float64).requires_grad_()
    position = (1.9 * torch.rand(7, generator=generator, dtype=torch.float64) - 0.95) * BOUND
    inputs = parameters, position.requires_grad_()
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs, atol=1e-4)


def test_no_gradient_beyond_the_last_knots():
    parameters = torch.randn(2, 5, dtype=torch.float64).requires_grad_()
    x = torch.tensor([-3 * BOUND, 2 * BOUND], dtype=torch.float64).requires_grad_()
    y, log_slope = tailed_forward(tailed_spline(parameters, BOUND), x, BOUND)
    of_parameters, of_x = torch.autograd.grad(y.sum() + log_slope.sum(), (parameters, x))
    assert not of_parameters.any()
    assert (of_x == 1).all()


@pytest.mark.parametrize("channels", [(3, 2), (2, 5), (1, 3)])
def test_gradients_of_a_convolution_once_and_twice(channels, monkeypatch):
    """The windows of one configuration at a time, of two, and of all."""
    layer = CellConvolution(*channels, StripeMask((8, 4), 0, 1).neighbours(3, 2)).double()
    x = torch.randn(3, 8, channels[0], dtype=torch.float64, requires_grad=True)
    plain = layer.linear(x.index_select(1, layer.neighbours).view(3, 8, -1))
    cotangent = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, (x, *layer.parameters()), cotangent)
    for numbers in (1, 2 * 72 * channels[0], 2**17):
        monkeypatch.setattr(module, "IN_CACHE", numbers)
        assert_close(layer(x), plain, rtol=0, atol=1e-13)
        assert_close(torch.autograd.grad(layer(x), (x, *layer.parameters()), cotangent), expected, rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))


def test_a_convolution_keeps_its_input_and_not_the_windows():
    layer, kept = CellConvolution(4, 4, StripeMask((16, 16), 0, 0).neighbours(3)), []
    x = torch.randn(8, 64, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        layer(x)
    assert sum(kept) < 2 * x.numel() + 3000


def test_gradients_of_inputs_alone():
    layer = CellConvolution(2, 3, StripeMask((4, 4), 0, 0).neighbours(3))
    x = torch.randn(2, 4, 2, requires_grad=True)
    with without("weights"):
        (alone,) = torch.autograd.grad(layer(x).sum(), x)
    of_x, of_weight = torch.autograd.grad(layer(x).sum(), (x, layer.linear.weight))
    assert torch.equal(alone, of_x)
    assert of_weight.any()


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("name", FLOWS)
def test_the_score_on_the_way_is_that_of_the_density(name):
    flow, z, score = built(name)
    x, log_det, carried = flow.carry_score(z, score)
    plain, plain_log_det = flow(z)
    assert_close((x, log_det), (plain, plain_log_det), rtol=0, atol=0)
    assert not carried.requires_grad
    leaf = x.detach().requires_grad_()
    back, log_inverse = flow.inverse(leaf)
    (expected,) = torch.autograd.grad((back * score).sum() + log_inverse.sum(), leaf)
    assert_close(carried, expected, rtol=1e-7, atol=1e-7)
    assert_close(Bijection.carry_score(flow, z, score)[2], expected, rtol=1e-9, atol=1e-9)
    with torch.no_grad():  # where derivatives may be written out
        assert_close(flow.carry_score(z, score), (x, log_det, carried), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["gauge", "splines, odd", "mixed"])
def test_carrying_a_score_leaves_the_gradient_of_the_field_as_it_is(name):
    flow, z, score = built(name)
    expected = gradients(flow(z)[0].sum(), flow)
    assert_close(gradients(flow.carry_score(z, score)[0].sum(), flow), expected, rtol=1e-12, atol=1e-12)


def test_draws_with_scores_of_priors_with_and_without_gradient():
    for prior, flow in (
        (HaarUniform((4, 4)), built("gauge, charge kept")[0]),
        (StudentT((5,), degrees_of_freedom=6.0).double(), built("mixed")[0]),
    ):
        sampler = FlowSampler(prior, flow)
        x, log_q, score = sampler.sample_with_score(3, stream(1, "test"))
        assert_close((x, log_q), sampler.sample(3, stream(1, "test")), rtol=0, atol=0)
        leaf = x.detach().requires_grad_()
        (expected,) = torch.autograd.grad(sampler.log_prob(leaf).sum(), leaf)
        assert_close(score, expected, rtol=1e-8, atol=1e-8)


def latent_prior(name):
    shape = FLOWS[name][0]
    return HaarUniform(shape[1:]) if "gauge" in name else StudentT(shape, degrees_of_freedom=6.0).double()


@pytest.mark.parametrize("name", FLOWS)
def test_draws_that_are_held_know_the_gradient_of_their_density(name):
    sampler = FlowSampler(latent_prior(name), built(name)[0])
    x, log_q = sampler.sample_held(4, stream(1, "test"))
    assert not x.requires_grad
    assert_close((x, log_q), sampler.sample(4, stream(1, "test")), rtol=0, atol=1e-12)
    weight = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64)
    expected = gradients((sampler.log_prob(x) * weight).sum(), sampler)
    assert_close(gradients((log_q * weight).sum(), sampler), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["gauge", "gauge, local", "gauge, charge kept", "affine", "splines, odd"])
def test_couplings_need_no_inverse_for_it(name, monkeypatch):
    sampler = FlowSampler(latent_prior(name), built(name)[0])
    monkeypatch.setattr(type(sampler.flow), "inverse", None)
    _, log_q = sampler.sample_held(2, stream(1, "test"))
    log_q.sum().backward()
    assert all(parameter.grad is not None for parameter in sampler.flow.parameters())


def test_single_precision_scores_are_better_on_the_way():
    """By an inverse pass the error is that of the inverse times the curvature of the splines."""
    flow = built("gauge")[0].float()
    exact, z = copy.deepcopy(flow).double(), torch.randn(64, 2, 8, 4)
    score = torch.randn_like(z)
    truth = exact.carry_score(z.double(), score.double())[2]
    errors = [
        ((way(flow, z, score)[2].double() - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)).median()
        for way in (type(flow).carry_score, Bijection.carry_score)
    ]
    assert errors[0] < 1e-5
    assert errors[0] < errors[1]


# ---------------------------------------------------------------- computed again, compiled


@pytest.mark.parametrize("estimator", ["reinforce", "reparametrisation", "path"])
def test_computing_layers_again_changes_no_gradient(estimator):
    sampler = FlowSampler(HaarUniform((8, 4)), built("gauge")[0])
    found = []
    for sampler.flow.recompute in (False, True):
        surrogate, _ = make_estimator(estimator)(sampler, U1Action(1.0), 4, stream(2, "test"))
        found.append(gradients(surrogate, sampler))
    assert_close(found[0], found[1], rtol=1e-8, atol=1e-10)


def test_computing_layers_again_keeps_their_inputs_alone():
    flow, z, _ = built("gauge")
    sizes = []
    for flow.recompute in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            flow(z)
        sizes.append(sum(kept))
    assert sizes[1] < sizes[0] / 5


def test_nothing_to_compile():
    with pytest.raises(ValueError, match="no gauge couplings"):
        compile_couplings(linear_flow((4,), layers=1))
    with pytest.raises(ValueError, match="no gauge couplings"):
        compile_couplings(built("affine")[0])
    text = """
        lattice.shape = [4]
        action = {{kind = "scalar", m2 = 1.0, lam = 0.0}}
        sampler = {sampler}
        training = {{compile = true}}
    """
    for sampler in (
        '{prior = {kind = "normal"}, flow = {kind = "linear"}}',
        '{prior = {kind = "normal"}, flow = {kind = "coupling", transform = "affine"}}',
        '{kind = "stabilised", transform = "affine"}',
    ):
        with pytest.raises(ConfigError, match=r"training\.compile"):
            parse_config(text.format(sampler=sampler), source="test")
    parse_config(text.format(sampler='{kind = "stabilised", transform = "spline"}'), source="test")


@pytest.mark.long
@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["gauge, local"])
def test_compiled_couplings_agree(name):
    flow, z, score = built(name)
    compiled = copy.deepcopy(flow)
    compile_couplings(compiled)
    assert_close(compiled(z), flow(z), rtol=1e-10, atol=1e-10)
    assert_close(compiled.inverse(z), flow.inverse(z), rtol=1e-10, atol=1e-10)
    assert_close(compiled.carry_score(z, score), flow.carry_score(z, score), rtol=1e-7, atol=1e-7)
    with torch.no_grad():
        assert_close(compiled.carry_score(z, score), flow.carry_score(z, score), rtol=1e-7, atol=1e-7)
    expected = gradients(flow(z)[1].sum(), flow)
    assert_close(gradients(compiled(z)[1].sum(), compiled), expected, rtol=1e-8, atol=1e-8)
    assert math.isfinite(float(compiled.float()(z.float())[1].sum()))
