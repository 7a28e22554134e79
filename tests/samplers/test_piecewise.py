"""Piecewise samplers: the density of exactly the draws, weights and all; mirrored and standardised pieces.

Statistical tests fail below a p-value of 1e-4, which is their false-alarm rate, each; seeds are fixed.
"""

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad
from torch.testing import assert_close

from latticeflow.actions import Action
from latticeflow.actions.densities import GaussianMixture
from latticeflow.flows import ElementwiseAffine, MaskedAutoregressive, Sequential, autoregressive_flow
from latticeflow.priors import Normal, StudentT
from latticeflow.priors.base import Prior
from latticeflow.samplers import FlowSampler, PiecewiseSampler, mirrored, standardised
from latticeflow.stats import ess, log_z
from latticeflow.training import make_estimator, train

FALSE_ALARM = 1e-4
WEIGHTS = [0.6, 0.3, 0.1]
MEANS = [(-2.0, 0.0), (1.5, 1.0), (0.5, -2.0)]
WIDTHS = [(0.5, 0.7), (0.4, 0.6), (0.8, 0.3)]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def gaussian(mean, width):
    affine = ElementwiseAffine((len(mean),)).double()
    with torch.no_grad():
        affine.shift.copy_(torch.tensor(mean, dtype=torch.float64))
        affine.log_scale.copy_(torch.tensor(width, dtype=torch.float64).log())
    return FlowSampler(Normal((len(mean),)), affine)


def gaussians(weights=WEIGHTS):
    return PiecewiseSampler([gaussian(*piece) for piece in zip(MEANS, WIDTHS, strict=True)], weights)


