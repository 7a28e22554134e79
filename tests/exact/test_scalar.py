"""Free scalar field against printed values and dense algebra; the Schwinger-Dyson identity against quadrature."""

import math

import numpy as np
import pytest
from scipy.integrate import dblquad, quad

from latticeflow.exact import khat_squared, scalar_free_log_z, scalar_free_phi_squared, schwinger_dyson_residual

SHAPES = [(1,), (2,), (5,), (3, 5), (2, 4), (8, 8), (2, 3, 4), (2, 1, 3, 2)]


def quadratic_form(m2, shape):
    """Matrix `K` of the free action `phi K phi`, summed over sites and directions."""
    volume = math.prod(shape)
    site = np.arange(volume).reshape(shape)
    matrix = m2 * np.eye(volume)
    for mu in range(len(shape)):
        difference = np.eye(volume)[np.roll(site, -1, axis=mu).ravel()] - np.eye(volume)
        matrix += difference.T @ difference
    return matrix


def free_means(m2, shape):
    """`<phi^2>` and the neighbour correlation averaged over directions, from the inverse of the quadratic form."""
    covariance = 0.5 * np.linalg.inv(quadratic_form(m2, shape))
    site = np.arange(math.prod(shape)).reshape(shape)
    neighbours = [covariance[site.ravel(), np.roll(site, -1, axis=mu).ravel()].mean() for mu in range(len(shape))]
    return np.trace(covariance) / site.size, np.mean(neighbours)


def test_printed_values():
    assert scalar_free_log_z(1.25, (8, 8)) == pytest.approx(-13.572376139507, rel=0.0, abs=0.51e-12)
    assert scalar_free_phi_squared(1.25, (8, 8)) == pytest.approx(0.116983500773, rel=0.0, abs=0.51e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("m2", [0.01, 1.25, 40.0])
def test_dense_algebra(m2, shape):
    form = quadratic_form(m2, shape)
    _, log_det = np.linalg.slogdet(form)
    assert scalar_free_log_z(m2, shape) == pytest.approx(0.5 * (len(form) * math.log(math.pi) - log_det), abs=1e-11)
    assert scalar_free_phi_squared(m2, shape) == pytest.approx(free_means(m2, shape)[0], rel=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_laplacian_spectrum(shape):
    spectrum = khat_squared(shape)
    assert spectrum.shape == shape
    assert spectrum[(0,) * len(shape)] == 0.0
    np.testing.assert_allclose(np.sort(spectrum.ravel()), np.linalg.eigvalsh(quadratic_form(0.0, shape)), atol=1e-13)


def test_one_site_by_quadrature():
    partition, _ = quad(lambda phi: math.exp(-1.7 * phi**2), -math.inf, math.inf)
    assert scalar_free_log_z(1.7, (1, 1)) == pytest.approx(math.log(partition), abs=1e-9)


def test_phi_squared_is_the_derivative_of_log_z():
    step, shape = 1e-3, (3, 5)
    slope = (scalar_free_log_z(1.25 + step, shape) - scalar_free_log_z(1.25 - step, shape)) / (2.0 * step)
    assert scalar_free_phi_squared(1.25, shape) == pytest.approx(-slope / 15, rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_schwinger_dyson_of_the_free_field(shape):
    square, neighbour = free_means(1.25, shape)
    residual = schwinger_dyson_residual(1.25, 0.0, square, 0.0, neighbour, dimension=len(shape))
    assert residual == pytest.approx(0.0, abs=1e-12)
    wrong = schwinger_dyson_residual(1.25, 0.0, square, 0.0, 0.9 * neighbour, dimension=len(shape))
    assert abs(wrong) > 1e-3


def two_site_mean(observable, *, m2, lam, pairs):
    """Mean over two sites joined by `pairs` squared differences."""

    def weight(b, a):
        return math.exp(-m2 * (a**2 + b**2) - lam * (a**4 + b**4) - pairs * (a - b) ** 2)

    integrals = [
        dblquad(lambda b, a, f=f: f(a, b) * weight(b, a), -4.0, 4.0, -4.0, 4.0, epsabs=1e-9)[0]
        for f in (observable, lambda a, b: 1.0)
    ]
    return integrals[0] / integrals[1]


@pytest.mark.parametrize("dimension", [1, 2])
def test_schwinger_dyson_with_interaction(dimension):
    """Two sites: extent 2 in every direction but those of extent 1, where a site is its own neighbour."""
    couplings = {"m2": -0.5, "lam": 0.8, "pairs": 2}
    square = two_site_mean(lambda a, b: a * a, **couplings)
    quartic = two_site_mean(lambda a, b: a**4, **couplings)
    product = two_site_mean(lambda a, b: a * b, **couplings)
    neighbour = (product + (dimension - 1) * square) / dimension
    residual = schwinger_dyson_residual(-0.5, 0.8, square, quartic, neighbour, dimension=dimension)
    assert residual == pytest.approx(0.0, abs=1e-7)


def test_schwinger_dyson_defaults_to_two_dimensions_and_keeps_shapes():
    arguments = np.array([0.2, 0.3]), np.array([0.1, 0.2]), np.array([0.05, 0.1])
    residual = schwinger_dyson_residual(-4.0, 8.0, *arguments)
    np.testing.assert_allclose(residual, [-8 * 0.2 + 3.2 + 8 * 0.15 - 1, -8 * 0.3 + 6.4 + 8 * 0.2 - 1], rtol=1e-14)
    assert isinstance(schwinger_dyson_residual(1.0, 0.0, 0.2, 0.1, 0.1), float)


@pytest.mark.parametrize("function", [scalar_free_log_z, scalar_free_phi_squared])
@pytest.mark.parametrize("m2", [0.0, -1.0, math.nan, math.inf])
def test_bad_mass_is_named(function, m2):
    with pytest.raises(ValueError, match=f"m2 = {m2!r}"):
        function(m2, (4, 4))


@pytest.mark.parametrize("shape", [(), (0, 4), (4, -1), (2, 2, 2, 2, 2), (4.0,)])
def test_bad_shape_is_named(shape):
    for function in (khat_squared, lambda s: scalar_free_log_z(1.0, s), lambda s: scalar_free_phi_squared(1.0, s)):
        with pytest.raises(ValueError, match="shape = "):
            function(shape)


@pytest.mark.parametrize(
    ("name", "m2", "lam", "dimension"),
    [("m2", math.nan, 1.0, 2), ("lam", 1.0, -1.0, 2), ("lam", 1.0, math.inf, 2), ("dimension", 1.0, 1.0, 5)],
)
def test_bad_couplings_are_named(name, m2, lam, dimension):
    with pytest.raises(ValueError, match=f"{name} = "):
        schwinger_dyson_residual(m2, lam, 0.1, 0.1, 0.1, dimension=dimension)
