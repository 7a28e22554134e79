"""Gradients of samplers with a student-t base: zero, sample by sample, at q = p, and one expectation everywhere.

Statistical tests compare vectors of means by Hotelling's T^2 and fail below a p-value of 1e-4, which is their
false-alarm rate, each; seeds are fixed.
"""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import f as f_distribution
from scipy.stats import t as student
from torch.testing import assert_close

from latticeflow.actions import Action
from latticeflow.actions.densities import MultivariateStudentT
from latticeflow.flows import Clamp, Sequential
from latticeflow.flows.networks import Conditioner
from latticeflow.priors import FreeField, Normal, StudentT
from latticeflow.samplers import FlowSampler, StabilisedSampler
from latticeflow.training import make_estimator

REVERSE = ("reinforce", "reparametrisation", "path")
FALSE_ALARM = 1e-4
SAMPLES = 6
DENSE = {"conditioner": "dense"}
LOG_NU = "prior.log_degrees_of_freedom"

CASES = {
    "affine": ((3,), DENSE),
    "affine, odd": ((3,), {**DENSE, "odd": True}),
    "affine, LOFT at work": ((4,), {**DENSE, "tau": 0.3}),
    "affine without clamp": ((3,), {**DENSE, "clamp": Clamp("none")}),
    "spline": ((3,), {**DENSE, "transform": "spline", "bins": 4, "bound": 2.0}),
    "spline, odd, random masks": ((5,), {**DENSE, "transform": "spline", "mask": "random", "odd": True}),
    "convolution": ((4, 4), {"shared": True, "tau": 1.0}),
    "convolution of splines": ((2, 4), {"transform": "spline", "mask": "stripes", "inner_kernel": 3}),
    "normal base": ((3,), {**DENSE, "prior": Normal((3,))}),
    "free base": ((4, 4), {"prior": FreeField((4, 4), 0.4), "shared": True, "odd": True}),
}


class FrozenAction(Action):
    """`S = -log q` of a copy of a sampler as it was, so that q = p."""

    def __init__(self, sampler):
        self.sampler = copy.deepcopy(sampler).requires_grad_(requires_grad=False)

    def __call__(self, field):
        return -self.sampler.log_prob(field)

    def field_shape(self, shape):
        return tuple(shape)


class ScaledStudentT(Action):
    """The density of `x = scale z + shift` for independent student-t z, written out by torch's own distribution."""

    def __init__(self, nu, log_scale, shift):
        self.distribution = torch.distributions.StudentT(nu, shift, log_scale.exp())

    def __call__(self, field):
        return -self.distribution.log_prob(field).sum(1)

    def field_shape(self, shape):
        return tuple(shape)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randomised(sampler, *, seed=1, strength=0.4):
    """Move all weights; every network's output is of order `strength`, the degrees of freedom are a few."""
    draws = generator(seed)
    with torch.no_grad():
        for parameter in sampler.flow.parameters():
            parameter.copy_(strength * torch.randn(parameter.shape, generator=draws))
        for network in (module for module in sampler.modules() if isinstance(module, Conditioner)):
            for layer in network.layers:
                layer.linear.weight.div_(strength * math.sqrt(layer.linear.in_features))
            network.layers[-1].linear.weight.mul_(2 * strength)
        if isinstance(sampler.prior, StudentT):
            log_nu = sampler.prior.log_degrees_of_freedom
            log_nu.copy_(math.log(6) + 0.4 * torch.randn(log_nu.shape, generator=draws))
    return sampler.double()


def stabilised(shape, *, strength=0.4, **options):
    return randomised(StabilisedSampler(shape, **{"layers": 4, "hidden": [5], **options}), strength=strength)


def gradients(estimator, sampler, action, *, batch, seed):
    """Return the gradient of every parameter by name."""
    surrogate, _ = make_estimator(estimator)(sampler, action, batch, generator(seed))
    names, parameters = zip(*sampler.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(surrogate, parameters), strict=True))


# ---------------------------------------------------------------- at q = p