def curved(seed, *, prior=None):
    """Return a flow far from the identity, of moderate width."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        flow = autoregressive_flow((2,), blocks=2, hidden=(8,)).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator(seed)))
    return FlowSampler(Normal((2,)) if prior is None else prior, flow)


def mixed():
    """Return pieces of every kind: networks, a shared one, a prior with parameters."""
    shared = curved(1)
    image = mirrored(shared).pieces[1]
    return PiecewiseSampler(
        [shared, image, gaussian((3.0, 1.0), (0.4, 0.5)), curved(2, prior=StudentT((2,)))], [1, 4, 2, 3]
    )


SAMPLERS = {"gaussians": gaussians, "mixed": mixed, "mirrored": lambda: mirrored(curved(3))}


@pytest.fixture(params=list(SAMPLERS))
def sampler(request):
    return SAMPLERS[request.param]()


# ---------------------------------------------------------------- the density


def grid(bound, points):
    """Return the midpoints of a square grid, `(points^2, 2)`, and the area of a cell."""
    step = 2 * bound / points
    line = -bound + step * (torch.arange(points).double() + 0.5)
    return torch.cartesian_prod(line, line), step**2


@torch.no_grad()
def test_density_integrates_to_one(sampler):
    points, area = grid(25.0, 800)
    assert float(sampler.log_prob(points).exp().sum() * area) == pytest.approx(1, abs=2e-3)


def test_log_prob_is_that_of_the_mixture():
    """Computed by scipy, from the weights as they were given."""
    x = gaussians().sample(500, generator(2))[0].detach()
    parts = [
        weight * stats.norm.pdf(x.numpy(), mean, width).prod(1)
        for weight, mean, width in zip(WEIGHTS, MEANS, WIDTHS, strict=True)
    ]
    expected = np.log(sum(parts))
    assert_close(gaussians().log_prob(x).detach(), torch.as_tensor(expected), rtol=0, atol=1e-12)
    unweighted = np.logaddexp.reduce(np.log(np.array(parts) / np.array(WEIGHTS)[:, None] / 3))
    assert np.abs(unweighted - expected).mean() > 0.4


def test_log_q_of_the_draws_is_log_prob(sampler):
    x, log_q = sampler.sample(400, generator(3))
    assert x.dtype == log_q.dtype == torch.float64
    assert log_q.shape == (400,)
    assert_close(sampler.log_prob(x), log_q, rtol=0, atol=1e-12)
    assert log_q.std() > 0.1


def test_draws_come_from_the_pieces_by_their_weights():
    """Of Gaussians far apart: counts by chi squared, and that those of equal weights would be seen."""
    n, far = 5000, PiecewiseSampler([gaussian((8.0 * k, 0.0), (1.0, 1.0)) for k in range(3)], WEIGHTS)
    with torch.no_grad():
        x, _ = far.sample(n, generator(4))
    counts = torch.bincount((x[:, 0] / 8).round().long(), minlength=3).numpy()
    assert stats.chisquare(counts, n * np.array(WEIGHTS)).pvalue > FALSE_ALARM
    assert stats.chisquare(counts).pvalue < 1e-100


def test_draws_follow_the_density(sampler):
    """A histogram of draws against the integral of q over each cell, unequal weights included."""
    with torch.no_grad():
        x, _ = sampler.sample(20000, generator(5))
        points, area = grid(8.0, 640)
        mass = sampler.log_prob(points).exp().mul(area).reshape(8, 80, 8, 80).sum((1, 3)).flatten()
    inside = (x.abs() < 8).all(1)
    cells = ((x[inside] + 8) / 2).long()
    counts = torch.bincount(8 * cells[:, 0] + cells[:, 1], minlength=64).double()
    expected = 20000 * torch.cat([mass, (1 - mass.sum()).clamp(min=0)[None]])
    counts = torch.cat([counts, (~inside).sum().double()[None]])
    rare = expected < 10
    table = [torch.cat([one[~rare], one[rare].sum()[None]]).numpy() for one in (counts, expected)]
    assert len(table[0]) >= 6
    assert stats.chisquare(table[0], table[1] * table[0].sum() / table[1].sum()).pvalue > FALSE_ALARM


def test_draws_are_independent_of_their_place():
    """Of each half of a batch the same share is from the first piece, and neighbours know nothing of each other."""
    with torch.no_grad():
        x, _ = gaussians([0.5, 0.49, 0.01]).sample(4000, generator(6))
    first = (x[:, 0] < 0).double()
    halves = first.reshape(2, 2000).sum(1).numpy()
    assert stats.chi2_contingency([halves, 2000 - halves]).pvalue > FALSE_ALARM
    assert stats.pearsonr(first[1:], first[:-1]).pvalue > FALSE_ALARM


def test_importance_sampling_finds_a_known_log_z():
    """`log Z = 0` of three Gaussians, by pieces in their places with other widths and weights."""
    target = GaussianMixture(2, radius=4.0)
    pieces = [gaussian(tuple(mean.tolist()), (1.2, 1.2)) for mean in target.means]
    proposal = PiecewiseSampler(pieces, [0.3, 0.3, 0.4])
    with torch.no_grad():
        x, log_q = proposal.sample(20000, generator(7))
        log_weights = (-target(x) - log_q).numpy()
    value, error = log_z(log_weights)
    assert 0 < error < 0.01
    assert abs(value) < stats.norm.isf(FALSE_ALARM / 2) * error
    assert ess(log_weights) > 0.7


# ---------------------------------------------------------------- generators, dtypes, state


def test_the_generator_decides(sampler):
    before = torch.random.get_rng_state()
    first, again, other = (sampler.sample(20, generator(seed)) for seed in (8, 8, 9))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_draws(sampler, n):
    x, log_q = sampler.sample(n, generator(10))
    assert x.shape == (n, 2)
    assert log_q.shape == (n,)


def test_without_a_generator_the_global_one_is_used():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = gaussians().sample(5)[0]
        torch.manual_seed(1)
        assert torch.equal(gaussians().sample(5)[0], first)


def test_single_precision():
    """Densities are double, and those of the draws as they are, weights normalised."""
    double, single = mixed(), mixed().float()
    x, log_q = single.sample(500, generator(11))
    assert x.dtype == torch.float32
    assert log_q.dtype == torch.float64
    assert torch.equal(single.log_prob(x), log_q)
    assert_close(log_q, double.log_prob(x.double()), rtol=0, atol=1e-3)
    assert float(single.weights.sum()) == pytest.approx(1, abs=1e-15)


def test_weights_are_normalised_and_part_of_the_state():
    sampler, other = gaussians([6, 3, 1]), gaussians([1, 1, 1])
    assert_close(sampler.weights, torch.tensor(WEIGHTS, dtype=torch.float64), rtol=1e-14, atol=0)
    assert "log_weights" in sampler.state_dict()
    other.load_state_dict(sampler.state_dict())
    assert torch.equal(other.weights, sampler.weights)
    other.set_weights(torch.tensor([1, 2, 1]))
    assert_close(other.weights, torch.tensor([0.25, 0.5, 0.25]).double())
    assert not torch.equal(other.log_prob(normal(3, 2)), sampler.log_prob(normal(3, 2)))
    assert all(parameter.requires_grad for parameter in sampler.parameters())
    assert len(list(sampler.parameters())) == 6


def test_shared_modules_count_once():
    assert len(list(mixed().parameters())) == 2 * len(list(curved(1).parameters())) + 2 + 1
    assert len(list(mirrored(curved(1)).parameters())) == len(list(curved(1).parameters()))


def test_a_copy_shares_as_the_original_does():
    copied = copy.deepcopy(mirrored(curved(1)))
    x = normal(5, 2)
    with torch.no_grad():
        next(copied.parameters()).add_(0.3)
    assert_close(copied.log_prob(x), copied.log_prob(-x), rtol=0, atol=1e-12)
    assert (copied.log_prob(x) - mirrored(curved(1)).log_prob(x)).abs().max() > 1e-3


# ---------------------------------------------------------------- gradients


def test_gradients_of_log_prob_are_finite_differences(sampler):
    x, parameters = normal(6, 2, seed=12), list(sampler.parameters())
    gradients = torch.autograd.grad(sampler.log_prob(x).sum(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction, values = normal(*parameter.shape, seed=13), []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(step * direction)
                values.append(float(sampler.log_prob(x).sum()))
                parameter.sub_(step * direction)
        assert float((gradient * direction).sum()) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-6)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_draws_carry_gradients_to_the_piece_they_came_from():
    sampler = gaussians()
    x, _ = sampler.sample(50, generator(14))
    shifts = [piece.flow.shift for piece in sampler.pieces]
    jacobians = torch.stack([torch.stack(torch.autograd.grad(row[0], shifts, retain_graph=True)) for row in x])
    assert (jacobians[:, :, 0].sum(1) == 1).all()
    assert ((jacobians[:, :, 0] == 1).sum(0) > 0).all()


class HalfLine(Prior):
    """`x exp(-x)` for positive x, as `log 0` outside, where the slope is zero times infinity."""

    def sample(self, n, generator=None):
        return -torch.log1p(-torch.rand(n, 2, generator=generator, dtype=torch.float64)).sum(1, keepdim=True)

    def log_prob(self, x):
        positive = (x + x.abs()) / 2
        return (torch.log(positive) - positive).flatten()


def half_line():
    return FlowSampler(HalfLine(), ElementwiseAffine((1,)).double())


def test_a_piece_of_density_zero_contributes_nothing():
    """No NaN in values or gradients, which the piece by itself would give."""
    whole, half = gaussian((0.0,), (1.0,)), half_line()
    sampler = PiecewiseSampler([whole, half], [0.25, 0.75])
    x = torch.tensor([[-1.0], [2.0], [-3.0]], dtype=torch.float64, requires_grad=True)
    log_q = sampler.log_prob(x)
    alone = math.log(0.25) + stats.norm.logpdf([-1, -3])
    both = math.log(0.25 * stats.norm.pdf(2) + 0.75 * 2 * math.exp(-2))
    assert log_q.tolist() == pytest.approx([alone[0], both, alone[1]], abs=1e-12)
    gradients = torch.autograd.grad(log_q.sum(), [x, *sampler.parameters()])
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert gradients[0][[0, 2], 0].tolist() == pytest.approx([1.0, 3.0], abs=1e-12)
    assert half.log_prob(x)[[0, 2]].tolist() == [-math.inf] * 2
    (own,) = torch.autograd.grad(torch.logsumexp(torch.stack([whole.log_prob(x), half.log_prob(x)]), 0).sum(), x)
    assert torch.isnan(own).any()


def test_fields_where_every_piece_has_density_zero():
    sampler = PiecewiseSampler([half_line(), half_line()], [0.5, 0.5])
    x = torch.tensor([[-1.0], [2.0]], dtype=torch.float64, requires_grad=True)
    log_q = sampler.log_prob(x)
    assert log_q.tolist() == [-math.inf, pytest.approx(math.log(2) - 2, abs=1e-12)]
    gradients = torch.autograd.grad(log_q[1], [x, *sampler.parameters()])
    assert gradients[0].flatten().tolist() == pytest.approx([0, -0.5], abs=1e-12)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


# ---------------------------------------------------------------- mirrored


@pytest.mark.parametrize("shape", [(2,), (2, 3)])
def test_mirrored_sampler_is_symmetric(shape):
    with torch.random.fork_rng():
        torch.manual_seed(15)
        flow = Sequential([MaskedAutoregressive(shape), ElementwiseAffine(shape)]).double()
    torch.nn.init.constant_(flow.layers[1].shift, 1.5)
    one = FlowSampler(Normal(shape), flow)
    both = mirrored(one)
    x = 2 * normal(50, *shape, seed=16)
    assert_close(both.log_prob(x), both.log_prob(-x), rtol=0, atol=1e-12)
    expected = torch.logaddexp(one.log_prob(x), one.log_prob(-x)) - math.log(2)
    assert_close(both.log_prob(x), expected, rtol=0, atol=1e-12)
    assert (one.log_prob(x) - one.log_prob(-x)).abs().min() > 1e-3
    drawn = both.sample(1000, generator(17))[0].flatten(1).mean(1) > 0
    assert stats.binomtest(int(drawn.sum()), 1000).pvalue > FALSE_ALARM


class DoubleWell(Action):
    """`S = 2 (x^2 - 2.5)^2` of one variable."""

    def __call__(self, field):
        return 2 * (field[:, 0] ** 2 - 2.5) ** 2

    def field_shape(self, shape):
        return tuple(shape)


def well():
    return mirrored(gaussian((1.3,), (0.3,)))


def exact_gradient():
    """Return the gradient of `KL(q || p)` by quadrature."""
    sampler, step = well(), 1e-3
    x = torch.arange(-6, 6, step).double()[:, None]
    log_q = sampler.log_prob(x)
    divergence = (log_q.exp() * (log_q + DoubleWell()(x))).sum() * step
    return torch.stack(torch.autograd.grad(divergence, list(sampler.parameters()))).flatten()


@pytest.mark.parametrize("estimator", ["path", "reparametrisation", "reinforce"])
def test_estimators_have_the_exact_gradient(estimator):
    """Hotelling's T^2 of 400 batches."""
    sampler, found = well(), []
    for seed in range(400):
        surrogate, _ = make_estimator(estimator)(sampler, DoubleWell(), 32, generator(seed))
        found.append(torch.stack(torch.autograd.grad(surrogate, list(sampler.parameters()))).flatten())
    found, exact = torch.stack(found).numpy(), exact_gradient().numpy()
    difference, covariance = found.mean(0) - exact, np.cov(found.T) / len(found)
    t2 = difference @ np.linalg.solve(covariance, difference)
    assert stats.f.sf(t2 * (400 - 2) / (2 * 399), 2, 398) > FALSE_ALARM
    assert (np.abs(exact) > 5 * np.sqrt(np.diag(covariance))).all()


