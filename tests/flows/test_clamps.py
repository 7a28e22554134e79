"""The soft clamps against their formulas, their bounds at any argument, and their slopes."""

import math

import pytest
import torch
from torch.testing import assert_close

from latticeflow.flows import Clamp
from latticeflow.flows.clamps import CLAMPS

HUGE = 1e300
BOUNDED = [kind for kind in CLAMPS if kind != "none"]


def log_scales(dtype=torch.float64):
    """Both signs of 0 and of magnitudes from rounding to overflow."""
    top = min(math.log10(HUGE), math.log10(torch.finfo(dtype).max))
    magnitudes = torch.cat([torch.zeros(1), torch.logspace(-8, top, 400, dtype=torch.float64)])
    return torch.cat([-magnitudes.flip(0), magnitudes]).to(dtype)


def expected(kind, s, *, positive=0.1, negative=2.0):
    """Return the clamp and its slope at one number, written with `math` alone."""
    if kind == "none":
        return s, 1.0
    if kind == "tanh":
        return negative * math.tanh(s / negative), 1 - math.tanh(s / negative) ** 2
    bound = positive if kind == "asymmetric" and s >= 0 else negative
    return 2 / math.pi * bound * math.atan(s / bound), 2 / math.pi / (1 + (s / bound) ** 2)


def slopes(clamp, s):
    leaf = s.clone().requires_grad_()
    return torch.autograd.grad(clamp(leaf).sum(), leaf)[0]


@pytest.mark.parametrize("bounds", [{}, {"positive": 3.0, "negative": 0.25}])
@pytest.mark.parametrize("kind", CLAMPS)
def test_values_and_slopes_are_those_of_the_formula(kind, bounds):
    """With all digits of double precision."""
    s = torch.linspace(-9, 9, 401, dtype=torch.float64)
    clamp = Clamp(kind, **bounds)
    values, derivatives = torch.tensor([expected(kind, one, **bounds) for one in s.tolist()], dtype=torch.float64).T
    assert_close(clamp(s), values, rtol=1e-14, atol=1e-16)
    assert_close(slopes(clamp, s), derivatives, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", BOUNDED)
def test_stays_inside_its_bounds_at_any_argument(kind):
    """The bounds themselves are reached only by rounding."""
    values = Clamp(kind)(log_scales())
    upper = 0.1 if kind == "asymmetric" else 2.0
    rounding = 4 * torch.finfo(torch.float64).eps
    assert -2 * (1 + rounding) <= values.min() < -1.999
    assert 0.999 * upper < values.max() <= upper * (1 + rounding)
    moderate = Clamp(kind)(torch.linspace(-30, 30, 601, dtype=torch.float64))
    assert moderate.min() > -2
    assert moderate.max() < upper


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", CLAMPS)
def test_increases_and_keeps_zero_and_the_sign(kind, dtype):
    s = log_scales(dtype)
    values = Clamp(kind)(s)
    assert values.dtype == dtype
    assert (values.diff() >= 0).all()
    assert torch.equal(torch.sign(values), torch.sign(s))
    near = torch.linspace(-2, 2, 401, dtype=dtype)
    assert (Clamp(kind)(near).diff() > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", CLAMPS)
def test_gradients_are_finite_and_positive_or_zero_everywhere(kind, dtype):
    derivatives = slopes(Clamp(kind), log_scales(dtype))
    assert derivatives.dtype == dtype
    assert torch.isfinite(derivatives).all()
    assert (derivatives >= 0).all()
    assert derivatives.max() <= 1
    if kind != "none":
        assert derivatives[0] == derivatives[-1] == 0


@pytest.mark.parametrize("kind", CLAMPS)
def test_slope_at_zero_is_the_same_on_both_sides(kind):
    """By autograd at zero and next to it, and by one-sided difference quotients."""
    clamp, slope = Clamp(kind), 2 / math.pi if kind in ("asymmetric", "symmetric") else 1.0
    near = torch.tensor([-1e-9, -0.0, 0.0, 1e-9], dtype=torch.float64)
    assert_close(slopes(clamp, near), torch.full((4,), slope, dtype=torch.float64), rtol=1e-12, atol=0)
    for step in (-1e-6, 1e-6):
        quotient = clamp(torch.tensor(step, dtype=torch.float64)).item() / step
        assert quotient == pytest.approx(slope, rel=1e-9)


def test_asymmetric_holds_expansions_tighter_than_contractions():
    s = torch.linspace(0.01, 5, 100, dtype=torch.float64)
    clamp = Clamp()
    assert clamp == Clamp("asymmetric", positive=0.1, negative=2.0)
    assert (clamp(s) < -clamp(-s)).all()
    assert_close(Clamp("symmetric")(-s), -Clamp("symmetric")(s), rtol=0, atol=0)
    assert_close(clamp(-s), Clamp("symmetric")(-s), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", CLAMPS)
def test_single_precision_agrees_with_double(kind):
    s = torch.linspace(-20, 20, 1001, dtype=torch.float64)
    assert_close(Clamp(kind)(s.float()).double(), Clamp(kind)(s), rtol=1e-6, atol=1e-6)


def test_no_clamp_returns_what_it_is_given():
    s = log_scales()
    assert torch.equal(Clamp("none")(s), s)


def test_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="asymmetric, symmetric, tanh, none, got 'soft'"):
        Clamp("soft")


@pytest.mark.parametrize("bound", [0.0, -0.1, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["positive", "negative"])
def test_bounds_must_be_positive_and_finite(name, bound):
    with pytest.raises(ValueError, match=f"{name} bound must be positive and finite, got {bound}"):
        Clamp(**{name: bound})
