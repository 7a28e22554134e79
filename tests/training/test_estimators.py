"""Gradient estimators: one expected gradient, the right one, and the variance that each promises.

Statistical tests compare vectors of means by Hotelling's T^2 and fail below a p-value of 1e-4, which is their
false-alarm rate, each; seeds are fixed.
"""

import math
from importlib import import_module

import numpy as np
import pytest
import torch
from scipy.stats import f as f_distribution
from torch import nn
from torch.testing import assert_close

from latticeflow.actions import Action, SchwingerAction, U1Action
from latticeflow.exact import u1_log_z
from latticeflow.flows import ElementwiseAffine, gauge_flow
from latticeflow.priors import HaarUniform, Normal, QuenchedU1
from latticeflow.samplers import FlowSampler, Sampler
from latticeflow.training import ESTIMATORS, SCORE_LOSSES, make_estimator

SHAPE = (4, 4)
REVERSE = ("reinforce", "reparametrisation", "path")
FALSE_ALARM = 1e-4
DIRECTIONS = 4


class NormalSampler(Sampler):
    """`q = N(mean, e^width)` in one dimension, whose divergences from a normal target are known in closed form."""

    def __init__(self, mean, width):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.width = nn.Parameter(torch.tensor(width, dtype=torch.float64))

    def sample(self, n, generator=None):
        z = torch.randn(n, generator=generator, dtype=torch.float64)
        x = self.mean + torch.exp(self.width) * z
        return x, self._density(z)

    def log_prob(self, x):
        return self._density((x - self.mean) * torch.exp(-self.width))

    def _density(self, z):
        return -0.5 * z**2 - self.width - 0.5 * math.log(2 * math.pi)


class NormalAction(Action):
    """`S = (x - 1)^2 / (2 * 0.8^2)` and a constant; `exp(-S)` is a normal of mean 1 and width 0.8."""

    mean, width = 1.0, 0.8

    def __init__(self, constant=0.0):
        self.constant = constant

    def __call__(self, field):
        return 0.5 * ((field - self.mean) / self.width) ** 2 + self.constant

    def field_shape(self, shape):
        return ()


def normal_target(n, generator=None):
    return NormalAction.mean + NormalAction.width * torch.randn(n, generator=generator, dtype=torch.float64)


def one_site_target(n, generator=None):
    return normal_target(n, generator)[:, None]


DIVERGENCES = (*REVERSE, "forward_kl")
SCORES = [
    ("explicit", {}),
    ("explicit", {"target": one_site_target}),
    ("sliced", {"target": one_site_target}),
    ("denoising", {"target": one_site_target, "noise": 0.7}),
    ("finite_difference", {"target": one_site_target, "difference": 0.5}),
]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randomised(flow, seed, strength):
    """Fill all weights, the spline parameters being of order `strength`."""
    draws = generator(seed)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws, dtype=torch.float64))
        for layer in flow.layers:
            last = layer.network.layers[-1].linear
            last.weight.mul_(strength / math.sqrt(last.in_features))
            last.bias.mul_(strength)
    return flow.double()


def haar_sampler(*, seed=1, layers=3, strength=0.03):
    flow = gauge_flow(SHAPE, layers=layers, hidden=[4], bins=3).double()
    return FlowSampler(HaarUniform(SHAPE), randomised(flow, seed, strength))


def perfect_sampler(beta, *, layers=8):
    """Return q = p for U1Action(beta): its exact sampler under a flow that is the identity, hidden weights not zero."""
    flow = randomised(gauge_flow(SHAPE, layers=layers, hidden=[4], bins=3).double(), 2, 0.0)
    return FlowSampler(QuenchedU1(beta, SHAPE), flow)


def gradient(surrogate, sampler):
    parameters = list(sampler.parameters())
    return torch.cat([part.flatten() for part in torch.autograd.grad(surrogate, parameters)])


def estimates(estimator, sampler, action, *, batch, batches, seed):
    """Return the gradients of many batches, `(batches, parameters)`."""
    draws = generator(seed)
    return torch.stack([gradient(estimator(sampler, action, batch, draws)[0], sampler) for _ in range(batches)])


