"""The circular spline against autograd, against zuko's spline with the same knots, and against its own inverse."""

import math

import pytest
import torch
from torch.testing import assert_close
from zuko.transforms import MonotonicRQSTransform

from latticeflow.flows.spline import LOGIT_BOUND, MIN_BIN, circular_spline, spline_forward, spline_inverse
from latticeflow.u1 import wrap

BINS = [1, 2, 6, 9]
SCALES = [0.1, 1.0, 10.0, 1e4]  # the last two saturate the soft bound on the logits
POINTS = 4000


def drawn(bins, scale, *, dtype=torch.float64, points=POINTS):
    """Return random spline parameters `(points, 3 bins)` and angles `(points,)`."""
    generator = torch.Generator().manual_seed(100 * bins + round(math.log10(scale)))
    parameters = scale * torch.randn(points, 3 * bins, generator=generator, dtype=torch.float64)
    angles = math.pi * (2 * torch.rand(points, generator=generator, dtype=torch.float64) - 1)
    return parameters.to(dtype), angles.to(dtype)


def distance(a, b):
    return wrap(a - b).abs().max().item()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bins", BINS)
def test_round_trip_in_double_precision(bins, scale):
    parameters, angles = drawn(bins, scale)
    spline = circular_spline(parameters)
    mapped, log_slope = spline_forward(spline, angles)
    back, log_inverse = spline_inverse(spline, mapped.requires_grad_())
    assert distance(back, angles) < 1e-10
    (change,) = torch.autograd.grad(log_inverse.sum(), mapped)  # what an ulp of the image, up to pi, is worth
    assert ((log_inverse + log_slope).abs() < 1e-9 + 2**-49 * change.abs()).all()
    ahead, _ = spline_forward(spline, spline_inverse(spline, angles)[0])
    assert distance(ahead, angles) < 1e-10
    assert distance(mapped, angles) > 0.01 * min(scale, 1)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bins", BINS)
def test_round_trip_in_single_precision(bins, scale):
    """Where the slope is e^-10 an error of one ulp in y is 1e-2 in x; the residual in y stays small."""
    parameters, angles = drawn(bins, scale, dtype=torch.float32)
    spline = circular_spline(parameters)
    mapped, log_slope = spline_forward(spline, angles)
    back, log_inverse = spline_inverse(spline, mapped)
    assert mapped.dtype == log_slope.dtype == back.dtype == log_inverse.dtype == torch.float32
    assert distance(back, angles) < (1e-3 if scale <= 1 else 5e-2)
    ahead, _ = spline_forward(spline, spline_inverse(spline, angles)[0])
    assert distance(ahead, angles) < (1e-4 if scale <= 1 else 2e-3)
    exact, exact_log_slope = spline_forward(circular_spline(parameters.double()), angles.double())
    assert distance(mapped.double(), exact) < (1e-4 if scale <= 1 else 2e-3)
    assert (log_slope.double() - exact_log_slope).abs().median() < 1e-5


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("direction", [spline_forward, spline_inverse])
def test_log_derivative_is_that_of_autograd(direction, bins, scale):
    parameters, angles = drawn(bins, scale)
    angles.requires_grad_()
    mapped, log_slope = direction(circular_spline(parameters), angles)
    (slope,) = torch.autograd.grad(mapped.sum(), angles)
    assert_close(torch.log(slope), log_slope, rtol=0, atol=1e-8)


