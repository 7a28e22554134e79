"""Every density: against independent formulas, its force, far out, and what it refuses."""

import math
import re

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Bernoulli, HalfCauchy, InverseGamma, Normal, TransformedDistribution
from torch.distributions.transforms import SoftplusTransform

from latticeflow.actions import (
    CircleOfGaussians,
    Density,
    Funnel,
    GaussianMixture,
    HorseshoeLogistic,
    LinearRegression,
    MultivariateStudentT,
    TwoMoons,
    TwoRings,
    breast_cancer_horseshoe,
    synthetic_horseshoe,
    synthetic_regression,
)
from latticeflow.actions.densities.normal import normal_action

DENSITIES = {
    "funnel": Funnel(5),
    "narrow funnel": Funnel(2, scale=0.7),
    "student_t": MultivariateStudentT(4),
    "student_t in 1d": MultivariateStudentT(1, degrees_of_freedom=2.5),
    "mixture": GaussianMixture(6),
    "mixture in odd dimension": GaussianMixture(5, radius=1.5, weights=(0.2, 0.2, 0.6)),
    "two_moons": TwoMoons(),
    "circle_of_gaussians": CircleOfGaussians(),
    "two_rings": TwoRings(),
    "linear_regression": synthetic_regression(4, observations=12),
    "linear_regression of few": LinearRegression([[1.0, 2.0, -1.0]], [0.5], precision=0.3, shape=1.2, rate=0.8),
    "horseshoe": synthetic_horseshoe(8, observations=15),
    "horseshoe of one": HorseshoeLogistic([[2.0]], [1]),
}

PLANAR = ("two_moons", "circle_of_gaussians", "two_rings")
THEORIES = {"funnel", "student_t", "mixture", *PLANAR, "linear_regression", "horseshoe"}
KINKED = ("two_moons", "two_rings")
"""Functions of |x|, which has no derivatives at 0."""


@pytest.fixture(params=DENSITIES)
def density(request):
    return DENSITIES[request.param]


