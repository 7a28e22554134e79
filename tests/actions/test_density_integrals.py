"""The integrals of densities: on grids in two dimensions, and by importance sampling in six."""

import functools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from latticeflow.actions import (
    Funnel,
    GaussianMixture,
    HorseshoeLogistic,
    LinearRegression,
    MultivariateStudentT,
    synthetic_regression,
)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def log_integral(density, x, log_jacobian, cell):
    """`log sum exp(-S) jacobian cell` over a grid of points `(n, D)`."""
    return float(torch.logsumexp(log_jacobian - density(x), dim=0)) + math.log(cell)


def grid(*axes):
    """The points of a grid, `(n, axes)`, and the volume of its cells."""
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
    return points, math.prod(float(axis[1] - axis[0]) for axis in axes)


def line(low, high, points):
    return torch.linspace(low, high, points, dtype=torch.float64)


@pytest.mark.parametrize("scale", [0.7, 3.0])
def test_integral_of_the_funnel(scale):
    points, cell = grid(line(-10 * scale, 10 * scale, 401), line(-10, 10, 201))
    neck = points[:, 0]
    x = torch.stack([neck, points[:, 1] * torch.exp(neck / 2)], dim=1)
    assert log_integral(Funnel(2, scale=scale), x, neck / 2, cell) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("nu", [1.0, 3.5])
def test_integral_of_the_student_t(nu):
    points, cell = grid(line(-20, 40, 601), line(0, 2 * math.pi, 13))
    points = points[points[:, 1] < 6.28]
    radius = torch.exp(points[:, 0])
    x = radius[:, None] * torch.stack([torch.cos(points[:, 1]), torch.sin(points[:, 1])], dim=1)
    density = MultivariateStudentT(2, degrees_of_freedom=nu)
    assert log_integral(density, x, 2 * points[:, 0], cell) == pytest.approx(density.log_z, abs=1e-9)


@pytest.mark.parametrize("radius", [0.0, 3.0])
def test_integral_of_the_mixture(radius):
    x, cell = grid(line(-14, 14, 201), line(-14, 14, 201))
    density = GaussianMixture(2, radius=radius)
    assert log_integral(density, x, torch.zeros(len(x)), cell) == pytest.approx(density.log_z, abs=1e-9)


@pytest.mark.parametrize("settings", [{}, {"precision": 0.2, "shape": 1.3, "rate": 0.4}])
def test_integral_of_the_regression(settings):
    """Over w, and over the noise on a logarithmic axis: without the slope of the softplus it would not be the evidence.

    The weight runs over some 12 of its conditional widths, `w = centre + sqrt(s2) t`.
    """
    density = LinearRegression([[1.0], [-0.5], [2.0]], [0.7, -1.0, 1.5], **settings)
    points, cell = grid(line(-6, 30, 901), line(-8, 8, 201))
    s2 = torch.exp(points[:, 0])
    u = s2 + torch.log(-torch.expm1(-s2))
    x = torch.stack([0.8 + s2.sqrt() * points[:, 1], u], dim=1)
    log_jacobian = 0.5 * points[:, 0] + points[:, 0] - torch.log(-torch.expm1(-s2))
    assert log_integral(density, x, log_jacobian, cell) == pytest.approx(density.log_z, abs=1e-8)


@pytest.mark.parametrize("observations", [2, 12])
def test_evidence_is_a_student_t_of_the_targets(observations):
    density = synthetic_regression(5, observations=observations)
    density = LinearRegression(density.features, density.targets, precision=0.6, shape=1.7, rate=0.9)
    covariance = torch.eye(observations, dtype=torch.float64) + density.features @ density.features.T / 0.6
    expected = stats.multivariate_t(loc=np.zeros(observations), shape=0.9 / 1.7 * covariance.numpy(), df=3.4)
    assert density.log_z == pytest.approx(expected.logpdf(density.targets.numpy()), rel=1e-11)