@pytest.mark.parametrize("bins", BINS)
def test_log_derivative_is_a_difference_quotient(bins):
    parameters, angles = drawn(bins, 1.0)
    spline, step = circular_spline(parameters), 1e-6
    rise = wrap(spline_forward(spline, angles + step)[0] - spline_forward(spline, angles - step)[0])
    slope = torch.exp(spline_forward(spline, angles)[1])
    assert ((rise / (2 * step) - slope) / slope).abs().median() < 1e-6


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("direction", [spline_forward, spline_inverse])
def test_maps_the_circle_onto_itself_monotonically(direction, scale):
    parameters, _ = drawn(6, scale, points=50)
    grid = torch.linspace(-math.pi + 1e-9, math.pi, 2001, dtype=torch.float64)
    spline = circular_spline(parameters.repeat_interleave(len(grid), dim=0))
    mapped = direction(spline, grid.repeat(50))[0].reshape(50, -1)
    assert (mapped.diff(dim=1) > 0).all()
    assert_close(mapped[:, -1], torch.full((50,), math.pi, dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(mapped[:, 0], torch.full((50,), -math.pi, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("direction", [spline_forward, spline_inverse])
def test_slope_is_continuous_across_every_knot_and_the_cut(direction):
    parameters, _ = drawn(6, 1.0, points=200)
    spline = circular_spline(parameters)
    knots = spline.x if direction is spline_forward else spline.y
    for knot in knots.unbind(-1):
        left, right = (direction(spline, knot + side) for side in (-1e-9, 1e-9))
        assert distance(left[0], right[0]) < 1e-6
        assert_close(left[1], right[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("turns", [-3, 1, 2])
@pytest.mark.parametrize("direction", [spline_forward, spline_inverse])
def test_periodic(direction, turns):
    parameters, angles = drawn(6, 1.0)
    spline = circular_spline(parameters)
    here, there = direction(spline, angles), direction(spline, angles + 2 * math.pi * turns)
    assert distance(here[0], there[0]) < 1e-11
    assert_close(here[1], there[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("direction", [spline_forward, spline_inverse])
def test_zero_parameters_are_the_identity(direction, bins, dtype):
    _, angles = drawn(bins, 1.0, dtype=dtype)
    mapped, log_slope = direction(circular_spline(torch.zeros(POINTS, 3 * bins, dtype=dtype)), angles)
    tolerance = 20 * torch.finfo(dtype).eps
    assert_close(mapped, angles, rtol=0, atol=tolerance)
    assert_close(log_slope, torch.zeros_like(angles), rtol=0, atol=tolerance)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_knots_are_ordered_and_within_their_bounds(scale):
    spline = circular_spline(drawn(6, scale)[0])
    for knots in (spline.x, spline.y):
        lengths = knots.diff(dim=-1)
        assert_close(lengths.sum(-1), torch.full((POINTS,), 2 * math.pi, dtype=torch.float64))
        assert lengths.min() >= 2 * math.pi * MIN_BIN * (1 - 1e-9)
        assert lengths.max() / lengths.min() <= math.exp(2 * LOGIT_BOUND)
    assert (spline.derivative > 0).all()
    assert_close(spline.derivative[:, 0], spline.derivative[:, -1])
    assert spline.derivative.max() > 1.5
    assert spline.derivative.min() < 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("direction", [spline_forward, spline_inverse])
def test_gradients_are_finite_everywhere(direction, scale, dtype):
    """Also on knots and on the cut, where a square root or a clamp could divide by zero."""
    parameters = (scale * drawn(6, 1.0, points=500)[0]).to(dtype).requires_grad_()
    spline = circular_spline(parameters)
    knots = spline.x if direction is spline_forward else spline.y
    for angle in (*knots.detach().unbind(-1), drawn(6, 1.0, points=500)[1].to(dtype)):
        angle = angle.clone().requires_grad_()
        mapped, log_slope = direction(spline, angle)
        gradients = torch.autograd.grad((mapped + log_slope).sum(), (parameters, angle), retain_graph=True)
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        assert gradients[1].abs().max() > 0


@pytest.mark.parametrize("direction", [spline_forward, spline_inverse])
def test_gradient_with_respect_to_the_parameters(direction):
    """Autograd against numerical differentiation (angles away from knots, where the map is smooth)."""
    parameters, angles = drawn(3, 1.0, points=8)

    def mapped(p):
        return direction(circular_spline(p), angles)

    assert torch.autograd.gradcheck(mapped, parameters.requires_grad_(), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("bins", [2, 6])
def test_zuko_agrees_on_the_same_knots(bins, scale):
    parameters, angles = drawn(bins, scale)
    spline = circular_spline(parameters)
    zeros = torch.zeros(POINTS, bins, dtype=torch.float64)
    oracle = MonotonicRQSTransform(zeros, zeros, zeros[:, 1:], bound=math.pi)
    oracle.horizontal, oracle.vertical, oracle.derivatives = spline.x, spline.y, spline.derivative
    mapped, log_slope = spline_forward(spline, angles)
    expected, expected_log_slope = oracle.call_and_ladj(angles)
    assert_close(mapped, expected, rtol=0, atol=1e-11)
    assert_close(log_slope, expected_log_slope, rtol=0, atol=1e-8)
    assert_close(spline_inverse(spline, angles)[0], oracle.inv(angles), rtol=0, atol=1e-9)
