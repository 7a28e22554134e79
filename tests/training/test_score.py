"""Score losses: their values and minima on Gaussians in closed form, their limits, and what they do not compute.

Statistical tests compare at five standard deviations (false-alarm rate 6e-7 each); seeds are fixed.
"""

import math
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from latticeflow.actions import Action
from latticeflow.flows import (
    Cubic,
    Dense,
    Logit,
    LUDense,
    PeriodicConvolution,
    Sequential,
    SmoothLeakyReLU,
    glow,
    linear_flow,
)
from latticeflow.priors import Normal
from latticeflow.samplers import EBFlowSampler, FlowSampler, PartwiseSampler
from latticeflow.training import (
    SCORE_LOSSES,
    LikelihoodSettings,
    Trainer,
    TrainingSettings,
    fit,
    make_estimator,
    make_score_loss,
)
from latticeflow.training.score import denoising, explicit, finite_difference, score, sliced

FACTOR = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [-0.3, 0.5, 1.4]], dtype=torch.float64)
SIGMA = FACTOR @ FACTOR.T
IDENTITY = torch.eye(3, dtype=torch.float64)
NOISE = 0.5


class Quadratic(Action):
    """`S = x P x / 2`, of a normal with covariance `P^-1`."""

    def __init__(self, precision):
        self.precision = precision

    def __call__(self, field):
        return 0.5 * torch.einsum("ni,ij,nj->n", field, self.precision, field)

    def field_shape(self, shape):
        return shape


class Square(Action):
    """`S = |x|^2` of fields of any shape."""

    def __call__(self, field):
        return (field**2).flatten(1).sum(1)

    def field_shape(self, shape):
        return shape


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def gaussian(n, seed=1):
    """Return samples of covariance SIGMA."""
    return normal(n, 3, seed=seed) @ FACTOR.T


def one_layer(weight):
    """Return the flow `z = W x`, of density `N(0, (W^T W)^-1)`."""
    layer = Dense((3,), shift=False).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
    return EBFlowSampler(Normal((3,)), Sequential([layer]))


def precision(sampler):
    """Return `A = W^T W`."""
    weight = sampler.flow.layers[0].weight.detach()
    return weight.T @ weight


def some_weight(seed=3):
    return IDENTITY + 0.3 * normal(3, 3, seed=seed)