@pytest.mark.parametrize(("coefficient", "other"), [(0.4, 0.3), (-2.0, -1.5)])
@pytest.mark.parametrize("variable", [1, 2])
def test_horseshoe_scales_are_half_cauchy(coefficient, other, variable):
    """Integrated over u at a given b it is the integral over lambda (or tau), which needs the slope of the softplus."""
    density = HorseshoeLogistic([[0.0]], [1])
    u = line(-60, 4000, 400_001)
    x = doubles(coefficient, other, other, 0.5).repeat(len(u), 1)
    x[:, variable] = u
    found = log_integral(density, x, torch.zeros(len(u)), float(u[1] - u[0]))
    rest = math.log1p(math.exp(other))

    def integrand(scale):
        return stats.norm.pdf(coefficient, scale=scale * rest) * stats.halfcauchy.pdf(scale)

    inner, _ = integrate.quad(integrand, 0, 1, epsabs=1e-12)
    outer, _ = integrate.quad(integrand, 1, np.inf, epsabs=1e-12)
    constant = stats.halfcauchy.logpdf(rest) - math.log1p(math.exp(-other))
    constant += stats.norm.logpdf(0.5, scale=10) - math.log1p(math.exp(-0.5))
    assert found == pytest.approx(math.log(inner + outer) + constant, abs=1e-5)


def importance_ratio(density, x, log_q):
    """`<exp(-S) / q> / Z` and its error, for x drawn from q."""
    weights = np.exp(-density(torch.from_numpy(x)).numpy() - log_q - density.log_z)
    return weights.mean(), weights.std() / math.sqrt(len(weights))


def propose_funnel(generator, n):
    neck = generator.normal(0, 3.5, (n, 1))
    x = np.hstack([neck, 1.3 * np.exp(neck / 2) * generator.standard_normal((n, 5))])
    log_q = stats.norm.logpdf(x[:, 0], scale=3.5) + stats.norm.logpdf(x[:, 1:], scale=1.3 * np.exp(neck / 2)).sum(1)
    return Funnel(6), x, log_q


def propose_student(density, df, shape, generator, n):
    law = stats.multivariate_t(loc=np.zeros(6), shape=shape * np.eye(6), df=df, seed=generator)
    x = law.rvs(n)
    return density, x, law.logpdf(x)


def propose_regression(generator, n):
    """The posterior, its noise with fewer degrees of freedom and its weights wider than they are."""
    density = synthetic_regression(6, observations=20)
    features, targets = density.features.numpy(), density.targets.numpy()
    precision = features.T @ features + np.eye(5)
    mean = np.linalg.solve(precision, features.T @ targets)
    rate = 2 + 0.5 * (targets @ targets - mean @ precision @ mean)
    noise = stats.invgamma(9, scale=9 / 12 * rate)
    s2 = noise.rvs(n, random_state=generator)
    t = 1.2 * generator.standard_normal((n, 5))
    inverse = np.linalg.inv(np.linalg.cholesky(precision))
    x = np.column_stack([mean + np.sqrt(s2)[:, None] * (t @ inverse), np.log(np.expm1(s2))])
    log_q = noise.logpdf(s2) + stats.norm.logpdf(t, scale=1.2).sum(1) + np.log(-np.expm1(-s2))
    return density, x, log_q - 2.5 * np.log(s2) + 0.5 * np.linalg.slogdet(precision)[1]


PROPOSALS = {
    "funnel": propose_funnel,
    "student_t": functools.partial(propose_student, MultivariateStudentT(6, degrees_of_freedom=3.0), 2.0, 1.0),
    "mixture": functools.partial(propose_student, GaussianMixture(6), 5.0, 4.0),
    "linear_regression": propose_regression,
}


@pytest.mark.parametrize("name", PROPOSALS)
def test_integral_in_six_dimensions_by_importance_sampling(name):
    """Within 4.5 errors (false alarms 7e-6 each), where an error is small enough to see something."""
    ratio, error = importance_ratio(*PROPOSALS[name](np.random.default_rng(7), 40_000))
    assert error < 0.03
    assert abs(ratio - 1) < 4.5 * error