def directions(count):
    return torch.randn(count, DIRECTIONS, generator=generator(99), dtype=torch.float64) / math.sqrt(count)


def p_value(values, expected=None):
    """Return the probability of means `(n, d)` this far from `expected`, a vector or other independent values."""
    values = np.asarray(values)
    difference, covariance, n = values.mean(0), np.cov(values.T) / len(values), len(values)
    if expected is not None and np.ndim(expected) == 2:
        other = np.asarray(expected)
        difference, covariance = difference - other.mean(0), covariance + np.cov(other.T) / len(other)
        n = min(n, len(other))
    elif expected is not None:
        difference = difference - np.asarray(expected)
    d = len(difference)
    t2 = difference @ np.linalg.solve(covariance, difference)
    return f_distribution.sf(t2 * (n - d) / (d * (n - 1)), d, n - d)


# ---------------------------------------------------------------- the expected gradient


@pytest.mark.parametrize("name", DIVERGENCES)
def test_expected_gradient_in_closed_form(name):
    """In batches of two, where a baseline that is not leave-one-out would halve the gradient."""
    sampler, action = NormalSampler(0.3, 0.2), NormalAction()
    estimator = make_estimator(name, target=normal_target if name == "forward_kl" else None)
    found = estimates(estimator, sampler, action, batch=2, batches=3000, seed=3)
    gap, ratio = 0.3 - action.mean, math.exp(0.4) / action.width**2
    reverse = [gap / action.width**2, ratio - 1]
    forward = [gap * math.exp(-0.4), 1 - 1 / ratio - gap**2 * math.exp(-0.4)]
    expected = forward if name == "forward_kl" else reverse
    assert p_value(found, expected) > FALSE_ALARM
    assert p_value(found, 0.8 * np.array(expected)) < FALSE_ALARM


class OneSiteAction(NormalAction):
    """The same normal for fields `(batch, 1)`."""

    def __call__(self, field):
        return super().__call__(field[:, 0])

    def field_shape(self, shape):
        return (1,)


def affine_sampler(mean, width):
    """Return the same q for fields `(batch, 1)`."""
    flow = ElementwiseAffine((1,)).double()
    with torch.no_grad():
        flow.shift.fill_(mean)
        flow.log_scale.fill_(width)
    return FlowSampler(Normal((1,)), flow)


def fisher_gradient(mean, width, target_mean, target_width):
    """Return that of `1/2 E_p (d log q - d log p)^2` in the width and mean of q, its order of parameters."""
    gap, variance = mean - target_mean, math.exp(2 * width)
    return [2 / variance - 2 * (target_width**2 + gap**2) / variance**2, gap / variance**2]


@pytest.mark.parametrize(("name", "options"), SCORES)
def test_expected_score_gradient_in_closed_form(name, options):
    """Of a normal target; for denoising one that is wider by the noise. A quadratic energy has no eps^2 error.

    Explicit is `1/2 E_q (d log q - d log p)^2`, the draws held fixed, or `1/2 E_p` of the same on samples.
    """
    sampler, action = affine_sampler(0.3, 0.2), OneSiteAction()
    estimator = make_estimator(name, **options)
    found = estimates(estimator, sampler, action, batch=20, batches=300, seed=3)
    wide = math.hypot(action.width, options.get("noise", 0.0))
    expected = fisher_gradient(0.3, 0.2, action.mean, wide)
    if name == "explicit" and "target" not in options:
        variance = math.exp(0.4)
        expected = [2 / action.width**2 - 2 / variance, (0.3 - action.mean) / (variance * action.width**2)]
    assert p_value(found, expected) > FALSE_ALARM
    assert p_value(found, 0.8 * np.array(expected)) < FALSE_ALARM