def draws(density, batch=4, *, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 1.3 * torch.randn(batch, density.dimension, dtype=torch.float64, generator=generator)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------- contract


def test_values_names_and_shapes(density):
    x = draws(density)
    values = density(x)
    assert isinstance(density, Density)
    assert density.theory in THEORIES
    assert density.field_name == "x"
    assert density.field_shape((density.dimension,)) == (density.dimension,)
    assert density.field_shape([density.dimension]) == (density.dimension,)
    assert values.shape == (4,)
    assert values.dtype == torch.float64
    assert len(values.unique()) == 4
    assert density(x[:0]).shape == (0,)
    assert density.log_z is None if density.theory == "horseshoe" else isinstance(density.log_z, float)


def test_single_precision_agrees_with_double(density):
    x = draws(density)
    assert density(x.float()).dtype == torch.float32
    assert density.force(x.float()).dtype == torch.float32
    torch.testing.assert_close(density(x.float()).double(), density(x), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(density.force(x.float()).double(), density.force(x), rtol=1e-3, atol=1e-3)


def test_data_follow_the_field_to_its_device(density):
    """A device without memory: an operation that mixes devices fails."""
    assert density(torch.empty(3, density.dimension, device="meta")).device.type == "meta"


def test_configurations_of_a_batch_do_not_mix(density):
    x = draws(density)
    values, force = density(x), density.force(x)
    for i in range(len(x)):
        torch.testing.assert_close(density(x[i : i + 1])[0], values[i], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(density.force(x[i : i + 1])[0], force[i], rtol=1e-11, atol=1e-11)


def test_force_is_minus_the_gradient_by_finite_differences(density):
    x, step = draws(density), 1e-3
    force = density.force(x)
    for i in range(density.dimension):
        shift = step * torch.eye(density.dimension, dtype=torch.float64)[i]
        low2, low, high, high2 = (density(x + k * shift) for k in (-2, -1, 1, 2))
        slope = (low2 - 8 * low + 8 * high - high2) / (12 * step)
        torch.testing.assert_close(force[:, i], -slope, rtol=1e-6, atol=1e-7)


def test_second_derivatives_exist(density):
    """Also at 0, where the quotients of the funnel and the horseshoe are rewritten."""
    points = [draws(density, 1)[0], torch.zeros(density.dimension, dtype=torch.float64)]
    for x in points[:1] if density.theory in KINKED else points:
        hessian = torch.autograd.functional.hessian(lambda y: density(y[None])[0], x)
        step = 1e-4 * torch.eye(density.dimension, dtype=torch.float64)
        by_differences = -(density.force(x + step) - density.force(x - step)) / 2e-4
        torch.testing.assert_close(hessian, by_differences, rtol=1e-5, atol=1e-5)


def test_other_lattices_are_refused(density):
    d = density.dimension
    for shape in ((d + 1,), (d, 1), ()):
        expected = f"{density.theory}: lattice shape {list(shape)} does not fit dimension {d}, expected [{d}]"
        with pytest.raises(ValueError, match=re.escape(expected)):
            density.field_shape(shape)


def test_other_fields_are_refused(density):
    d = density.dimension
    for shape in ((2, d + 1), (d,), (2, 1, d)):
        expected = f"{density.theory}: field has shape {shape}, expected (batch, {d})"
        with pytest.raises(ValueError, match=re.escape(expected)):
            density(torch.zeros(shape))


# ---------------------------------------------------------------- independent formulas


@pytest.mark.parametrize(("dimension", "scale"), [(2, 3.0), (2, 0.7), (7, 3.0)])
def test_funnel_by_independent_normals(dimension, scale):
    x = draws(Funnel(dimension)).numpy()
    expected = stats.norm.logpdf(x[:, 0], scale=scale)
    expected += stats.norm.logpdf(x[:, 1:], scale=np.exp(x[:, :1] / 2)).sum(1)
    np.testing.assert_allclose(-Funnel(dimension, scale=scale)(torch.from_numpy(x)).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("nu", [0.3, 1.0, 2.5, 40.0, 1e4])
@pytest.mark.parametrize("dimension", [1, 2, 9])
def test_student_t_of_scipy(dimension, nu):
    density = MultivariateStudentT(dimension, degrees_of_freedom=nu)
    x = torch.cat([draws(density) * size for size in (1e-6, 1.0, 50.0)])
    expected = stats.multivariate_t(loc=np.zeros(dimension), df=nu).logpdf(x.numpy())
    np.testing.assert_allclose(-density(x).numpy(), expected, rtol=1e-9)


def test_student_t_tends_to_a_normal():
    """The difference is of the order of `D^2 / nu`; a difference of two log Gammas would be off by 1e-3 here."""
    density = MultivariateStudentT(3, degrees_of_freedom=1e12)
    x = draws(density)
    np.testing.assert_allclose(-density(x).numpy(), stats.norm.logpdf(x.numpy()).sum(1), atol=1e-9)


@pytest.mark.parametrize(("dimension", "radius"), [(2, 3.0), (3, 1.0), (5, 0.0), (8, 3.0)])
def test_mixture_of_scipy(dimension, radius):
    weights = (0.5, 0.3, 0.2)
    density = GaussianMixture(dimension, radius=radius, weights=weights)
    x = draws(density)
    parts = [stats.multivariate_normal(mean=mean).pdf(x.numpy()) for mean in density.means.numpy()]
    np.testing.assert_allclose(-density(x).numpy(), np.log(np.dot(weights, parts)), rtol=1e-12)


@pytest.mark.parametrize("dimension", [2, 3, 8, 9])
def test_means_are_corners_of_a_triangle_in_all_coordinates(dimension):
    means = GaussianMixture(dimension, radius=2.0).means
    np.testing.assert_allclose((means @ means.T).numpy(), 4 * (1.5 * np.eye(3) - 0.5), atol=1e-14)
    assert means[:, : 2 * (dimension // 2)].abs().amax(0).min() > 0.5 / math.sqrt(dimension)
    assert (means[:, 2 * (dimension // 2) :] == 0).all()


def positive(distribution):
    """The distribution of u, when that of `log(1 + e^u)` is known."""
    return TransformedDistribution(distribution, SoftplusTransform().inv, validate_args=False)


@pytest.mark.parametrize("name", ["linear_regression", "linear_regression of few"])
def test_linear_regression_by_its_model(name):
    density = DENSITIES[name]
    x = draws(density)
    weights, u = x[:, :-1], x[:, -1]
    s2 = torch.log(1 + torch.exp(u))
    noise = InverseGamma(doubles(density.shape), doubles(density.rate))
    expected = positive(noise).log_prob(u)
    expected += Normal(0.0, (s2[:, None] / density.precision).sqrt()).log_prob(weights).sum(1)
    expected += Normal(weights @ density.features.T, s2[:, None].sqrt()).log_prob(density.targets).sum(1)
    torch.testing.assert_close(-density(x), expected, rtol=1e-12, atol=1e-12)


def horseshoe_prior(x, d):
    coefficients, scales = x[:, :d], torch.log(1 + torch.exp(x[:, d:-1]))
    found = positive(HalfCauchy(doubles(1.0))).log_prob(x[:, d:-1]).sum(1)
    found += Normal(0.0, scales[:, :-1] * scales[:, -1:]).log_prob(coefficients).sum(1)
    return found + Normal(0.0, doubles(10.0)).log_prob(x[:, -1])


@pytest.mark.parametrize("name", ["horseshoe", "horseshoe of one"])
def test_horseshoe_by_its_model(name):
    density = DENSITIES[name]
    d = density.features.shape[1]
    x = draws(density)
    logits = x[:, -1:] + x[:, :d] @ density.features.T
    expected = horseshoe_prior(x, d) + Bernoulli(logits=logits).log_prob(density.labels).sum(1)
    torch.testing.assert_close(-density(x), expected, rtol=1e-11, atol=1e-11)


# ---------------------------------------------------------------- far out


@pytest.mark.parametrize("nu", [0.5, 1.0, 30.0])
@pytest.mark.parametrize("size", [1e20, 1e100, 1e200, 1e300])
def test_student_t_far_out(size, nu):
    density = MultivariateStudentT(3, degrees_of_freedom=nu)
    x = size * doubles([0.5, -1.0, 0.25], [1.0, 0.0, 0.0], [1.0, 1e-90, -1.0])
    shape = np.log((x.numpy() / size) ** 2 @ np.ones(3))
    constant = stats.multivariate_t(loc=np.zeros(3), df=nu).logpdf(np.zeros(3))
    expected = 0.5 * (nu + 3) * (2 * math.log(size) + shape - math.log(nu)) - constant
    np.testing.assert_allclose(density(x).numpy(), expected, rtol=1e-13)
    y = x / size  # force = -(nu + 3) x / |x|^2
    expected_force = -(nu + 3) * y / (y**2).sum(1, keepdim=True) / size
    torch.testing.assert_close(density.force(x), expected_force, rtol=1e-12, atol=0)


def test_student_t_far_out_in_single_precision():
    density = MultivariateStudentT(3)
    x = torch.tensor([[1e30, -1e30, 1e25]])
    torch.testing.assert_close(density(x).double(), density(x.double()), rtol=1e-6, atol=0)
    assert torch.isfinite(density.force(x)).all()


@pytest.mark.parametrize("nu", [1.0, 7.0])
def test_student_t_at_the_origin(nu):
    density = MultivariateStudentT(4, degrees_of_freedom=nu)
    x = torch.zeros(1, 4, dtype=torch.float64)
    expected = -stats.multivariate_t(loc=np.zeros(4), df=nu).logpdf(np.zeros(4))
    assert float(density(x)) == pytest.approx(expected, rel=1e-13)
    assert torch.equal(density.force(x).abs(), torch.zeros(1, 4, dtype=torch.float64))
    tiny = torch.full((1, 4), 1e-9, dtype=torch.float64)
    torch.testing.assert_close(density.force(tiny), -(nu + 4) / nu * tiny, rtol=1e-12, atol=0)


@pytest.mark.parametrize("u", [-700.0, 700.0])
def test_regression_far_out(u):
    density = DENSITIES["linear_regression"]
    x = doubles([0.3, -0.2, 1.0, u])
    assert torch.isfinite(density(x)).all()
    assert torch.isfinite(density.force(x)).all()


@pytest.mark.parametrize("coefficient", [0.0, 1e-200])
@pytest.mark.parametrize("u", [(-700.0, 0.0), (0.0, -700.0), (700.0, 700.0), (-700.0, 700.0), (-300.0, -300.0)])
def test_horseshoe_far_out(u, coefficient):
    density = HorseshoeLogistic([[2.0]], [1])
    x = doubles([coefficient, *u, 0.5])
    log_scales = [value if value < 0 else math.log(value) if value else math.log(math.log(2)) for value in u]
    expected = math.log(10) + math.log(2 * math.pi) + 0.5 * 0.05**2 + sum(log_scales) + math.log1p(math.exp(-0.5))
    expected += 0.5 * math.exp(2 * (math.log(coefficient) - sum(log_scales))) if coefficient else 0.0
    expected += sum(math.log(math.pi / 2) + np.logaddexp(0, 2 * s) for s in log_scales)
    expected += sum(np.logaddexp(0, -value) for value in u)
    assert float(density(x)) == pytest.approx(expected, rel=1e-11)
    force = density.force(x)
    assert torch.isfinite(force[:, 1:]).all()
    if coefficient == 0 or sum(log_scales) > -580:  # or else b / (tau lambda)^2 itself overflows
        assert torch.isfinite(force).all()


def test_horseshoe_at_zero_coefficients_however_narrow():
    density = HorseshoeLogistic([[2.0]], [1])
    x = doubles([0.0, -700.0, -700.0, 0.5], [0.0, -5000.0, -700.0, 0.5])
    assert torch.isfinite(density(x)).all()
    assert torch.isfinite(density.force(x)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_overflows_is_infinite_and_never_nan(dtype):
    for density, x in (
        (HorseshoeLogistic([[2.0]], [1]), [1.0, -700.0, -700.0, 0.5]),
        (Funnel(3), [-3000.0, 1.0, 0.0]),
    ):
        point = torch.tensor([x], dtype=dtype)
        assert density(point).tolist() == [math.inf]
        assert not torch.isnan(density.force(point)).any()
    assert DENSITIES["linear_regression"](torch.tensor([[0.3, -0.2, 1.0, -3000.0]], dtype=dtype)).tolist() == [math.inf]


@pytest.mark.parametrize("name", ["horseshoe", "linear_regression"])
@pytest.mark.parametrize("u", [-80.0, 80.0])
def test_single_precision_far_out(name, u):
    density = DENSITIES[name]
    x = 1e-3 * draws(density, 1)
    x[:, -2 if name == "horseshoe" else -1] = u
    x[:, :3] *= 1e-30 if name == "horseshoe" else 1.0
    assert torch.isfinite(density(x.float())).all()
    torch.testing.assert_close(density(x.float()).double(), density(x), rtol=1e-4, atol=1e-3)


def test_normal_action_overflows_only_where_the_square_does():
    found = float(normal_action(doubles(1e-300), doubles(-1000.0)))
    assert found == pytest.approx(0.5 * math.exp(2 * (1000 - 300 * math.log(10))), rel=1e-11)


def test_normal_action_keeps_its_curvature_at_zero():
    x = doubles(0.0).requires_grad_()
    (slope,) = torch.autograd.grad(normal_action(x, doubles(-2.0)).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    assert float(curvature) == pytest.approx(math.exp(4), rel=1e-14)


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("make", [synthetic_regression, synthetic_horseshoe])
def test_synthetic_data_follow_the_seed(make):
    names = ["features", "targets" if make is synthetic_regression else "labels"]
    first, same, other = make(22), make(22, observations=100, seed=0), make(22, seed=1)
    for name in names:
        assert torch.equal(getattr(first, name), getattr(same, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
    for dimension, observations in ((4, 1), (22, 30), (200, 7)):
        density = make(dimension, observations=observations)
        assert density.dimension == dimension
        assert len(density.features) == observations
        assert torch.isfinite(density(draws(density))).all()


def test_synthetic_labels_follow_few_features():
    """Two of 20 features matter; the correlation of a label with any other is of the order of `1 / sqrt(n)`.

    Bounds of 6 deviations: false alarms 4e-8 for the 18 others.
    """
    density = synthetic_horseshoe(42, observations=4000)
    centred = density.labels - density.labels.mean()
    correlation = (density.features.T @ centred / 4000 / centred.std()).abs()
    assert int((correlation > 6 / math.sqrt(4000)).sum()) == 2
    assert 0.2 < float(density.labels.mean()) < 0.8


def test_breast_cancer_data():
    density = breast_cancer_horseshoe()
    assert density.dimension == 62
    assert density.features.shape == (569, 30)
    assert int(density.labels.sum()) == 357
    torch.testing.assert_close(density.features.mean(0), torch.zeros(30).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close((density.features**2).mean(0), torch.ones(30).double())
    assert torch.isfinite(density.force(draws(density))).all()


def test_data_are_copied_and_may_be_of_any_kind():
    features, labels = np.ones((3, 2), dtype=np.float32), np.array([True, False, True])
    features.flags.writeable = False
    density = HorseshoeLogistic(features, labels)
    assert density.features.dtype == density.labels.dtype == torch.float64
    tensor = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    regression = LinearRegression(tensor, [1, 2, 3])
    with torch.no_grad():
        tensor += 1
    assert torch.equal(regression.features, torch.ones(3, 2, dtype=torch.float64))
    assert not regression.features.requires_grad


def test_posteriors_are_shown_by_their_dimension_and_observations():
    """Not by their data, nor by the constants of the priors, which no configuration sets."""
    assert repr(LinearRegression(ONES, [1, 2, 3])) == "LinearRegression(dimension=3, observations=3)"
    assert repr(HorseshoeLogistic(ONES, [1, 0, 1])) == "HorseshoeLogistic(dimension=6, observations=3)"


ONES = np.ones((3, 2))
WITH_NAN = np.array([[1.0, 2.0], [3.0, math.nan]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Funnel(1), "dimension must be an integer of at least 2, got 1"),
        (lambda: Funnel(2.0), "dimension must be an integer of at least 2, got 2.0"),
        (lambda: Funnel(3, scale=0.0), "scale must be positive and finite, got 0.0"),
        (lambda: Funnel(3, scale=math.nan), "scale must be positive and finite, got nan"),
        (lambda: MultivariateStudentT(0), "dimension must be an integer of at least 1, got 0"),
        (lambda: MultivariateStudentT(True), "dimension must be an integer of at least 1, got True"),
        (lambda: MultivariateStudentT(2, 0.0), "degrees_of_freedom must be positive and finite, got 0.0"),
        (lambda: MultivariateStudentT(2, -1.0), "degrees_of_freedom must be positive and finite, got -1.0"),
        (lambda: MultivariateStudentT(2, math.inf), "degrees_of_freedom must be positive and finite, got inf"),
        (lambda: GaussianMixture(1), "dimension must be an integer of at least 2, got 1"),
        (lambda: GaussianMixture(2, radius=-1.0), "radius must be a finite number in [0, inf), got -1.0"),
        (lambda: GaussianMixture(2, radius=math.nan), "radius must be a finite number in [0, inf), got nan"),
        (lambda: GaussianMixture(2, weights=(0.5, 0.5, 0.0)), "weights must be positive and finite, got 0.0"),
        (
            lambda: GaussianMixture(2, weights=(0.5, 0.5)),
            "weights must be three positive numbers that add up to 1, got (0.5, 0.5)",
        ),
        (
            lambda: GaussianMixture(2, weights=(0.5, 0.5, 0.5)),
            "weights must be three positive numbers that add up to 1, got (0.5, 0.5, 0.5)",
        ),
        (
            lambda: LinearRegression(np.ones(3), np.ones(3)),
            "features must be a matrix (observations, d), none of them 0, got shape (3,)",
        ),
        (
            lambda: LinearRegression(np.ones((0, 3)), []),
            "features must be a matrix (observations, d), none of them 0, got shape (0, 3)",
        ),
        (lambda: LinearRegression(WITH_NAN, np.ones(2)), "features must be finite, got nan at index [1, 1]"),
        (lambda: LinearRegression([["a"]], [1]), "features must be an array of numbers: could not convert"),
        (lambda: LinearRegression(ONES, [1, math.inf, 2]), "targets must be finite, got inf at index [1]"),
        (
            lambda: LinearRegression(ONES, np.ones(4)),
            "targets must have shape (3,), one for each row of features, got (4,)",
        ),
        (lambda: LinearRegression(ONES, np.ones(3), precision=0.0), "precision must be positive and finite, got 0.0"),
        (lambda: LinearRegression(ONES, np.ones(3), shape=-1.0), "shape must be positive and finite, got -1.0"),
        (lambda: LinearRegression(ONES, np.ones(3), rate=math.inf), "rate must be positive and finite, got inf"),
        (lambda: synthetic_regression(1), "dimension must be an integer of at least 2, got 1"),
        (lambda: synthetic_regression(3, observations=0), "observations must be an integer of at least 1, got 0"),
        (lambda: HorseshoeLogistic(ONES, [0, 1, 2]), "labels must be 0 or 1, got 2 at index 2"),
        (lambda: HorseshoeLogistic(ONES, [0, 0.5, 1]), "labels must be 0 or 1, got 0.5 at index 1"),
        (lambda: HorseshoeLogistic(ONES, [0, math.nan, 1]), "labels must be finite, got nan at index [1]"),
        (
            lambda: HorseshoeLogistic(ONES, [[0], [1], [1]]),
            "labels must have shape (3,), one for each row of features, got (3, 1)",
        ),
        (lambda: HorseshoeLogistic(WITH_NAN, [0, 1]), "features must be finite, got nan at index [1, 1]"),
        (lambda: synthetic_horseshoe(2), "dimension must be an integer of at least 4, got 2"),
        (lambda: synthetic_horseshoe(7), "dimension must be even, 2 d + 2 for d features, got 7"),
        (lambda: synthetic_horseshoe(6, observations=0), "observations must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
