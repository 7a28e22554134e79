"""Activations: their formulas, an inverse to rounding over all sizes, its gradients, what is not a number, refusals."""

import math

import pytest
import torch
from torch.testing import assert_close

from latticeflow.flows import Cubic, SmoothLeakyReLU

SLOPES, STRENGTHS = (0.01, 0.3, 0.9), (1e-3, 0.1, 20.0)
LAYERS = [*((SmoothLeakyReLU, slope) for slope in SLOPES), *((Cubic, strength) for strength in STRENGTHS)]
SIZES = torch.tensor([0.0, *(10.0**power for power in range(-12, 9))], dtype=torch.float64)
DIRECTIONS = ("forward", "inverse")
ALL = torch.cat([SIZES, -SIZES, torch.linspace(-3, 3, 61, dtype=torch.float64)])[:, None]


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Way(torch.nn.Module):
    """One direction of a layer as a function of its weights."""

    def __init__(self, layer, direction):
        super().__init__()
        self.layer, self.direction = layer, direction

    def forward(self, field):
        return getattr(self.layer, self.direction)(field)


@pytest.fixture(params=LAYERS, ids=lambda param: f"{param[0].__name__} {param[1]:g}")
def layer(request):
    kind, value = request.param
    return kind(value).double()


# ---------------------------------------------------------------- the functions


@pytest.mark.parametrize("slope", SLOPES)
def test_leaky_relu_is_the_formula(slope):
    x = normal(5, 3)
    z, log_det = SmoothLeakyReLU(slope).inverse(x)
    assert_close(z, slope * x + (1 - slope) * torch.log1p(x.exp()))
    assert_close(log_det, (slope + (1 - slope) / (1 + (-x).exp())).log().sum(1))


@pytest.mark.parametrize("slope", SLOPES)
def test_leaky_relu_has_its_two_slopes_far_away(slope):
    far = torch.tensor([[-60.0], [60.0]], dtype=torch.float64)
    z, log_det = SmoothLeakyReLU(slope).inverse(far)
    assert_close(z, far * torch.tensor([[slope], [1.0]]).double())
    assert_close(log_det, torch.tensor([math.log(slope), 0.0]).double())


@pytest.mark.parametrize("strength", STRENGTHS)
def test_cubic_is_the_formula(strength):
    x, layer = normal(5, 2, 3), Cubic(strength).double()
    assert layer.strength.item() == pytest.approx(strength, rel=1e-4)  # its parameter was single
    z, log_det = layer.inverse(x)
    assert_close(z, x + layer.strength * x**3)
    assert_close(log_det, (1 + 3 * layer.strength * x**2).log().sum((1, 2)))


# ---------------------------------------------------------------- the inverse


def rounding(layer, z):
    """Return a few units in the last place of what is added up to z: for a cubic terms of one sign, else up to one."""
    return 8 * torch.finfo(z.dtype).eps * (z.abs() + (0.0 if isinstance(layer, Cubic) else 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_is_exact_to_rounding_at_every_size(layer, dtype):
    """From 1e-12 to 1e8, of either sign; the log-determinants are opposite."""
    z = ALL.to(dtype)
    x, log_det = layer.to(dtype)(z)
    again, log_det_back = layer.inverse(x)
    assert x.dtype == dtype
    assert ((again - z).abs() <= rounding(layer, z)).all()
    assert_close(log_det, -log_det_back, rtol=1e-6, atol=1e-6)


def test_a_field_comes_back_at_every_size(layer):
    x = ALL if isinstance(layer, SmoothLeakyReLU) else ALL.clamp(-1e4, 1e4)
    again, _ = layer(layer.inverse(x)[0])
    scale = 1 / layer.slope if isinstance(layer, SmoothLeakyReLU) else 1.0
    assert ((again - x).abs() <= scale * rounding(layer, x)).all()


def test_inverse_of_one_variable_does_not_depend_on_the_others(layer):
    """Though the steps are taken together: to rounding, whatever the size of the others."""
    together, _ = layer(ALL)
    alone = torch.cat([layer(one[None])[0] for one in ALL])
    assert_close(together, alone, rtol=1e-13, atol=1e-15 if isinstance(layer, Cubic) else 1e-13)


def test_what_is_not_a_number_stays_so_and_stays_alone(layer):
    z = torch.tensor([[1.0, math.nan], [2.0, -3.0]], dtype=torch.float64)
    for direction in (layer.forward, layer.inverse):
        moved, log_det = direction(z)
        assert moved.isnan().tolist() == [[False, True], [False, False]]
        assert log_det.isnan().tolist() == [True, False]
        assert_close(moved[1], direction(z[1:])[0][0], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_infinite_fields_are_not_mistaken_for_finite_ones(layer, sign):
    x, _ = layer(torch.full((1, 1), sign * math.inf, dtype=torch.float64))
    assert not x.isfinite().any()


# ---------------------------------------------------------------- gradients


def test_gradients_of_both_directions(layer):
    """By finite differences, with respect to field and parameters, of values and log-determinants."""
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in layer.named_parameters()}
    for direction in DIRECTIONS:

        def run(field, *values, way=direction):
            given = {f"layer.{name}": value for name, value in zip(weights, values, strict=True)}
            return torch.func.functional_call(Way(layer, way), given, (field,))

        assert torch.autograd.gradcheck(run, (normal(2, 3).requires_grad_(), *weights.values()))


def test_second_derivatives_of_the_density_direction(layer):
    """Score losses need those of value and slope."""

    assert torch.autograd.gradgradcheck(layer.inverse, (normal(2, 2).requires_grad_(),))


def test_forward_carries_gradients_at_large_values():
    for layer in (SmoothLeakyReLU(), Cubic().double()):
        z = torch.tensor([[1e8, -1e8, 0.0]], dtype=torch.float64, requires_grad=True)
        x, log_det = layer(z)
        (gradient,) = torch.autograd.grad(x.sum(), z, retain_graph=True)
        assert_close(gradient, layer.log_slope(x.detach()).neg().exp())
        assert torch.isfinite(torch.autograd.grad(log_det.sum(), z)[0]).all()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("slope", [0.0, 1.0, -0.3, 1.5, math.nan])
def test_slopes_outside_of_0_to_1_are_refused(slope):
    with pytest.raises(ValueError, match=f"slope must be between 0 and 1, got {slope!r}"):
        SmoothLeakyReLU(slope)


@pytest.mark.parametrize("strength", [0.0, -1.0, math.inf, math.nan])
def test_strengths_that_are_not_positive_are_refused(strength):
    with pytest.raises(ValueError, match=f"strength must be positive and finite, got {strength!r}"):
        Cubic(strength)