@pytest.mark.parametrize("estimator", ["path", "reinforce"])
def test_training_fits_both_wells(estimator):
    sampler, action = well(), DoubleWell()
    train(sampler, action, estimator, steps=200, batch=64, learning_rate=0.02, seed=1)
    with torch.no_grad():
        x, log_q = sampler.sample(4000, generator(18))
        log_weights = (-action(x) - log_q).numpy()
    exact = math.log(quad(lambda y: math.exp(-2 * (y * y - 2.5) ** 2), -5, 5)[0])
    value, error = log_z(log_weights)
    assert abs(value - exact) < stats.norm.isf(FALSE_ALARM / 2) * error
    assert ess(log_weights) > 0.9


# ---------------------------------------------------------------- standardised


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(2,), (2, 3)])
def test_standardised_pieces_start_at_the_place_and_width_of_the_data(shape, weighted):
    width, mean = 0.1 + normal(*shape, seed=19).abs(), 5 * normal(*shape, seed=20)
    data = mean + width * normal(4000, *shape, seed=21)
    times = torch.randint(0, 4, (4000,), generator=generator(22)) if weighted else None
    piece = standardised(MaskedAutoregressive(shape).double(), Normal(shape), data, weights=times)
    repeated = data.repeat_interleave(times, dim=0) if weighted else data
    affine = piece.flow.layers[-1]
    assert_close(affine.shift.detach(), repeated.mean(0), rtol=1e-12, atol=1e-12)
    assert_close(affine.log_scale.detach(), repeated.std(0, unbiased=False).log(), rtol=0, atol=1e-12)
    x = piece.sample(4000, generator(23))[0].detach()
    assert_close(x.mean(0), mean, rtol=0, atol=0.4)
    assert_close(x.std(0) / width, torch.ones(shape).double(), rtol=0, atol=0.2)
    assert affine.shift.requires_grad
    assert affine.log_scale.requires_grad


