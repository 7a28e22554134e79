"""The student-t prior: density and draws against SciPy, gradients to the degrees of freedom against quadrature.

Thresholds of statistical tests are 1e-6 for Kolmogorov-Smirnov p-values and 4.9 standard deviations (1e-6); all
generators are seeded.
"""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import gammaln
from scipy.stats import kstest, norm, t

from latticeflow.flows import Bijection, Sequential
from latticeflow.priors import Normal, Prior, StudentT
from latticeflow.samplers import FlowSampler

SHAPE = (3, 4)
SAMPLES = 20_000
DEVIATIONS = 4.9
NUS = [1e-2, 0.3, 1.0, 2.5, 30.0, 31.9, 32.1, 1e3, 1e5, 1e8]


class Affine(Bijection):
    """`x = scale z`, one number in the precision asked for."""

    def __init__(self, dtype):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0, dtype=dtype))

    def forward(self, z):
        return torch.mul(z, self.scale), self._log_det(z)

    def inverse(self, x):
        return x / self.scale, -self._log_det(x)

    def _log_det(self, z):
        return self.scale.log() * z[0].numel() * torch.ones_like(z.flatten(1)[:, 0])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def student(nu, **settings):
    return StudentT(SHAPE, degrees_of_freedom=nu, **settings)


def mixed(values):
    """A prior with these numbers of degrees of freedom, one per site."""
    prior = StudentT((len(values),))
    with torch.no_grad():
        prior.log_degrees_of_freedom.copy_(torch.tensor(values, dtype=torch.float64).log())
    return prior


def log_density(x, nu):
    """The density in NumPy, with the difference of two logarithms of Gamma, for moderate nu."""
    peak = gammaln((nu + 1) / 2) - gammaln(nu / 2) - 0.5 * np.log(math.pi * nu)
    return peak - 0.5 * (nu + 1) * np.log1p(x**2 / nu)


def test_is_a_prior_and_a_module():
    prior = student(3.0)
    assert isinstance(prior, Prior)
    assert isinstance(prior, torch.nn.Module)
    assert [name for name, _ in prior.named_parameters()] == ["log_degrees_of_freedom"]
    assert prior.log_degrees_of_freedom.shape == prior.degrees_of_freedom.shape == SHAPE
    assert student(3.0, per_site=False).log_degrees_of_freedom.shape == ()
    assert prior.degrees_of_freedom.dtype == torch.float64
    torch.testing.assert_close(prior.degrees_of_freedom, torch.full(SHAPE, 3.0, dtype=torch.float64))


def test_the_contract_of_a_prior_is_still_enforced():
    class Silent(torch.nn.Module, Prior):
        def sample(self, n, generator=None):
            return torch.zeros(n, 1)

    with pytest.raises(TypeError, match="log_prob"):
        Silent()


@pytest.mark.parametrize("nu", NUS)
def test_density_is_that_of_scipy(nu):
    x = torch.tensor([0.0, 1e-200, 1e-8, 0.3, -1.0, nu**0.5, -7.0, 1e4, -1e10], dtype=torch.float64)
    expected = t(nu).logpdf(x.numpy())
    prior = StudentT((1,), degrees_of_freedom=nu)
    np.testing.assert_allclose(prior.log_prob(x[:, None]).detach().numpy(), expected, rtol=1e-11)


@pytest.mark.parametrize("nu", NUS)
@pytest.mark.parametrize("x", [1e100, -1e150])
def test_density_far_out(nu, x):
    """`log q -> log q(0) - (nu + 1) log(|x| / sqrt(nu))` where the square of x would overflow."""
    prior = StudentT((1,), degrees_of_freedom=nu)
    values = torch.tensor([[0.0], [x]], dtype=torch.float64, requires_grad=True)
    peak, far = prior.log_prob(values)
    expected = peak.item() - (nu + 1) * (math.log(abs(x)) - 0.5 * math.log(nu))
    assert far.item() == pytest.approx(expected, rel=1e-13)
    (slope,) = torch.autograd.grad(far, values)
    assert slope[:, 0].tolist() == pytest.approx([0.0, -(nu + 1) / x], rel=1e-12, abs=0)


def test_normal_limit():
    """At nu = 1e8 the density is the normal one up to terms of order 1 / nu."""
    x = torch.linspace(-5, 5, 11, dtype=torch.float64)[:, None]
    log_prob = StudentT((1,), degrees_of_freedom=1e8).log_prob(x).detach().numpy()
    np.testing.assert_allclose(log_prob, norm.logpdf(x[:, 0].numpy()), rtol=0, atol=2e-6)