def nonlinear(build=lambda: linear_flow((3,)), shape=(3,), *, preprocessing=None, seed=4):
    """Return a flow with noise on all weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        flow = build().double().eval()
    draws = generator(seed)
    with torch.no_grad():
        for weight in flow.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=draws, dtype=torch.float64))
    return EBFlowSampler(Normal(shape), flow, preprocessing=preprocessing)


def weight_gradient(loss, sampler):
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss.mean(), tuple(sampler.parameters()))])


# ---------------------------------------------------------------- values


def test_score_is_the_gradient_of_the_log_density():
    sampler, x = nonlinear(), normal(5, 3)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sampler.log_prob(leaf).sum(), leaf)
    assert_close(score(sampler, x), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert_close(score(sampler, x), expected, rtol=1e-12, atol=1e-12)
    linear = one_layer(some_weight())
    assert_close(score(linear, x), -x @ precision(linear), rtol=1e-12, atol=1e-12)


def loss_of(name):
    widths = {"denoising": {"noise": NOISE}, "finite_difference": {"difference": 0.3}}.get(name, {})
    return make_score_loss(name, **widths)


@pytest.mark.parametrize("name", list(SCORE_LOSSES))
def test_mean_on_a_gaussian_in_closed_form(name):
    """`tr(A Sigma A) / 2 - tr A`; for denoising with the wider covariance and the constant `D / (2 sigma^2)`."""
    sampler, n = one_layer(some_weight()), 40_000
    with torch.no_grad():
        found = loss_of(name)(sampler, gaussian(n), generator(5))
    a, widened = precision(sampler), SIGMA + (NOISE**2 * IDENTITY if name == "denoising" else 0)
    expected = 0.5 * (a @ widened @ a).trace() - a.trace() + (1.5 / NOISE**2 if name == "denoising" else 0)
    error = found.std().item() / math.sqrt(n)
    assert found.shape == (n,)
    assert abs(found.mean().item() - expected.item()) < 5 * error
    assert error < 0.02 * abs(expected.item())


def test_each_loss_is_its_formula_field_by_field():
    sampler, x = nonlinear(), normal(6, 3)
    leaf = x.clone().requires_grad_()
    s = score(sampler, leaf)
    v = normal(6, 3, seed=7)
    jacobians = torch.stack(
        [torch.autograd.functional.jacobian(lambda y: score(sampler, y[None])[0], one) for one in x]
    )
    curvature = torch.einsum("ni,nij,nj->n", v, jacobians, v)
    assert_close(sliced(sampler, x, generator(7)), 0.5 * (s**2).sum(1) + curvature, rtol=1e-10, atol=1e-10)
    noisy = 0.5 * ((score(sampler, x + 0.2 * v) + v / 0.2) ** 2).sum(1)
    assert_close(denoising(sampler, x, generator(7), noise=0.2), noisy, rtol=1e-10, atol=1e-10)
    energy, step = sampler.energy, 0.3 * v
    second = (2 * energy(x) - energy(x + step) - energy(x - step)) / 0.09
    first = (energy(x + step) - energy(x - step)) ** 2 / (8 * 0.09)
    found = finite_difference(sampler, x, generator(7), difference=0.3)
    assert_close(found, second + first, rtol=1e-10, atol=1e-10)


def test_finite_differences_tend_to_derivatives_by_the_square_of_their_step():
    """Of each field, with the same direction: halving eps divides the error by four."""
    sampler, x, v = nonlinear(), normal(6, 3), normal(6, 3, seed=7)
    slice_term = sliced(sampler, x, generator(7)) - 0.5 * (score(sampler, x) ** 2).sum(1)
    limit = (slice_term + 0.5 * (v * score(sampler, x)).sum(1) ** 2).detach()
    errors = [finite_difference(sampler, x, generator(7), difference=eps) - limit for eps in (0.04, 0.02, 0.01)]
    assert errors[0].abs().min() > 1e-7
    for wide, narrow in pairwise(errors):
        assert_close(wide / narrow, torch.full((6,), 4.0).double(), rtol=0.02, atol=0)
    assert_close(finite_difference(sampler, x, generator(7), difference=1e-4), limit, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- minima


def exact_moments(n, seed=8):
    """Return samples and noise whose means vanish and whose second moments, the mixed ones too, are exactly right."""
    draws = normal(n, 6, seed=seed)
    draws = draws - draws.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(draws.T @ draws / n), draws.T, upper=False).T
    return white[:, :3] @ FACTOR.T, white[:, 3:].contiguous()


def minimiser(covariance):
    """Return a root of the inverse covariance, turned, for the loss knows `W^T W` alone."""
    rotation = torch.linalg.qr(normal(3, 3, seed=9))[0]
    return rotation @ torch.linalg.inv(torch.linalg.cholesky(covariance))


@pytest.mark.parametrize(("name", "widening"), [("sliced", 0.0), ("denoising", NOISE**2)])
def test_gradient_vanishes_at_the_precision_of_the_samples(name, widening, monkeypatch):
    """At `W^T W = Sigma^-1`, for denoising `(Sigma + sigma^2)^-1`, and not at the other one; no statistical error."""
    x, noise = exact_moments(500)
    samplers = {extra: one_layer(minimiser(SIGMA + extra * IDENTITY)) for extra in (0.0, NOISE**2)}
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: noise)
    for extra, sampler in samplers.items():
        found = weight_gradient(loss_of(name)(sampler, x, None), sampler).norm()
        assert (found < 1e-10) if extra == widening else (found > 0.1)


def test_gradient_of_finite_differences_vanishes_there_too():
    """Each of its nine components in the mean of 200 batches; ten percent away some do not."""
    x = gaussian(40_000, seed=10).split(200)
    worst = []
    for scale in (1.0, 1.1):
        sampler, draws = one_layer(scale * minimiser(SIGMA)), generator(11)
        loss = loss_of("finite_difference")
        found = torch.stack([weight_gradient(loss(sampler, batch, draws), sampler) for batch in x])
        worst.append((found.mean(0) / found.std(0) * math.sqrt(len(found))).abs().max())
    assert worst[0] < 5 < worst[1]


@pytest.mark.parametrize("loss", ["sliced", "denoising"])
def test_training_finds_the_precision_of_the_samples(loss):
    """To 2% of its norm; the statistical error of 40000 samples is below 1%."""
    sampler, noise = one_layer(IDENTITY), NOISE if loss == "denoising" else None
    chosen = LikelihoodSettings(
        loss=loss, noise=noise, steps=400, evaluate_every=400, batch=4000, learning_rate=0.03, validation=0.1
    )
    records = fit(sampler, gaussian(40_000), settings=chosen)
    expected = torch.linalg.inv(SIGMA + (noise or 0.0) ** 2 * IDENTITY)
    assert (precision(sampler) - expected).norm() < 0.02 * expected.norm()
    assert records[-1].held_out < records[0].held_out


# ---------------------------------------------------------------- the explicit loss


def test_explicit_loss_vanishes_with_its_gradient_where_q_is_p():
    """Field by field, on any configurations."""
    weight = some_weight()
    sampler, x = one_layer(weight), 5 * normal(20, 3)
    loss = explicit(sampler, x, Quadratic(weight.T @ weight))
    assert loss.max() < 1e-25
    assert weight_gradient(loss, sampler).abs().max() < 1e-11


def test_explicit_loss_is_the_squared_difference_of_score_and_force():
    sampler, x, action = nonlinear(), normal(20, 3), Quadratic(torch.linalg.inv(SIGMA))
    difference = score(sampler, x) + x @ action.precision
    assert_close(explicit(sampler, x, action), 0.5 * (difference**2).sum(1), rtol=1e-12, atol=1e-12)
    assert weight_gradient(explicit(sampler, x, action), sampler).abs().max() > 1e-2


@pytest.mark.parametrize("given", [True, False])
def test_explicit_estimator_holds_its_fields_fixed(given):
    """The gradient is that of the loss at the fields drawn, as constants."""
    sampler, action = nonlinear(), Quadratic(torch.linalg.inv(SIGMA))
    target = (lambda n, generator: 2 * torch.randn(n, 3, generator=generator, dtype=torch.float64)) if given else None
    surrogate, _ = make_estimator("explicit", target=target)(sampler, action, 30, generator(12))
    x = target(30, generator(12)) if given else sampler.sample(30, generator(12))[0].detach()
    expected = weight_gradient(explicit(sampler, x, action), sampler)
    assert_close(weight_gradient(surrogate, sampler), expected, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------- what is not computed

FLOWS = {
    "dense": (lambda: linear_flow((4,)), (4,)),
    "lu": (lambda: Sequential([LUDense((4,)), Cubic(), LUDense((4,))]), (4,)),
    "convolution": (
        lambda: Sequential([PeriodicConvolution((2, 4), kernel=3), SmoothLeakyReLU(), PeriodicConvolution((2, 4))]),
        (2, 4),
    ),
    "glow": (lambda: glow((4, 4), levels=1, steps=1, hidden=4), (4, 4)),
}


@pytest.mark.parametrize("name", ["explicit", *SCORE_LOSSES])
@pytest.mark.parametrize("flow", list(FLOWS))
def test_no_determinant_enters_the_loss_or_its_gradient(flow, name, monkeypatch):
    build, shape = FLOWS[flow]
    sampler, x = nonlinear(build, shape), normal(5, *shape)

    def refuse(*args, **options):
        raise AssertionError("a determinant was computed")

    for function in ("slogdet", "det", "lu_factor_ex", "lu_factor", "solve", "inv"):
        monkeypatch.setattr(torch.linalg, function, refuse)
    for layer in sampler.flow.layers:
        if layer.constant_jacobian:
            monkeypatch.setattr(layer, "constant_log_det", refuse)
    loss = explicit(sampler, x, Square()) if name == "explicit" else loss_of(name)(sampler, x, generator(13))
    loss.mean().backward()
    gradients = [weight.grad for weight in sampler.parameters() if weight.grad is not None]
    assert len(gradients) > 1
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("name", list(SCORE_LOSSES))
def test_losses_see_no_constant_of_the_density(name):
    """A plain flow sampler with all its log-determinants has the same loss, whose constant part has no gradient."""
    sampler, x = nonlinear(), normal(5, 3)
    plain = FlowSampler(sampler.prior, sampler.flow)
    assert torch.equal(loss_of(name)(sampler, x, generator(14)), loss_of(name)(plain, x, generator(14)))


# ---------------------------------------------------------------- after preprocessing


@pytest.mark.parametrize("name", list(SCORE_LOSSES))
def test_what_is_matched_is_the_preprocessed_variable(name):
    preprocessing, x = Logit(-1, 2, margin=0.01), 3 * torch.rand(6, 3, generator=generator(15)).double() - 1
    sampler, inner = nonlinear(preprocessing=preprocessing), nonlinear()
    found = loss_of(name)(sampler, x, generator(16))
    assert_close(found, loss_of(name)(inner, preprocessing.inverse(x)[0], generator(16)), rtol=1e-12, atol=1e-12)
    directly = SCORE_LOSSES[name](sampler, x, generator(16))
    assert (directly - found).abs().max() > 0.1


def test_the_score_of_the_field_itself_is_not_the_one_matched():
    """The explicit loss is of the field, whose force the action knows."""
    sampler, x = nonlinear(preprocessing=Logit(-1, 2)), torch.rand(6, 3, generator=generator(17)).double()
    leaf = x.clone().requires_grad_()
    (s,) = torch.autograd.grad(sampler.log_prob(leaf).sum(), leaf)
    expected = 0.5 * ((s + x) ** 2).sum(1)
    assert_close(explicit(sampler, x, Quadratic(IDENTITY)), expected, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("value", [0.0, -0.1, math.nan, math.inf])
@pytest.mark.parametrize(("width", "name"), [("noise", "denoising"), ("difference", "finite_difference")])
def test_widths_that_are_not_positive_are_refused(width, name, value):
    message = f"{width} must be positive and finite, got {value!r}"
    sampler, x = one_layer(IDENTITY), normal(10, 3)
    with pytest.raises(ValueError, match=message):
        make_score_loss(name, **{width: value})
    with pytest.raises(ValueError, match=message):
        SCORE_LOSSES[name](sampler, x, None, **{width: value})
    with pytest.raises(ValueError, match=message):
        fit(sampler, x, settings=LikelihoodSettings(loss=name, **{width: value}))


@pytest.mark.parametrize(("width", "owner"), [("noise", "denoising"), ("difference", "finite_difference")])
@pytest.mark.parametrize("name", ["likelihood", *SCORE_LOSSES])
def test_widths_of_another_loss_are_refused(width, owner, name):
    if name == owner:
        fit(one_layer(IDENTITY), normal(10, 3), settings=LikelihoodSettings(loss=name, steps=1, **{width: 0.2}))
        return
    with pytest.raises(ValueError, match=f"{width} belongs to {owner} score matching, got it with"):
        fit(one_layer(IDENTITY), normal(10, 3), settings=LikelihoodSettings(loss=name, **{width: 0.2}))


def test_unknown_losses_are_refused_with_the_known_ones():
    for build in (
        lambda: make_score_loss("explicit"),
        lambda: fit(one_layer(IDENTITY), normal(10, 3), settings=LikelihoodSettings(loss="explicit")),
    ):
        with pytest.raises(ValueError, match="one of sliced, denoising, finite_difference, got 'explicit'"):
            build()


def partwise():
    flow = linear_flow((3,), layers=2).double()
    return PartwiseSampler(Normal((3,)), flow, [1, 2])


@pytest.mark.parametrize("schedule", ["sequential", "alternate", "simultaneous"])
@pytest.mark.parametrize("name", ["explicit", *SCORE_LOSSES])
def test_parts_cannot_match_scores_by_themselves(name, schedule):
    message = "parts of a flow cannot match scores by themselves; choose schedule 'end_to_end'"
    estimator = make_estimator(name, target=lambda n, generator: gaussian(n))
    settings = TrainingSettings(steps=3, schedule=schedule)
    with pytest.raises(ValueError, match=message):
        Trainer(partwise(), Quadratic(IDENTITY), estimator, settings)
    if name in SCORE_LOSSES:
        with pytest.raises(ValueError, match=message):
            fit(partwise(), gaussian(20), settings=LikelihoodSettings(loss=name, steps=3, schedule=schedule))


@pytest.mark.parametrize("name", ["explicit", *SCORE_LOSSES])
def test_a_flow_in_parts_matches_scores_end_to_end(name):
    estimator = make_estimator(name, target=lambda n, generator: gaussian(n))
    run = Trainer(partwise(), Quadratic(IDENTITY), estimator, TrainingSettings(steps=2, batch=8))
    run.run()
    assert [record.skipped for record in run.records] == [False, False]