@pytest.fixture(scope="module")
def schwinger_gradients():
    """Return projected gradients of each reverse estimator on the Schwinger model, `(batches, DIRECTIONS)`.

    The first direction is a gradient of a run of its own, where a wrong scale shows best; the others are random.
    """
    sampler, action = haar_sampler(), SchwingerAction(1.0, 0.2)
    pilot = estimates(make_estimator("path"), sampler, action, batch=512, batches=2, seed=77).mean(0)
    onto = torch.cat([pilot[:, None] / pilot.norm(), directions(len(pilot))[:, 1:]], dim=1)
    return {
        name: estimates(make_estimator(name), sampler, action, batch=256, batches=24, seed=seed) @ onto
        for seed, name in enumerate(REVERSE)
    }


@pytest.mark.parametrize(("first", "second"), [REVERSE[:2], REVERSE[1:], REVERSE[::2]])
def test_reverse_estimators_share_their_expected_gradient(schwinger_gradients, first, second):
    assert p_value(schwinger_gradients[first], schwinger_gradients[second]) > FALSE_ALARM


@pytest.mark.parametrize("name", REVERSE)
def test_the_comparison_resolves_a_wrong_scale(schwinger_gradients, name):
    """The power of the test above: a gradient too small by a third would be noticed."""
    other = schwinger_gradients[REVERSE[REVERSE.index(name) - 1]]
    assert p_value(schwinger_gradients[name], 0.67 * other) < FALSE_ALARM


def test_forward_kl_is_maximum_likelihood():
    """Against the same expectation by another road, `-E_p[d log q] = -E_Haar[p d log q]`, p known exactly."""
    beta, sampler = 0.5, haar_sampler()
    estimator = make_estimator("forward_kl", target=QuenchedU1(beta, SHAPE).sample)
    onto = directions(sum(p.numel() for p in sampler.parameters()))
    found = estimates(estimator, sampler, U1Action(beta), batch=128, batches=40, seed=4) @ onto
    weighted = []
    for seed in range(40):
        links = HaarUniform(SHAPE).sample(256, generator(1000 + seed))
        density = torch.exp(QuenchedU1(beta, SHAPE).log_prob(links))
        weighted.append(gradient(-(density * sampler.log_prob(links)).mean(), sampler) @ onto)
    assert p_value(found, torch.stack(weighted)) > FALSE_ALARM
    assert p_value(found) < FALSE_ALARM


# ---------------------------------------------------------------- the baseline


def test_reinforce_subtracts_the_mean_of_the_other_signals():
    sampler, action, n = haar_sampler(), U1Action(1.0), 3
    surrogate, _ = make_estimator("reinforce")(sampler, action, n, generator(5))
    with torch.no_grad():
        x, log_q = sampler.sample(n, generator(5))
        signal = log_q + action(x)
    scores = [gradient(sampler.log_prob(one[None]).sum(), sampler) for one in x]
    others = [(signal.sum() - signal[i]) / (n - 1) for i in range(n)]
    expected = sum(score * (signal[i] - others[i]) for i, score in enumerate(scores)) / n
    assert_close(gradient(surrogate, sampler), expected, rtol=1e-10, atol=1e-12)


def test_a_constant_in_the_action_changes_no_gradient():
    sampler = NormalSampler(0.3, 0.2)
    for name in REVERSE:
        found = [
            gradient(make_estimator(name)(sampler, NormalAction(constant), 20, generator(6))[0], sampler)
            for constant in (0.0, 1e3)
        ]
        assert_close(found[0], found[1], rtol=0, atol=1e-10)


def test_baseline_reduces_the_variance():
    """By far more than the statistical error of a variance ratio of 40 batches, about 0.3 of it."""
    sampler, action = haar_sampler(), U1Action(1.0)

    def without_baseline(sampler, action, batch, generator):
        with torch.no_grad():
            x, log_q = sampler.sample(batch, generator)
            signal = log_q + action(x) + 10.0
        return (sampler.log_prob(x) * signal).mean(), -signal

    variances = [
        estimates(estimator, sampler, action, batch=64, batches=40, seed=7).var(0).sum()
        for estimator in (make_estimator("reinforce"), without_baseline)
    ]
    assert variances[0] < 0.3 * variances[1]


# ---------------------------------------------------------------- at q = p


