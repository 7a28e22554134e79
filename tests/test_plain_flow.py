"""The plain implementation that benchmarks measure against computes what the package does."""

import importlib
from pathlib import Path

import pytest
import torch

from latticeflow.actions import SchwingerAction
from latticeflow.flows.masks import StripeMask
from latticeflow.priors import HaarUniform
from latticeflow.samplers import FlowSampler
from latticeflow.streams import stream
from latticeflow.training import make_estimator
from latticeflow.u1 import gauge_transform, wrap

FOLDER = Path(__file__).parents[1] / "runs" / "benchmarks"
SHAPE = (4, 8)


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("plain_flow")


def flow_of(plain, layers):
    """Return a flow that is far from the identity."""
    torch.manual_seed(3)
    flow = plain.plain_flow(SHAPE, layers=layers, bins=4, hidden=(8, 8)).double()
    with torch.no_grad():
        for layer in flow.layers:
            layer.network[-1].weight.mul_(50)
            layer.network[-1].bias.normal_(std=0.3)
    return flow.requires_grad_(False)


def links_of(n):
    return HaarUniform(SHAPE).sample(n, stream(1, "plain"))


@pytest.mark.parametrize("mu", [0, 1])
def test_every_loop_that_is_seen_is_frozen_and_moves_no_other(plain, mu):
    layer = flow_of(plain, 2).layers[mu]
    z = links_of(2)
    x, _ = layer(z)
    moved = wrap(x - z).abs() > 1e-9
    active = torch.zeros(2, *SHAPE).flatten()
    active[StripeMask(SHAPE, mu=mu, offset=0).active_links()] = 1
    assert torch.equal(moved.all(dim=0), active.reshape(2, *SHAPE).bool())
    assert float(((plain.loops(x) - plain.loops(z)) * layer.frozen).sin().abs().max()) < 1e-12
    assert layer.frozen.sum(dim=(2, 3)).tolist() == [[16, 16 * mu, 16 * (1 - mu)]]


def test_round_trip_equivariance_and_log_det(plain):
    flow, z = flow_of(plain, 4), links_of(2)
    x, log_det = flow(z)
    back, log_det_back = flow.inverse(x)
    assert float(wrap(back - z).abs().max()) < 1e-10
    torch.testing.assert_close(log_det_back, -log_det)
    jacobian = torch.autograd.functional.jacobian(lambda one: flow(one[None])[0][0].flatten(), z[0])
    expected = torch.linalg.slogdet(jacobian.reshape(z[0].numel(), -1))[1]
    torch.testing.assert_close(log_det[0], expected, rtol=0, atol=1e-8)
    angles = 6 * torch.rand(2, *SHAPE, dtype=torch.float64, generator=stream(2, "plain"))
    moved, same = flow(gauge_transform(z, angles))
    assert float(wrap(moved - gauge_transform(x, angles)).abs().max()) < 1e-9
    torch.testing.assert_close(same, log_det)


@pytest.mark.parametrize("assembly", ["elements", "blocks", "vectorised"])
def test_the_plain_action_and_its_gradient_are_those_of_the_package(plain, assembly):
    results = []
    for action in (SchwingerAction(2.0, 0.276), plain.PlainAction(2.0, 0.276, assembly)):
        links = links_of(2).requires_grad_()
        value = action(links)
        results.append((value.detach(), *torch.autograd.grad(value.sum(), links)))
    for own, plain_one in zip(*results, strict=True):
        torch.testing.assert_close(plain_one, own, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["reinforce", "reparametrisation", "path"])
def test_the_plain_estimators_are_those_of_the_package(plain, name):
    """REINFORCE less the factor n / (n - 1) of its leave-one-out baseline."""
    sampler = FlowSampler(HaarUniform(SHAPE), flow_of(plain, 2).requires_grad_(True))
    action, gradients = SchwingerAction(2.0, 0.2), []
    for estimator, factor in ((make_estimator(name), 3 / 4 if name == "reinforce" else 1), (getattr(plain, name), 1)):
        sampler.zero_grad()
        surrogate, _ = estimator(sampler, action, 4, stream(5, "plain"))
        surrogate.backward()
        gradients.append(torch.cat([factor * p.grad.flatten() for p in sampler.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)