@pytest.mark.parametrize(("shape", "options"), CASES.values(), ids=CASES)
def test_path_gradient_of_every_sample_vanishes_at_q_equal_p(shape, options):
    """For all parameters, the degrees of freedom among them; that of reparametrisation vanishes for none.

    The estimator finds the score on its way, the action by an inverse, which loses digits where random splines are
    nearly flat: theirs are milder.
    """
    sampler = stabilised(shape, strength=0.1 if options.get("transform") == "spline" else 0.4, **options)
    action = FrozenAction(sampler)
    for seed in range(SAMPLES):
        path = gradients("path", sampler, action, batch=1, seed=seed)
        assert max(gradient.abs().max() for gradient in path.values()) < 1e-10
        whole = gradients("reparametrisation", sampler, action, batch=1, seed=seed)
        assert min(gradient.abs().max() for gradient in whole.values()) > 1e-9
        assert max(gradient.abs().max() for gradient in whole.values()) > 1e-2
        assert (LOG_NU in whole) == isinstance(sampler.prior, StudentT)
        if LOG_NU in whole:
            assert whole[LOG_NU].abs().max() > 1e-4


@pytest.mark.parametrize("nu", [0.7, 1.0, 4.0, 30.0])
def test_path_gradient_vanishes_at_a_density_that_is_written_out(nu):
    """Couplings that are the identity and an affine map that is not: q is a product of scaled student-t laws."""
    sampler = stabilised((3,), **DENSE, tau=1e9)
    draws = generator(2)
    with torch.no_grad():
        for layer in sampler.flow.layers[:-2]:
            for parameter in layer.network.network.layers[-1].parameters():
                parameter.zero_()
        sampler.prior.log_degrees_of_freedom.copy_(math.log(nu) + 0.2 * torch.randn(3, generator=draws))
    affine = sampler.flow.layers[-1]
    exact = sampler.prior.degrees_of_freedom.detach(), affine.log_scale.detach(), affine.shift.detach()
    for seed in range(SAMPLES):
        path = gradients("path", sampler, ScaledStudentT(*exact), batch=1, seed=seed)
        assert max(gradient.abs().max() for gradient in path.values()) < 1e-10
    x, log_q = sampler.sample(20, generator(3))
    assert_close(log_q, -ScaledStudentT(*exact)(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in CASES if name != "affine without clamp"])
def test_path_gradient_does_not_vanish_away_from_q_equal_p(name):
    """So that the zeros above mean something: the same flow, other weights in the action.

    Without a clamp the density of other weights may overflow.
    """
    shape, options = CASES[name]
    sampler = stabilised(shape, **options)
    action = FrozenAction(randomised(copy.deepcopy(sampler), seed=4, strength=0.2))
    for seed in range(SAMPLES):
        found = gradients("path", sampler, action, batch=1, seed=seed)
        assert max(gradient.abs().max() for gradient in found.values()) > 1e-2


def test_path_gradient_sees_the_degrees_of_freedom_alone():
    """With another nu in the action every weight has a gradient, and it pulls nu towards the action's."""
    sampler = stabilised((3,), **DENSE)
    for factor, sign in ((4.0, -1), (0.25, 1)):
        action = FrozenAction(sampler)
        action.sampler.prior.log_degrees_of_freedom += math.log(factor)
        found = gradients("path", sampler, action, batch=4000, seed=5)
        assert (sign * found[LOG_NU] > 0).all()