def test_standardised_pieces_have_full_support():
    data = normal(500, 2).clamp(-1, 1)
    piece = standardised(MaskedAutoregressive((2,)).double(), Normal((2,)), data)
    far = torch.tensor([[30.0, -30.0]]).double()
    assert torch.isfinite(piece.log_prob(far)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_standardised_pieces_have_the_precision_of_the_flow(dtype):
    piece = standardised(MaskedAutoregressive((2,)).to(dtype), Normal((2,)), normal(50, 2).to(torch.float32))
    assert {parameter.dtype for parameter in piece.parameters()} == {dtype}
    assert piece.sample(3, generator(1))[0].dtype == dtype


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("pieces", "weights", "message"),
    [
        (0, [], "at least one piece, got none"),
        (2, [1.0], r"weights have shape \(1,\), expected \(2,\)"),
        (2, [[0.5], [0.5]], r"weights have shape \(2, 1\), expected \(2,\)"),
        (2, 1.0, r"weights have shape \(\), expected \(2,\)"),
        (3, [0.5, 0.6, -0.1], "must be positive and finite, that of piece 2 is -0.1"),
        (2, [0.5, math.nan], "must be positive and finite, that of piece 1 is nan"),
        (2, [math.inf, 1.0], "must be positive and finite, that of piece 0 is inf"),
        (3, [0.5, 0.0, 0.5], "a piece whose weight is zero is never drawn: leave out piece 1"),
    ],
)
def test_weights_that_are_none_are_refused(pieces, weights, message):
    with pytest.raises(ValueError, match=message):
        PiecewiseSampler([gaussian((0.0,), (1.0,)) for _ in range(pieces)], weights)
    if pieces:
        sampler = PiecewiseSampler([gaussian((0.0,), (1.0,)) for _ in range(pieces)], [1.0] * pieces)
        with pytest.raises(ValueError, match=message):
            sampler.set_weights(weights)
        assert_close(sampler.weights, torch.full((pieces,), 1 / pieces).double())


