"""The spline with linear tails: the identity beyond its bound, smooth at it, and an exact inverse everywhere."""

import math

import pytest
import torch
from torch.testing import assert_close
from zuko.transforms import MonotonicRQSTransform

from latticeflow.flows import Clamp, SplineMap
from latticeflow.flows.spline import LOGIT_BOUND, MIN_BIN, tailed_forward, tailed_inverse, tailed_spline

BINS = [1, 2, 6, 9]
SCALES = [0.1, 1.0, 10.0, 1e4]  # the last two saturate the soft bound on the logits
BOUNDS = [0.5, 3.0, 40.0]
POINTS = 3000
DIRECTIONS = [tailed_forward, tailed_inverse]


def drawn(bins, scale, bound, *, dtype=torch.float64, points=POINTS):
    """Return spline parameters `(points, 3 bins - 1)` and positions `(points,)`, a third of them beyond the bound."""
    generator = torch.Generator().manual_seed(100 * bins + round(math.log10(scale)))
    parameters = scale * torch.randn(points, 3 * bins - 1, generator=generator, dtype=torch.float64)
    positions = 3 * bound * (torch.rand(points, generator=generator, dtype=torch.float64) - 0.5)
    return parameters.to(dtype), positions.to(dtype)


def largest(difference):
    return difference.abs().max().item()


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bins", BINS)
def test_round_trip_in_double_precision(bins, scale, bound):
    parameters, x = drawn(bins, scale, bound)
    spline = tailed_spline(parameters, bound)
    y, log_slope = tailed_forward(spline, x, bound)
    back, log_inverse = tailed_inverse(spline, y, bound)
    assert largest(back - x) < 1e-10 * bound
    assert_close(log_inverse, -log_slope, rtol=0, atol=1e-8)
    ahead, _ = tailed_forward(spline, tailed_inverse(spline, x, bound)[0], bound)
    assert largest(ahead - x) < 1e-10 * bound
    if bins > 1:
        assert largest(y - x) > 0.01 * bound * min(scale, 1)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bins", BINS)
