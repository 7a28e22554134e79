"""Priors of scalar fields against closed forms: independent normals, and the free field with its correlations.

Thresholds of statistical tests are 1e-6 for Kolmogorov-Smirnov p-values and 4.9 standard deviations (1e-6); all
generators are seeded.
"""

import math

import numpy as np
import pytest
import torch
from scipy.stats import chi2, kstest, multivariate_normal, norm

from latticeflow.actions import ScalarAction
from latticeflow.exact import scalar_free_log_z, scalar_free_phi_squared
from latticeflow.lattice import shift
from latticeflow.priors import FreeField, Normal

SAMPLES = 3000
DEVIATIONS = 4.9
FREE = [
    ((1,), 0.7),
    ((2,), 0.3),
    ((7,), 0.05),
    ((1, 5), 1.0),
    ((4, 4), 0.25),
    ((3, 6), 40.0),
    ((2, 3, 4), 0.5),
    ((2, 1, 3, 2), 0.2),
]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def mean_and_error(values):
    array = np.asarray(values, dtype=np.float64)
    return array.mean(), array.std() / math.sqrt(len(array))


def covariance(shape, m2):
    """Covariance `(V, V)` of the free field: half the inverse of the action's quadratic form, by dense algebra."""
    size = math.prod(shape)
    site, form = np.arange(size).reshape(shape), m2 * np.eye(size)
    for mu in range(len(shape)):
        difference = np.eye(size)[np.roll(site, -1, axis=mu).ravel()] - np.eye(size)
        form += difference.T @ difference
    return 0.5 * np.linalg.inv(form)


@pytest.mark.parametrize(("shape", "scale"), [((5,), 1.0), ((3, 4), 0.3), ((2, 3, 2), 2.5)])
def test_normal_density_in_closed_form(shape, scale):
    prior = Normal(shape, scale=scale)
    x = 2 * torch.randn(6, *shape, dtype=torch.float64, generator=seeded(4))
    expected = norm.logpdf(x.numpy(), scale=scale).reshape(6, -1).sum(axis=1)
    np.testing.assert_allclose(prior.log_prob(x).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.5])
def test_normal_samples_are_normal(scale):
    """Kolmogorov-Smirnov over all sites at 1e-6, and correlations of neighbouring sites at 4.9 deviations."""
    x = Normal((3, 4), scale=scale).sample(SAMPLES, seeded(5)).reshape(SAMPLES, 12).numpy() / scale
    assert kstest(x.ravel(), "norm").pvalue > 1e-6
    mean, error = mean_and_error((x[:, :-1] * x[:, 1:]).ravel())
    assert abs(mean) < DEVIATIONS * error


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_bad_scale_is_named(scale):
    with pytest.raises(ValueError, match=f"scale must be positive and finite, got {scale!r}"):
        Normal((4,), scale=scale)


@pytest.mark.parametrize(("shape", "m2"), FREE)
def test_free_density_is_the_boltzmann_weight(shape, m2):
    x = 2 * torch.randn(6, *shape, dtype=torch.float64, generator=seeded(6))
    expected = -ScalarAction(m2, 0.0)(x) - scalar_free_log_z(m2, shape)
    torch.testing.assert_close(FreeField(shape, m2).log_prob(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("shape", "m2"), FREE)
def test_free_density_is_that_of_a_multivariate_normal(shape, m2):
    """SciPy's normal with the covariance of the quadratic form: the normalisation by dense algebra."""
    x = FreeField(shape, m2).sample(6, seeded(7))
    expected = multivariate_normal(cov=covariance(shape, m2)).logpdf(x.reshape(6, -1).numpy())
    np.testing.assert_allclose(FreeField(shape, m2).log_prob(x).numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("shape", "m2"), FREE)
def test_free_variance_and_neighbours(shape, m2):
    """`<phi^2>` and the covariance at distance 1 in every direction, within 4.9 deviations."""
    x = FreeField(shape, m2).sample(SAMPLES, seeded(8))
    dimensions, axes, exact = len(shape), tuple(range(1, 1 + len(shape))), covariance(shape, m2)
    mean, error = mean_and_error((x**2).mean(axes))
    assert abs(mean - scalar_free_phi_squared(m2, shape)) < DEVIATIONS * error
    site = np.arange(math.prod(shape)).reshape(shape)
    for mu in range(dimensions):
        mean, error = mean_and_error((x * shift(x, mu, dimensions=dimensions)).mean(axes))
        assert abs(mean - exact[0, np.roll(site, -1, mu).flat[0]]) < DEVIATIONS * error


@pytest.mark.parametrize(("shape", "m2"), FREE)
def test_free_whitened_draws_are_independent_normals(shape, m2):
    """The action of a draw is half a chi^2 with V degrees of freedom, and whitened sites are normal; p above 1e-6."""
    prior = FreeField(shape, m2)
    x = prior.sample(SAMPLES, seeded(9))
    action = -prior.log_prob(x) - scalar_free_log_z(m2, shape)
    assert kstest(2 * action.numpy(), chi2(math.prod(shape)).cdf).pvalue > 1e-6
    white = np.linalg.solve(np.linalg.cholesky(covariance(shape, m2)), x.reshape(SAMPLES, -1).numpy().T)
    assert kstest(white.ravel(), "norm").pvalue > 1e-6
    products = white @ white.T / SAMPLES - np.eye(len(white))
    assert np.abs(products).max() < 6 * math.sqrt(2 / SAMPLES)  # at most 300 pairs: 6e-7


@pytest.mark.parametrize(("shape", "m2"), FREE)
def test_free_transform_is_the_root_of_the_covariance(shape, m2, monkeypatch):
    """Unit noise at each site in turn gives the rows of a matrix whose square is the covariance, to rounding."""
    size = math.prod(shape)
    unit = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: unit)
    root = FreeField(shape, m2).sample(size, seeded(1)).reshape(size, size).numpy()
    np.testing.assert_allclose(root @ root.T, covariance(shape, m2), rtol=0, atol=1e-12 / m2)


def test_free_density_integrates_to_one():
    """Importance sampling from a wider independent normal, within 4.9 deviations."""
    wide, prior = Normal((2, 2), scale=1.2), FreeField((2, 2), 0.4)
    x = wide.sample(40_000, seeded(10))
    mean, error = mean_and_error((prior.log_prob(x) - wide.log_prob(x)).exp())
    assert abs(mean - 1) < DEVIATIONS * error
    assert error < 0.03


def test_free_force_by_autograd():
    x = FreeField((3, 4), 0.5).sample(3, seeded(11)).requires_grad_()
    (gradient,) = torch.autograd.grad(FreeField((3, 4), 0.5).log_prob(x).sum(), x)
    torch.testing.assert_close(gradient, ScalarAction(0.5, 0.0).force(x), rtol=0, atol=1e-12)


def test_free_density_in_single_precision():
    prior = FreeField((3, 4), 0.5)
    x = prior.sample(5, seeded(12))
    single = prior.log_prob(x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), prior.log_prob(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("m2", [0.0, -1.0, math.inf, math.nan])
def test_bad_m2_is_named(m2):
    with pytest.raises(ValueError, match=f"m2 = {m2!r}: expected"):
        FreeField((4,), m2)


@pytest.mark.parametrize("shape", [(), (4, 0), (2, -1), (2, 2, 2, 2, 2), (2.5,)])
def test_bad_free_shapes_are_named(shape):
    with pytest.raises(ValueError, match="shape"):
        FreeField(shape, 1.0)