@pytest.mark.parametrize("beta", [1.0, 3.0])
def test_path_gradient_of_every_sample_vanishes_at_q_equal_p(beta):
    sampler = perfect_sampler(beta)
    found = estimates(make_estimator("path"), sampler, U1Action(beta), batch=1, batches=8, seed=8)
    assert found.abs().max() < 1e-12


@pytest.mark.parametrize("beta", [1.0, 3.0])
def test_reinforce_gradient_vanishes_at_q_equal_p(beta):
    sampler = perfect_sampler(beta)
    found = estimates(make_estimator("reinforce"), sampler, U1Action(beta), batch=2, batches=8, seed=8)
    assert found.abs().max() < 1e-10


def test_reparametrisation_gradient_does_not_vanish_at_q_equal_p():
    sampler = perfect_sampler(1.0)
    found = estimates(make_estimator("reparametrisation"), sampler, U1Action(1.0), batch=1, batches=8, seed=8)
    assert (found.norm(dim=1) > 1e-2).all()


@pytest.mark.parametrize("name", ["reparametrisation", "forward_kl"])
def test_gradient_vanishes_in_the_mean_at_q_equal_p(name):
    sampler = perfect_sampler(1.0, layers=4)
    target = sampler.prior.sample if name == "forward_kl" else None
    found = estimates(make_estimator(name, target=target), sampler, U1Action(1.0), batch=64, batches=50, seed=9)
    projected = found @ directions(found.shape[1])
    assert p_value(projected) > FALSE_ALARM
    assert projected.std(0).min() > 1e-3


@pytest.mark.parametrize("name", ["path", "reinforce"])
def test_gradient_does_not_vanish_away_from_q_equal_p(name):
    """So that the zeros above mean something: the same prior, another beta in the action."""
    sampler = perfect_sampler(1.0)
    found = estimates(make_estimator(name), sampler, U1Action(1.2), batch=2, batches=4, seed=8)
    assert found.norm(dim=1).min() > 1e-3


# ---------------------------------------------------------------- log weights


@pytest.mark.parametrize("name", REVERSE)
def test_log_weights_are_those_of_the_drawn_fields(name):
    sampler, action = haar_sampler(), SchwingerAction(1.0, 0.2)
    _, log_weight = make_estimator(name)(sampler, action, 30, generator(10))
    with torch.no_grad():
        x, log_q = sampler.sample(30, generator(10))
    assert_close(log_weight, -action(x) - log_q, rtol=0, atol=1e-9)
    assert log_weight.dtype == torch.float64
    assert not log_weight.requires_grad


def test_log_weights_of_forward_kl_belong_to_the_target_fields():
    sampler, action, asked = haar_sampler(), U1Action(1.0), []

    def target(n, generator=None):
        asked.append((n, generator))
        return QuenchedU1(1.0, SHAPE).sample(n, generator)

    draws = generator(11)
    surrogate, log_weight = make_estimator("forward_kl", target=target)(sampler, action, 30, draws)
    assert asked == [(30, draws)]
    x = QuenchedU1(1.0, SHAPE).sample(30, generator(11))
    assert_close(log_weight, (-action(x) - sampler.log_prob(x)).detach(), rtol=0, atol=1e-9)
    assert_close(surrogate, -sampler.log_prob(x).mean())
    assert not log_weight.requires_grad