def test_round_trip_in_single_precision(bins, scale):
    """Where the slope is e^-10 an error of one ulp in y is 1e-2 in x; the residual in y stays small."""
    parameters, x = drawn(bins, scale, 3.0, dtype=torch.float32)
    spline = tailed_spline(parameters, 3.0)
    y, log_slope = tailed_forward(spline, x, 3.0)
    back, log_inverse = tailed_inverse(spline, y, 3.0)
    assert y.dtype == log_slope.dtype == back.dtype == log_inverse.dtype == torch.float32
    assert largest(back - x) < (1e-3 if scale <= 1 else 5e-2)
    ahead, _ = tailed_forward(spline, tailed_inverse(spline, x, 3.0)[0], 3.0)
    assert largest(ahead - x) < (1e-4 if scale <= 1 else 2e-3)
    exact, exact_log_slope = tailed_forward(tailed_spline(parameters.double(), 3.0), x.double(), 3.0)
    assert largest(y.double() - exact) < (1e-4 if scale <= 1 else 2e-3)
    assert (log_slope.double() - exact_log_slope).abs().median() < 1e-5


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_log_derivative_is_that_of_autograd(direction, bins, scale):
    parameters, x = drawn(bins, scale, 3.0)
    x.requires_grad_()
    y, log_slope = direction(tailed_spline(parameters, 3.0), x, 3.0)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert_close(torch.log(slope), log_slope, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_zero_parameters_are_the_identity(direction, bins, dtype):
    _, x = drawn(bins, 1.0, 3.0, dtype=dtype)
    y, log_slope = direction(tailed_spline(torch.zeros(POINTS, 3 * bins - 1, dtype=dtype), 3.0), x, 3.0)
    tolerance = 20 * torch.finfo(dtype).eps
    assert_close(y, x, rtol=0, atol=tolerance)
    assert_close(log_slope, torch.zeros_like(x), rtol=0, atol=tolerance)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_identity_from_the_bound_on(direction, scale, bound):
    parameters, _ = drawn(6, scale, bound, points=8)
    beyond = torch.tensor([1.0, 1 + 1e-12, 1.1, 2.0, 1e8, 1e300 / bound, math.inf], dtype=torch.float64) * bound
    spline = tailed_spline(parameters[:, None].expand(-1, 14, -1), bound)
    x = torch.cat([beyond, -beyond]).expand(8, 14)
    y, log_slope = direction(spline, x, bound)
    assert torch.equal(y, x)
    assert torch.equal(log_slope, torch.zeros_like(x))


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_value_and_slope_are_continuous_at_the_bound(direction, sign, bound):
    parameters, _ = drawn(6, 1.0, bound, points=200)
    edge, step = sign * bound, 1e-9 * bound
    x = torch.full((200,), edge - sign * step, dtype=torch.float64)
    y, log_slope = direction(tailed_spline(parameters, bound), x, bound)
    assert (y.abs() < bound).all()
    assert largest(y - edge) < 2 * step
    assert largest(log_slope) < 1e-6


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_slope_is_continuous_across_every_knot(direction):
    parameters, _ = drawn(6, 1.0, 3.0, points=200)
    spline = tailed_spline(parameters, 3.0)
    knots = spline.x if direction is tailed_forward else spline.y
    for knot in knots.unbind(-1):
        left, right = (direction(spline, knot + side, 3.0) for side in (-1e-9, 1e-9))
        assert largest(left[0] - right[0]) < 1e-6
        assert_close(left[1], right[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_monotone(direction, scale, bound):
    parameters, _ = drawn(6, scale, bound, points=50)
    grid = torch.linspace(-1.2 * bound, 1.2 * bound, 2001, dtype=torch.float64)
    spline = tailed_spline(parameters.repeat_interleave(len(grid), dim=0), bound)
    y = direction(spline, grid.repeat(50), bound)[0].reshape(50, -1)
    assert (y.diff(dim=1) > 0).all()


@pytest.mark.parametrize("bins", [2, 6, 90])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_knots_are_ordered_and_within_the_bound(scale, bins):
    spline = tailed_spline(drawn(bins, scale, 5.0)[0], 5.0)
    for knots in (spline.x, spline.y):
        assert knots.shape == (POINTS, bins + 1)
        assert knots.diff(dim=-1).min() >= 10 * MIN_BIN * (1 - 1e-9)
        assert knots.diff(dim=-1).max() / knots.diff(dim=-1).min() <= math.exp(2 * LOGIT_BOUND)
        assert knots[:, 0].tolist() == [-5.0] * POINTS
        assert knots[:, -1].tolist() == [5.0] * POINTS
    assert (spline.derivative > 0).all()
    assert torch.equal(spline.derivative[:, [0, -1]], torch.ones(POINTS, 2, dtype=torch.float64))
    assert spline.derivative.max() > 1.5
    assert spline.derivative.min() < 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_are_finite_everywhere(direction, scale, dtype):
    """Also on knots, at the bound and far beyond it, where a root, a clamp or an unused branch could give NaN."""
    parameters = (scale * drawn(6, 1.0, 3.0, points=300)[0]).to(dtype).requires_grad_()
    spline = tailed_spline(parameters, 3.0)
    knots = spline.x if direction is tailed_forward else spline.y
    far = [torch.full((300,), value, dtype=dtype) for value in (-1e30, 1e8)]
    for x in (*knots.detach().unbind(-1), drawn(6, 1.0, 3.0, points=300)[1].to(dtype), *far):
        x = x.clone().requires_grad_()
        y, log_slope = direction(spline, x, 3.0)
        gradients = torch.autograd.grad((y + log_slope).sum(), (parameters, x), retain_graph=True)
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        assert gradients[1].abs().max() > 0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradient_with_respect_to_the_parameters(direction):
    """Autograd against numerical differentiation (positions away from knots, where the map is smooth)."""
    parameters, x = drawn(3, 1.0, 3.0, points=12)

    def moved(p):
        return direction(tailed_spline(p, 3.0), x, 3.0)

    assert torch.autograd.gradcheck(moved, parameters.requires_grad_(), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("bins", [2, 6])
def test_zuko_agrees_on_the_same_knots(bins, scale):
    parameters, x = drawn(bins, scale, 3.0)
    spline = tailed_spline(parameters, 3.0)
    zeros = torch.zeros(POINTS, bins, dtype=torch.float64)
    oracle = MonotonicRQSTransform(zeros, zeros, zeros[:, 1:], bound=3.0)
    oracle.horizontal, oracle.vertical, oracle.derivatives = spline.x, spline.y, spline.derivative
    y, log_slope = tailed_forward(spline, x, 3.0)
    expected, expected_log_slope = oracle.call_and_ladj(x)
    assert_close(y, expected, rtol=0, atol=1e-11)
    assert_close(log_slope, expected_log_slope, rtol=0, atol=1e-8)
    assert_close(tailed_inverse(spline, x, 3.0)[0], oracle.inv(x), rtol=0, atol=1e-9)


# ---------------------------------------------------------------- as the map of a coupling


@pytest.mark.parametrize("bins", [2, 5])
def test_the_map_of_a_coupling_is_the_spline_and_then_the_affine_map(bins):
    parameters, x = drawn(bins, 1.0, 3.0)
    affine, clamp = parameters[:, :2].clone(), Clamp("tanh")
    y, log_slope = SplineMap(clamp, bins=bins, bound=3.0).forward(torch.cat([affine, parameters], dim=1), x)
    inner, inner_log_slope = tailed_forward(tailed_spline(parameters, 3.0), x, 3.0)
    log_scale = clamp(affine[:, 0])
    assert_close(y, inner * log_scale.exp() + affine[:, 1])
    assert_close(log_slope, inner_log_slope + log_scale)


@pytest.mark.parametrize("bins", [2, 5])
def test_reflected_parameters_are_those_of_the_map_between_two_reflections(bins):
    parameters, x = drawn(bins + 1, 1.0, 3.0)  # 3 bins + 2 of them, one too many
    site_map = SplineMap(Clamp(), bins=bins, bound=3.0)
    parameters = parameters[:, : site_map.outputs]
    y, log_slope = site_map.forward(parameters, -x)
    reflected, log_slope_reflected = site_map.forward(site_map.reflect(parameters), x)
    assert_close(reflected, -y, rtol=0, atol=1e-11)
    assert_close(log_slope_reflected, log_slope, rtol=0, atol=1e-9)
    assert torch.equal(site_map.reflect(site_map.reflect(parameters)), parameters)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bins": 1}, "bins must be from 2 to 64, got 1"),
        ({"bins": -3}, "bins must be from 2 to 64, got -3"),
        ({"bins": 65}, "bins must be from 2 to 64, got 65"),
        ({"bins": 150}, "bins must be from 2 to 64, got 150"),
        ({"bound": 0.0}, "bound must be positive and finite, got 0.0"),
        ({"bound": -1.0}, "bound must be positive and finite, got -1.0"),
        ({"bound": math.nan}, "bound must be positive and finite, got nan"),
        ({"bound": math.inf}, "bound must be positive and finite, got inf"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SplineMap(Clamp(), **{"bins": 4, "bound": 3.0, **settings})


def test_as_many_bins_as_fit_are_taken():
    parameters = torch.zeros(1, 2 + 3 * 64 - 1, dtype=torch.float64)
    x, _ = SplineMap(Clamp(), bins=64, bound=3.0).forward(parameters, torch.ones(1, dtype=torch.float64))
    assert_close(x, torch.ones(1, dtype=torch.float64))