def test_sites_are_summed_each_with_its_own_number():
    nus = [0.5, 2.0, 30.0, 400.0]
    prior, x = mixed(nus), 3 * torch.randn(5, 4, dtype=torch.float64, generator=seeded(1))
    expected = log_density(x.numpy(), np.array(nus)).sum(1)
    np.testing.assert_allclose(prior.log_prob(x).detach().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("nu", [0.01, 0.3, 1.0, 5.0, 30.0, 1e4])
def test_gradient_of_the_density_by_finite_differences(nu):
    """In nu, central differences of order 4; in x, the closed form `-(nu + 1) x / (nu + x^2)`."""
    prior = StudentT((6,), degrees_of_freedom=nu)
    x = torch.tensor([[0.0, 0.2, -1.0, nu**0.5, 8.0, -300.0]], dtype=torch.float64, requires_grad=True)
    by_nu, by_x = torch.autograd.grad(prior.log_prob(x).sum(), [prior.log_degrees_of_freedom, x])
    values, step = x.detach().numpy()[0], 1e-3
    near, wide = (t.logpdf(values, nu * np.exp(h)) - t.logpdf(values, nu * np.exp(-h)) for h in (step, 2 * step))
    np.testing.assert_allclose(by_nu.numpy(), (8 * near - wide) / (12 * step), rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(by_x.numpy()[0], -(nu + 1) * values / (nu + values**2), rtol=1e-12)


def test_gradcheck_of_the_density():
    prior = StudentT((3,), degrees_of_freedom=4.0)
    x = torch.randn(2, 3, dtype=torch.float64, generator=seeded(2), requires_grad=True)
    assert torch.autograd.gradcheck(prior.log_prob, (x,))
    assert torch.autograd.gradgradcheck(prior.log_prob, (x,))


@pytest.mark.parametrize("per_site", [True, False])
@pytest.mark.parametrize("nu", [0.05, 0.5, 1.0, 3.0, 30.0, 1e8])
def test_draws_follow_the_law(nu, per_site):
    """Kolmogorov-Smirnov over all sites, p above 1e-6: 1.2e-5 for all cases together."""
    with torch.no_grad():
        x = student(nu, per_site=per_site).sample(SAMPLES // 10, seeded(3))
    assert x.isfinite().all()
    assert kstest(x.numpy().ravel(), t(nu).cdf).pvalue > 1e-6


def test_every_site_has_its_own_law():
    """Kolmogorov-Smirnov at each site, p above 1e-6, and clearly below it for the number of its neighbour."""
    nus = [0.4, 1.5, 10.0]
    x = mixed(nus).sample(SAMPLES, seeded(4)).detach().numpy()
    for i, nu in enumerate(nus):
        assert kstest(x[:, i], t(nu).cdf).pvalue > 1e-6
        assert kstest(x[:, i], t(nus[i - 1]).cdf).pvalue < 1e-8


@pytest.mark.parametrize("nu", [9.0, 30.0])
def test_moments_and_independence_of_sites(nu):
    """Mean, `nu / (nu - 2)`, `3 nu^2 / ((nu - 2) (nu - 4))`, and products of neighbouring squares: 4.9 deviations."""
    x = student(nu).sample(SAMPLES, seeded(5)).detach().flatten(1).numpy()
    variance, fourth = nu / (nu - 2), 3 * nu**2 / ((nu - 2) * (nu - 4))
    pairs = [(x, 0.0), (x**2, variance), (x**4, fourth), (x[:, 1:] ** 2 * x[:, :-1] ** 2, variance**2)]
    for values, expected in pairs:
        means = values.mean(1)
        assert abs(means.mean() - expected) < DEVIATIONS * means.std() / math.sqrt(len(means))


@pytest.mark.parametrize("nu", [0.05, 0.3, 1.0, 4.0, 30.0, 300.0])
def test_gradient_of_a_mean_by_the_sampler(nu):
    """`d E[log(1 + x^2)] / d log nu` of the draws against quadrature, within 4.9 deviations."""
    prior = StudentT((SAMPLES,), degrees_of_freedom=nu)
    x = prior.sample(20, seeded(6))
    slopes = torch.autograd.grad(torch.log1p(x**2).mean(0).sum(), prior.log_degrees_of_freedom)[0].numpy()
    exact = mean_slope(nu)
    error = slopes.std() / math.sqrt(SAMPLES)
    assert abs(slopes.mean() - exact) < DEVIATIONS * error
    assert error < 0.1 * abs(exact)


def mean_slope(nu):
    """Central difference in log nu of `E[log(1 + x^2)]`, by quadrature in `y = log |x|`."""
    low, high = (mean_by_quadrature(nu * math.exp(h)) for h in (-1e-3, 1e-3))
    return (high - low) / 2e-3


def mean_by_quadrature(nu):
    def integrand(y):
        log_q = gammaln((nu + 1) / 2) - gammaln(nu / 2) - 0.5 * math.log(math.pi * nu)
        log_q -= 0.5 * (nu + 1) * np.logaddexp(0, 2 * y - math.log(nu))
        return 2 * np.logaddexp(0, 2 * y) * np.exp(y + log_q)

    return sum(quad(integrand, a, b, limit=200)[0] for a, b in [(-40, 0), (0, 8), (8, 60 / nu + 10)])


def test_shared_number_collects_the_gradients_of_all_sites():
    per_site, shared = student(2.0), student(2.0, per_site=False)
    results = []
    for prior in (per_site, shared):
        x = prior.sample(50, seeded(7))
        gradients = [
            torch.autograd.grad(value, prior.log_degrees_of_freedom, retain_graph=True)[0]
            for value in (torch.log1p(x**2).sum(), prior.log_prob(x.detach()).sum())
        ]
        results.append((x.detach(), prior.log_prob(x).detach(), *(g.sum() for g in gradients)))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


def test_shared_number_fits_any_volume():
    small, large = StudentT((2, 2), degrees_of_freedom=4.0, per_site=False), StudentT((5, 7), per_site=False)
    large.load_state_dict(small.state_dict())
    assert torch.equal(large.degrees_of_freedom, small.degrees_of_freedom)
    assert large.sample(3, seeded(8)).shape == (3, 5, 7)


def test_draws_are_the_same_with_and_without_gradients():
    prior = student(3.0)
    with torch.no_grad():
        plain = prior.sample(4, seeded(9))
    tracked = prior.sample(4, seeded(9))
    assert torch.equal(plain, tracked)
    assert tracked.requires_grad
    assert not plain.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_draws_and_gradients_stay_finite_with_the_heaviest_tails(dtype):
    """At nu = 0.01 one draw in a thousand is too large for double precision, one in three for single."""
    prior = StudentT((1000,), degrees_of_freedom=0.01).to(dtype)
    x = prior.sample(20, seeded(10))
    assert x.abs().max() > (1e150 if dtype == torch.float64 else 1e17)
    cast = x.to(dtype)
    assert (cast**2).isfinite().all()
    prior.log_prob(cast).sum().backward()
    assert prior.log_degrees_of_freedom.grad.isfinite().all()


def test_single_precision_module_and_fields():
    """Only the stored logarithm loses digits: everything else is computed in double precision."""
    double = student(5.0)
    single = copy.deepcopy(double).to(torch.float32)
    assert single.log_degrees_of_freedom.dtype == torch.float32
    x = single.sample(10, seeded(11))
    assert x.dtype == single.degrees_of_freedom.dtype == torch.float64
    torch.testing.assert_close(x, double.sample(10, seeded(11)), rtol=1e-6, atol=1e-6)
    log_prob = single.log_prob(x.float())
    assert log_prob.dtype == torch.float64
    assert torch.equal(log_prob, single.log_prob(x.float().double()))
    torch.testing.assert_close(log_prob, double.log_prob(x), rtol=1e-6, atol=1e-5)
    log_prob.sum().backward()
    assert single.log_degrees_of_freedom.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_in_a_flow_sampler_without_a_flow(dtype):
    sampler = FlowSampler(student(5.0), Sequential()).to(dtype)
    x, log_q = sampler.sample(6, seeded(12))
    assert x.dtype == dtype
    assert log_q.dtype == torch.float64
    assert torch.equal(x, sampler.prior.sample(6, seeded(12)).to(dtype))
    assert torch.equal(log_q, sampler.log_prob(x))
    assert "prior.log_degrees_of_freedom" in sampler.state_dict()
    assert sampler.to(torch.float64).sample(2, seeded(12))[0].dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_flow_decides_the_precision_of_a_flow_sampler(dtype):
    sampler = FlowSampler(student(5.0), Affine(dtype))
    x, log_q = sampler.sample(6, seeded(13))
    assert x.dtype == dtype
    assert log_q.dtype == torch.float64
    torch.testing.assert_close(sampler.log_prob(x), log_q)
    log_q.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in sampler.parameters())


def test_training_finds_the_degrees_of_freedom():
    """Maximum likelihood on exact draws: within 4.9 deviations, by the Fisher information of `log nu`."""
    data = student(3.0, per_site=False).sample(2000, seeded(14)).detach()
    prior = student(30.0, per_site=False)
    optimizer = torch.optim.LBFGS(prior.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = -prior.log_prob(data).mean()
        value.backward()
        return value

    optimizer.step(loss)
    slopes = (t.logpdf(data, 3.0 * math.exp(1e-4)) - t.logpdf(data, 3.0 * math.exp(-1e-4))) / 2e-4
    error = 1 / math.sqrt((slopes**2).sum())
    assert abs(prior.log_degrees_of_freedom.item() - math.log(3.0)) < DEVIATIONS * error
    assert error < 0.05


def test_reverse_training_widens_to_the_normal():
    """The pathwise gradient of the divergence from a normal target pushes nu up from 2."""
    prior = student(2.0, per_site=False)
    x = prior.sample(SAMPLES, seeded(15))
    (prior.log_prob(x) - Normal(SHAPE).log_prob(x)).clamp(max=50).mean().backward()
    assert prior.log_degrees_of_freedom.grad < 0


@pytest.mark.parametrize("nu", [0.0, -1.0, math.inf, math.nan])
def test_bad_degrees_of_freedom_are_named(nu):
    with pytest.raises(ValueError, match=f"degrees_of_freedom must be positive and finite, got {nu!r}"):
        student(nu)


@pytest.mark.parametrize("shape", [(), (4, 0), (2.5,)])
def test_bad_shapes_are_named(shape):
    with pytest.raises(ValueError, match="lattice shape"):
        StudentT(shape)