def constant(*columns):
    data = normal(100, 2, 2)
    data.flatten(1)[:, list(columns)] = 0.1
    return data


@pytest.mark.parametrize(
    ("data", "weights", "message"),
    [
        (constant(2), None, r"features \[2\] are constant over 100 samples"),
        (constant(0, 3), None, r"features \[0, 3\] are constant over 100 samples"),
        (normal(100, 2, 2), torch.arange(100) == 5, r"features \[0, 1, 2, 3\] are constant over 1 samples"),
        (normal(100, 2, 2) * math.nan, None, r"finite and of shape \(n, \*shape\), got \(100, 2, 2\)"),
        (normal(100), None, r"finite and of shape \(n, \*shape\), got \(100,\)"),
        (normal(100, 2, 2), torch.ones(99), "weights must be 100 numbers"),
        (normal(100, 2, 2), -torch.ones(100), "weights must be 100 numbers"),
        (normal(100, 2, 2), torch.zeros(100), "weights must be 100 numbers"),
        (normal(100, 2, 2), torch.full((100,), math.nan), "weights must be 100 numbers"),
        (normal(0, 2, 2), None, "weights must be 0 numbers|at least one"),
    ],
)
def test_data_that_cannot_be_standardised_are_refused(data, weights, message):
    with pytest.raises(ValueError, match=message):
        standardised(MaskedAutoregressive((2, 2)), Normal((2, 2)), data, weights=weights)