def test_path_gradient_of_a_batch_is_the_mean_of_its_samples():
    sampler, action = stabilised((3,), **DENSE), MultivariateStudentT(3)
    x, _ = sampler.sample(5, generator(6))
    leaf = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad((sampler.log_prob(leaf) + action(leaf)).sum(), leaf)
    parameters = tuple(sampler.parameters())
    single = [torch.autograd.grad((x[i] * slope[i]).sum(), parameters, retain_graph=True) for i in range(5)]
    whole = gradients("path", sampler, action, batch=5, seed=6)
    for gradient, *parts in zip(whole.values(), *single, strict=True):
        assert_close(gradient, sum(parts) / 5, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- the expected gradient


def p_value(values, expected):
    """Return the probability of means `(n, d)` this far from `expected`, a vector or other independent values."""
    values, expected = np.asarray(values), np.asarray(expected)
    difference, covariance, n = values.mean(0), np.cov(values.T) / len(values), len(values)
    if expected.ndim == 2:
        difference, covariance = difference - expected.mean(0), covariance + np.cov(expected.T) / len(expected)
        n = min(n, len(expected))
    else:
        difference = difference - expected
    covariance, d = np.atleast_2d(covariance), len(difference)
    t2 = difference @ np.linalg.solve(covariance, difference)
    return f_distribution.sf(t2 * (n - d) / (d * (n - 1)), d, n - d)


def flat(found):
    return torch.cat([gradient.flatten() for gradient in found.values()])


def estimates(estimator, sampler, action, *, batch, batches, seed):
    found = [gradients(estimator, sampler, action, batch=batch, seed=1000 * seed + i) for i in range(batches)]
    return torch.stack([flat(one) for one in found])


TRANSFORMS = {"affine": {"tau": 1.0}, "spline": {"transform": "spline", "bins": 3, "bound": 2.0}}


@pytest.fixture(scope="module", params=list(TRANSFORMS))
def projected(request):
    """Return projected gradients of each estimator, `(batches, 4)`, in three dimensions.

    The directions are a gradient of a run of its own, where a wrong scale shows best, its part of the degrees of
    freedom, and two at random.
    """
    sampler = stabilised((3,), strength=0.1, layers=3, **DENSE, **TRANSFORMS[request.param])
    action = MultivariateStudentT(3, degrees_of_freedom=2.0)
    pilot = estimates("path", sampler, action, batch=4000, batches=1, seed=9)[0]
    tails = flat({name: torch.full_like(p, name == LOG_NU) for name, p in sampler.named_parameters()}) * pilot
    random = torch.randn(2, len(pilot), generator=generator(10), dtype=torch.float64)
    onto = torch.stack([pilot / pilot.norm(), tails / tails.norm(), *random / math.sqrt(len(pilot))], dim=1)
    return {
        name: estimates(name, sampler, action, batch=500, batches=100, seed=seed).double() @ onto.double()
        for seed, name in enumerate(REVERSE)
    }


@pytest.mark.parametrize(("first", "second"), [REVERSE[:2], REVERSE[1:], REVERSE[::2]])
def test_reverse_estimators_share_their_expected_gradient(projected, first, second):
    assert p_value(projected[first], projected[second]) > FALSE_ALARM


@pytest.mark.parametrize("name", REVERSE)
def test_the_comparison_resolves_a_wrong_scale(projected, name):
    """The power of the test above: a gradient too small by a third would be noticed."""
    other = projected[REVERSE[REVERSE.index(name) - 1]]
    assert p_value(projected[name], 0.67 * other) < FALSE_ALARM


@pytest.mark.parametrize("name", REVERSE)
def test_expected_gradient_of_the_degrees_of_freedom_is_that_of_quadrature(name):
    """`KL(t_nu | t_1)` in one dimension and its derivative by log nu, at nu = 2.5."""
    nu, step = 2.5, 1e-3

    def divergence(log_nu):
        q, p = student(math.exp(log_nu)), student(1.0)
        return 2 * quad(lambda x: q.pdf(x) * (q.logpdf(x) - p.logpdf(x)), 0, np.inf, epsabs=1e-12)[0]

    expected = (divergence(math.log(nu) + step) - divergence(math.log(nu) - step)) / (2 * step)
    sampler = FlowSampler(StudentT((1,), degrees_of_freedom=nu), Sequential())
    found = estimates(name, sampler, MultivariateStudentT(1), batch=2000, batches=50, seed=20)
    assert p_value(found, [expected]) > FALSE_ALARM
    assert p_value(found, [0.8 * expected]) < FALSE_ALARM
