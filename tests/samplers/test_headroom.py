"""Headroom: the couplings contract and the last map expands, so that an untrained flow is still near the identity."""

import math

import pytest
import torch
from torch.testing import assert_close

from latticeflow.flows import AffineMap, Clamp, SplineMap, coupling_flow
from latticeflow.flows.clamps import CLAMPS
from latticeflow.samplers import StabilisedSampler

DENSE = {"conditioner": "dense"}
CASES = {
    "convolution": ((4, 4), {}),
    "dense": ((6,), DENSE),
    "spline": ((6,), {**DENSE, "transform": "spline", "bound": 30.0}),
    "stripes": ((4, 6), {"mask": "stripes"}),
    "random masks, odd": ((5,), {**DENSE, "mask": "random", "odd": True}),
    "shared": ((4, 4), {"shared": True}),
    "tanh": ((4, 4), {"clamp": Clamp("tanh")}),
    "no clamp": ((4, 4), {"clamp": Clamp("none")}),
}


def sampler(shape, *, headroom, layers=8, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return StabilisedSampler(shape, layers=layers, headroom=headroom, hidden=[8], **options).double()


def latents(*shape):
    return torch.randn(50, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def without_networks(flow):
    """Set to zero what the networks say, which leaves the log scales that the couplings start from."""
    for layer in flow.layers:
        if hasattr(layer, "network"):
            for weight in layer.network.network.layers[-1].parameters():
                weight.zero_()
    return flow


@pytest.mark.parametrize("headroom", [0.0, 3.0])
@pytest.mark.parametrize(("shape", "options"), CASES.values(), ids=CASES)
def test_the_untrained_flow_is_near_the_identity(shape, options, headroom):
    """At `headroom` 3 shifts of a few thousandths come out 20 times as large."""
    flow, z = sampler(shape, headroom=headroom, **options).flow, latents(*shape)
    x, log_det = flow(z)
    assert 0 < (x - z).std() < 0.25
    assert log_det.abs().max() < 0.05 * math.prod(shape)


@pytest.mark.parametrize("headroom", [0.0, 1.0, 3.0, 7.0])
@pytest.mark.parametrize(("shape", "options"), CASES.values(), ids=CASES)
def test_contraction_and_expansion_are_opposite(shape, options, headroom):
    """Every site is contracted by `exp(-headroom)` in all and expanded by as much; without networks nothing is left."""
    flow, z = without_networks(sampler(shape, headroom=headroom, **options).flow), latents(*shape)
    x, log_det = flow(z)
    assert_close(x, z, rtol=1e-6, atol=1e-6)
    assert_close(log_det, torch.zeros_like(log_det), rtol=0, atol=1e-5)
    for layer in flow.layers[:-2]:
        z, _ = layer(z)
    assert_close(z, math.exp(-headroom) * latents(*shape), rtol=1e-6, atol=1e-6)
    assert_close(flow.layers[-1].log_scale, torch.full_like(flow.layers[-1].log_scale, headroom))


def test_there_is_none_unless_it_is_asked_for():
    plain = sampler((4, 4), headroom=0.0)
    assert all(layer.site_map.start == 0.0 for layer in plain.flow.layers[:-2])
    assert not plain.flow.layers[-1].log_scale.any()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        default = StabilisedSampler((4, 4), layers=8, hidden=[8]).double()
    assert_close(default.flow(latents(4, 4)), plain.flow(latents(4, 4)), rtol=0, atol=0)


def test_far_draws_have_room_to_expand():
    """The clamp lets the contractions go up to an expansion of `exp(headroom)` and more, 0.1 a layer."""
    flow, z = sampler((4,), headroom=3.0, **DENSE).flow, latents(4)
    with torch.no_grad():
        for layer in without_networks(flow).layers[:-2]:
            layer.network.network.layers[-1].linear.bias.copy_(torch.tensor([1e6, 0.0] * 2))
    x, _ = flow(z)
    assert_close(x, math.exp(3.0 + 0.1 * 4) * z, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- the start of a coupling


@pytest.mark.parametrize("start", [-1.9, -0.3, 0.0, 0.09])
@pytest.mark.parametrize("kind", CLAMPS)
def test_start_is_the_log_scale_at_parameters_zero(kind, start):
    z = latents(3)
    for site_map in (AffineMap(Clamp(kind), start=start), SplineMap(Clamp(kind), bins=4, bound=9.0, start=start)):
        parameters = torch.zeros(50, 3, site_map.outputs, dtype=torch.float64)
        x, log_slope = site_map(parameters, z)
        assert_close(x, math.exp(start) * z, rtol=1e-9, atol=1e-9)
        assert_close(log_slope, torch.full_like(z, start), rtol=1e-9, atol=1e-9)
        back, log_slope_back = site_map.inverse(parameters, x)
        assert_close(back, z, rtol=1e-9, atol=1e-9)
        assert_close(log_slope_back, -log_slope, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("transform", ["affine", "spline"])
def test_every_coupling_of_a_flow_has_its_start(transform):
    flow = without_networks(coupling_flow((4, 4), layers=3, transform=transform, start=-0.5, bound=9.0).double())
    _, log_det = flow(latents(4, 4))
    assert_close(log_det, torch.full((50,), -0.5 * 3 * 8, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("transform", ["affine", "spline"])
@pytest.mark.parametrize(("start", "bound"), [(0.1, "0.1"), (1.0, "0.1"), (-2.0, "2"), (-5.0, "2"), (math.nan, "2")])
def test_a_start_that_the_clamp_does_not_reach_is_refused(transform, start, bound):
    with pytest.raises(ValueError, match=f"does not reach a log scale of {start:g}; its bound is {bound}"):
        coupling_flow((4, 4), layers=2, transform=transform, start=start)


@pytest.mark.parametrize(("layers", "headroom", "start"), [(2, 3.0, "-3"), (3, 3.0, "-2"), (8, -3.0, "0.75")])
def test_headroom_that_the_clamp_does_not_reach_is_refused(layers, headroom, start):
    with pytest.raises(ValueError, match=f"does not reach a log scale of {start}; its bound is"):
        StabilisedSampler((4, 4), layers=layers, headroom=headroom)
    StabilisedSampler((4, 4), layers=layers, headroom=headroom, clamp=Clamp("none"))
    StabilisedSampler((4, 4), layers=layers, headroom=headroom, clamp=Clamp("symmetric", negative=4.0))