@pytest.mark.parametrize("name", REVERSE)
def test_weights_of_a_perfect_sampler_are_the_partition_function(name):
    _, log_weight = make_estimator(name)(perfect_sampler(2.0), U1Action(2.0), 10, generator(12))
    assert_close(log_weight, torch.full((10,), u1_log_z(2.0, SHAPE), dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_single_precision_flow(name, monkeypatch):
    """Weights are double and the gradient agrees with that of the double-precision flow, of the same noise."""
    noise = torch.randn(64, 2, *SHAPE, generator=generator(17), dtype=torch.float64)
    monkeypatch.setattr(import_module("latticeflow.training.score"), "_normal", lambda x, generator: noise.to(x))
    target = QuenchedU1(1.0, SHAPE).sample if name in ("forward_kl", *SCORE_LOSSES) else None
    results = []
    for sampler in (haar_sampler(), haar_sampler().float()):
        surrogate, log_weight = make_estimator(name, target=target)(sampler, U1Action(1.0), 64, generator(13))
        assert log_weight.dtype == torch.float64
        results.append(gradient(surrogate, sampler).double())
    assert (results[0] - results[1]).norm() < 1e-3 * results[0].norm()


# ---------------------------------------------------------------- options


@pytest.mark.parametrize("clip", [0.5, 2.0])
def test_signal_clip_limits_the_advantage(clip):
    sampler, action = haar_sampler(), U1Action(1.0)
    surrogate, log_weight = make_estimator("reinforce", signal_clip=clip)(sampler, action, 16, generator(14))
    with torch.no_grad():
        x, log_q = sampler.sample(16, generator(14))
        signal = log_q + action(x)
    advantage = (signal - signal.mean()) * 16 / 15
    assert (advantage.abs() > clip).any()
    assert (advantage.abs() < clip).any()
    expected = (sampler.log_prob(x) * advantage.clamp(-clip, clip)).mean()
    assert_close(gradient(surrogate, sampler), gradient(expected, sampler), rtol=1e-9, atol=1e-12)
    assert_close(log_weight, -signal, rtol=0, atol=1e-9)


def test_a_wide_signal_clip_changes_nothing():
    sampler, action = haar_sampler(), U1Action(1.0)
    plain, clipped = (
        gradient(make_estimator("reinforce", signal_clip=clip)(sampler, action, 16, generator(15))[0], sampler)
        for clip in (None, 1e3)
    )
    assert torch.equal(plain, clipped)


def test_estimators_are_these():
    assert set(ESTIMATORS) == {*REVERSE, "explicit", "forward_kl", "sliced", "denoising", "finite_difference"}


def test_unknown_estimator_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=f"one of {', '.join(ESTIMATORS)}, got 'reinforse'"):
        make_estimator("reinforse")


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "reinforce"])
def test_signal_clip_belongs_to_reinforce(name):
    with pytest.raises(ValueError, match=f"signal_clip belongs to the reinforce estimator.*'{name}'"):
        make_estimator(name, signal_clip=8.0, target=normal_target)


@pytest.mark.parametrize("name", ["forward_kl", *SCORE_LOSSES])
def test_those_that_learn_from_samples_need_a_target(name):
    with pytest.raises(ValueError, match=f"{name} needs target"):
        make_estimator(name)


@pytest.mark.parametrize("name", REVERSE)
def test_those_that_do_not_refuse_a_target(name):
    with pytest.raises(ValueError, match=f"target belongs to estimators that learn from samples.*{name!r}"):
        make_estimator(name, target=normal_target)


@pytest.mark.parametrize(("width", "owner"), [("noise", "denoising"), ("difference", "finite_difference")])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_widths_belong_to_one_estimator_each(name, width, owner):
    target = None if name in REVERSE else normal_target
    if name == owner:
        for value in (0.0, -0.1, math.nan, math.inf):
            with pytest.raises(ValueError, match=f"{width} must be positive and finite, got {value!r}"):
                make_estimator(name, target=target, **{width: value})
    else:
        with pytest.raises(ValueError, match=f"{width} belongs to {'the ' * (name not in SCORE_LOSSES)}{owner}"):
            make_estimator(name, target=target, **{width: 0.1})


@pytest.mark.parametrize(("name", "options"), SCORES)
def test_log_weights_of_score_estimators_are_those_of_their_fields(name, options):
    sampler, action = affine_sampler(0.3, 0.2), OneSiteAction()
    _, log_weight = make_estimator(name, **options)(sampler, action, 30, generator(16))
    draw = options.get("target", lambda n, generator: sampler.sample(n, generator)[0])
    x = draw(30, generator(16))
    assert_close(log_weight, (-action(x) - sampler.log_prob(x)).detach(), rtol=0, atol=1e-12)
    assert log_weight.dtype == torch.float64
    assert not log_weight.requires_grad
