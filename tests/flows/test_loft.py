"""LOFT: the identity inside, a logarithm outside, exact inverses over sixteen orders of magnitude."""

import math

import pytest
import torch
from torch.testing import assert_close

from latticeflow.flows import LOFT

TAUS = [1e-6, 0.5, 3.0, 100.0]


def spread(*, least=-8.0, most=8.0, points=2000):
    """Return a batch of one configuration with both signs of magnitudes from `10^least` to `10^most`."""
    magnitudes = torch.logspace(least, most, points, dtype=torch.float64)
    return torch.cat([-magnitudes.flip(0), magnitudes])[None]


def by_the_formula(z, tau):
    beyond = max(abs(z) - tau, 0.0)
    return math.copysign(math.log1p(beyond) + min(abs(z), tau), z)


@pytest.mark.parametrize("tau", TAUS)
def test_values_are_those_of_the_formula(tau):
    z = spread()
    expected = torch.tensor([[by_the_formula(one, tau) for one in z[0].tolist()]], dtype=torch.float64)
    x, log_det = LOFT(tau)(z)
    assert_close(x, expected, rtol=1e-14, atol=0)
    beyond = sum(math.log1p(max(abs(one) - tau, 0.0)) for one in z[0].tolist())
    assert_close(log_det, torch.tensor([-beyond], dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("tau", TAUS)
def test_relative_round_trip_of_latents(tau):
    z = spread()
    x, log_det = LOFT(tau)(z)
    back, log_det_back = LOFT(tau).inverse(x)
    assert_close(back, z, rtol=1e-12, atol=0)
    assert_close(log_det_back, -log_det, rtol=1e-12, atol=0)
    assert x.abs().max() < tau + 8 * math.log(10) + 1e-6


@pytest.mark.parametrize("tau", TAUS)
def test_relative_round_trip_of_fields(tau):
    """Fields up to the image of 1e8."""
    x = spread(most=math.log10(tau + 8 * math.log(10)))
    z, log_det = LOFT(tau).inverse(x)
    assert z.abs().max() > 0.99e8
    back, log_det_back = LOFT(tau)(z)
    assert_close(back, x, rtol=1e-12, atol=0)
    assert_close(log_det_back, -log_det, rtol=1e-12, atol=0)


@pytest.mark.parametrize("tau", TAUS)
def test_identity_up_to_tau(tau):
    z = torch.linspace(-tau, tau, 1001, dtype=torch.float64)[None]
    for direction in (LOFT(tau).forward, LOFT(tau).inverse):
        x, log_det = direction(z)
        assert torch.equal(x, z)
        assert torch.equal(log_det, torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("tau", TAUS)
def test_odd_with_an_even_log_determinant(tau):
    z = spread(most=2.5)
    for direction in (LOFT(tau).forward, LOFT(tau).inverse):
        x, log_det = direction(z)
        mirrored, log_det_mirrored = direction(-z)
        assert torch.equal(mirrored, -x)
        assert torch.equal(log_det_mirrored, log_det)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_value_and_slope_are_continuous_at_tau(tau, sign):
    step = 1e-9
    z = (sign * (tau + torch.tensor([-step, 0.0, step], dtype=torch.float64)))[:, None].requires_grad_()
    for direction in (LOFT(tau).forward, LOFT(tau).inverse):
        x, log_det = direction(z)
        (slope,) = torch.autograd.grad(x.sum(), z)
        assert_close(x, z, rtol=0, atol=1e-13)
        assert_close(slope, torch.ones_like(slope), rtol=0, atol=2 * step)
        assert_close(log_det, torch.zeros_like(log_det), rtol=0, atol=2 * step)


@pytest.mark.parametrize("tau", TAUS)
def test_increasing(tau):
    """The inverse only where draws can be: a log of 177 beyond tau, that of latents of 1e77, beyond which it stays."""
    z = spread()
    assert (LOFT(tau)(z)[0].diff() > 0).all()
    assert (LOFT(tau).inverse(spread(most=math.log10(tau + 177)))[0].diff() > 0).all()
    assert (LOFT(tau).inverse(spread(most=300.0))[0].diff() >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", TAUS)
def test_inverse_stays_finite_with_room_for_products(tau, dtype):
    """`z^2` and more: fields where no draw can be come from the last latent, with its log-determinant.

    One that went on to grow would make a density that grows without bound.
    """
    loft, most = LOFT(tau), torch.finfo(dtype).max
    farthest = 0.25 * math.log(most)
    last = math.expm1(farthest)
    x = torch.tensor([[tau + 0.3 * math.log(most)], [1e4], [1e30], [most]], dtype=dtype)
    for sign in (1, -1):
        z, log_det = loft.inverse(sign * x)
        assert_close(z, torch.full_like(x, sign * (last + tau)), rtol=1e-5, atol=0)
        assert torch.isfinite(z**3).all()
        assert_close(log_det, torch.full_like(log_det, farthest), rtol=1e-6, atol=0)


@pytest.mark.parametrize("tau", TAUS)
def test_inverse_is_the_formula_up_to_the_last_latent(tau):
    beyond = torch.linspace(0, 177, 1001, dtype=torch.float64)[:, None]
    z, log_det = LOFT(tau).inverse(tau + beyond)
    assert_close(z, tau + torch.expm1(beyond), rtol=1e-11, atol=0)
    assert_close(log_det, beyond[:, 0], rtol=1e-12, atol=1e-13)


def test_gradients_of_the_inverse_are_numbers_anywhere():
    x = torch.tensor([[0.0], [100.0], [250.0], [290.0], [1e4], [-1e300]], dtype=torch.float64, requires_grad=True)
    z, log_det = LOFT().inverse(x)
    (gradient,) = torch.autograd.grad(z.sum() + log_det.sum(), x)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("tau", TAUS)
def test_log_determinant_is_that_of_the_autograd_slope(tau):
    for direction, most in ((LOFT(tau).forward, 8.0), (LOFT(tau).inverse, math.log10(tau + 18))):
        z = spread(most=most, points=200).T.contiguous().requires_grad_()
        x, log_det = direction(z)
        (slope,) = torch.autograd.grad(x.sum(), z)
        assert_close(slope[:, 0].log(), log_det, rtol=1e-12, atol=1e-13)
        assert log_det.abs().max() > 15


def test_log_determinants_are_summed_over_the_sites_of_each_configuration():
    z = 20 * torch.randn(5, 2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x, log_det = LOFT(2.0)(z)
    single, log_slopes = LOFT(2.0)(z.reshape(-1, 1))
    assert_close(x, single.reshape(z.shape))
    assert_close(log_det, log_slopes.reshape(5, -1).sum(1))


def test_single_precision():
    z = spread()
    for loft in (LOFT(0.5), LOFT()):
        x, log_det = loft(z.float())
        assert x.dtype == log_det.dtype == torch.float32
        assert_close(x.double(), loft(z)[0], rtol=1e-6, atol=0)
        assert_close(log_det.double(), loft(z)[1], rtol=1e-5, atol=0)
        assert_close(loft.inverse(x)[0].double(), z, rtol=1e-4, atol=0)


def test_gradients_are_finite_at_zero_and_far_out():
    z = torch.tensor([[0.0, -0.0, 100.0, -100.0, 1e8, -1e8, 1e300]], dtype=torch.float64, requires_grad=True)
    x, log_det = LOFT()(z)
    (gradient,) = torch.autograd.grad(x.sum() + log_det.sum(), z)
    assert torch.isfinite(gradient).all()
    assert gradient[0, :2].tolist() == [1.0, 1.0]


def test_has_no_weights_and_a_tau_of_one_hundred():
    assert LOFT().tau == 100.0
    assert not LOFT().state_dict()


@pytest.mark.parametrize("tau", [0.0, -1.0, math.inf, -math.inf, math.nan])
def test_tau_must_be_positive_and_finite(tau):
    with pytest.raises(ValueError, match=f"tau must be positive and finite, got {tau}"):
        LOFT(tau)
