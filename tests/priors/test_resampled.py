"""The resampled prior: a normalised density, draws that follow it, limits, and training.

Statistical tests have fixed seeds and p-values above 1e-6, so each is a false alarm with that probability.
"""

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats

from latticeflow.flows import Sequential
from latticeflow.priors import Normal, Prior, Resampled, StudentT
from latticeflow.samplers import FlowSampler

LEAST = 1e-6
SAMPLES = 40_000


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def bumpy(truncation=100, *, shift=-7.0, seed=1, hidden=(16, 16), **settings):
    """A prior whose acceptance varies from nearly 0 to nearly 1."""
    prior = Resampled(Normal((2,)), truncation=truncation, hidden=hidden, **settings).double()
    with torch.no_grad():
        for i, layer in enumerate(module for module in prior.network if isinstance(module, torch.nn.Linear)):
            layer.weight.copy_(1.5 * torch.randn(layer.weight.shape, generator=seeded(seed + i), dtype=torch.float64))
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=seeded(seed + 7 + i), dtype=torch.float64))
        prior.network[-1].weight.mul_(0.4)
        prior.network[-1].bias.add_(shift)
    return prior


def constant(logit, *, truncation=100):
    prior = Resampled(Normal((2,)), truncation=truncation, hidden=(4,)).double()
    with torch.no_grad():
        prior.network[-1].weight.zero_()
        prior.network[-1].bias.fill_(logit)
    return prior


def grid(cells, side=6.0):
    """Midpoints of square cells, `(cells^2, 2)`, and the area of a cell."""
    edges = torch.linspace(-side, side, 2 * cells + 1, dtype=torch.float64)
    return torch.cartesian_prod(edges[1::2], edges[1::2]), (2 * side / cells) ** 2


@torch.no_grad()
def by_trials(prior, z):
    """The density by the law of total probability, Z from a grid: accepted in trial 1, 2, ..., T - 1, or the last."""
    points, area = grid(600)
    a = torch.sigmoid(prior.network(points)[:, 0])
    rejected = 1 - float((a * prior.base.log_prob(points).exp()).sum() * area)
    accept, before = torch.sigmoid(prior.network(z)[:, 0]), 1.0
    total = torch.zeros(len(z), dtype=torch.float64)
    for _ in range(prior.truncation - 1):
        total, before = total + before * accept, before * rejected
    return (total + before) * prior.base.log_prob(z).exp(), 1 - rejected


# ---------------------------------------------------------------- density


@pytest.mark.parametrize(("truncation", "shift"), [(2, -6.0), (5, -8.0), (100, -6.0), (100, -10.0), (3000, -10.0)])
def test_density_integrates_to_one(truncation, shift):
    prior = bumpy(truncation, shift=shift)
    error = prior.normalise(2**21)
    points, area = grid(400)
    with torch.no_grad():
        total = float(prior.log_prob(points).exp().sum() * area)
    assert abs(total - 1) < 2e-3
    assert abs(total - 1) < 4.9 * error


@pytest.mark.parametrize(("truncation", "shift"), [(2, -6.0), (5, -8.0), (100, -10.0)])
def test_density_is_that_of_the_trials(truncation, shift):
    """Also the closed form, `(1 - alpha) a / Z + alpha`."""
    prior = bumpy(truncation, shift=shift)
    error = prior.normalise(2**18)
    z = 1.5 * torch.randn(50, 2, dtype=torch.float64, generator=seeded(3))
    exact, mean = by_trials(prior, z)
    with torch.no_grad():
        found = prior.log_prob(z).exp()
        a = torch.sigmoid(prior.network(z)[:, 0])
    torch.testing.assert_close(found, exact, rtol=5 * error, atol=0)
    alpha = (1 - mean) ** (truncation - 1)
    closed = ((1 - alpha) * a / mean + alpha) * prior.base.log_prob(z).exp()
    torch.testing.assert_close(closed, exact, rtol=1e-9, atol=0)
    assert float(exact.max() / exact.min()) > 5


def test_the_error_that_is_stated_is_the_spread_of_the_estimates():
    """200 estimates against the grid: chi^2 with 200 degrees of freedom, two-sided."""
    prior = bumpy(shift=-8.0)
    _, exact = by_trials(prior, torch.zeros(1, 2, dtype=torch.float64))
    pulls = []
    for seed in range(200):
        error = prior.normalise(2000, seeded(seed))
        pulls.append((-math.expm1(float(prior.log_rejection)) / exact - 1) / error)
        assert float(prior.relative_error) == error
    assert LEAST < stats.chi2.cdf(float(np.square(pulls).sum()), 200) < 1 - LEAST


@pytest.mark.parametrize("shape", [(1,), (3, 4), (2, 2, 2)])
def test_fields_of_any_shape(shape):
    prior = Resampled(StudentT(shape, degrees_of_freedom=5.0), hidden=(8,), truncation=10)
    x = prior.sample(6, seeded(1))
    prior.normalise(100)
    assert x.shape == (6, *shape)
    assert not x.requires_grad
    assert prior.log_prob(x).shape == (6,)
    assert prior.log_prob(x).dtype == torch.float64


# ---------------------------------------------------------------- draws


def chi_squared(prior, drawn):
    """The p-value of the counts on 40x40 cells, each integrated by 4x4 points; rare cells are one cell."""
    points, area = grid(160)
    with torch.no_grad():
        mass = (prior.log_prob(points).exp() * area).reshape(40, 4, 40, 4).sum((1, 3)).numpy().ravel()
    edges = np.linspace(-6, 6, 41)
    counts = np.histogram2d(*drawn.numpy().T, bins=(edges, edges))[0].ravel()
    often = mass * len(drawn) > 10
    counts = np.append(counts[often], len(drawn) - counts[often].sum())
    expected = len(drawn) * np.append(mass[often], mass.sum() - mass[often].sum()) / mass.sum()
    return stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), len(counts) - 1)


@pytest.mark.parametrize(("truncation", "shift"), [(2, -6.0), (4, -8.0), (100, -10.0)])
def test_draws_follow_the_density(truncation, shift):
    """And neither the base nor the density of another truncation."""
    prior = bumpy(truncation, shift=shift)
    prior.normalise(2**18)
    drawn = prior.sample(SAMPLES, seeded(4))
    assert chi_squared(prior, drawn) > LEAST
    assert chi_squared(prior.base, drawn) < LEAST
    other = bumpy(3 if truncation == 2 else 2, shift=shift)
    other.normalise(2**18)
    assert chi_squared(other, drawn) < LEAST


def test_trials_stop_at_the_truncation():
    """An acceptance of nearly 0: every draw is the last of T."""
    calls = []

    class Counting(Normal):
        def sample(self, n, generator=None):
            calls.append(n)
            return super().sample(n, generator)

    prior = Resampled(Counting((2,)), truncation=7, hidden=(4,))
    with torch.no_grad():
        prior.network[-1].bias.fill_(-80.0)
    calls.clear()
    assert prior.sample(11, seeded(1)).shape == (11, 2)
    assert calls == [11] * 7


# ---------------------------------------------------------------- limits


def test_truncation_at_one_is_the_base():
    prior = bumpy(1)
    x = prior.sample(100, seeded(5))
    assert torch.equal(x, prior.base.sample(100, seeded(5)))
    assert torch.equal(prior.log_prob(x), prior.base.log_prob(x))


@pytest.mark.parametrize("logit", [-800.0, -40.0, -3.0, 0.0, 3.0, 40.0, 800.0])
@pytest.mark.parametrize("truncation", [2, 100])
def test_a_constant_acceptance_gives_the_base(truncation, logit):
    """Up to Z = 1 and down to Z = 0 without a loss of digits, and with finite gradients."""
    prior = constant(logit, truncation=truncation)
    x = prior.base.sample(100, seeded(6))
    found = prior.log_prob(x)
    torch.testing.assert_close(found, prior.base.log_prob(x), rtol=1e-12, atol=1e-12)
    found.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in prior.network.parameters())
    prior.normalise(100)
    torch.testing.assert_close(prior.log_prob(x), prior.base.log_prob(x), rtol=1e-12, atol=1e-12)


def test_it_accepts_everything_at_z_of_one():
    prior = constant(40.0)
    assert torch.equal(prior.sample(100, seeded(7)), prior.base.sample(100, seeded(7)))


def test_at_first_it_is_nearly_the_base():
    prior = Resampled(Normal((4,)))
    x = prior.sample(200, seeded(8))
    prior.normalise(1000)
    with torch.no_grad():
        assert 0 < (prior.log_prob(x) - prior.base.log_prob(x)).abs().max() < 0.02


# ---------------------------------------------------------------- training and evaluation


def test_training_uses_fresh_draws_and_evaluation_fixed_ones():
    prior, x = bumpy(samples=64), torch.zeros(1, 2, dtype=torch.float64)
    first, second = prior.log_prob(x), prior.log_prob(x)
    assert first != second
    assert first.requires_grad
    with torch.no_grad():
        fixed = prior.log_prob(x)
        assert fixed == prior.log_prob(x)
    prior.eval()
    assert prior.log_prob(x) == fixed
    torch.testing.assert_close(first.detach(), fixed, rtol=0, atol=0.5)


def test_training_discards_what_was_fixed():
    prior, x = bumpy(), torch.zeros(1, 2, dtype=torch.float64)
    prior.normalise(1000)
    assert not prior.training
    assert prior.log_rejection.isfinite()
    prior.train().log_prob(x)
    assert prior.log_rejection.isnan()
    assert prior.relative_error.isnan()


def test_the_estimates_of_training_are_continued_from_a_checkpoint():
    prior, x = bumpy(samples=64), torch.zeros(1, 2, dtype=torch.float64)
    prior.log_prob(x)
    resumed = bumpy(samples=64, seed=5)
    resumed.load_state_dict(copy.deepcopy(prior.state_dict()))
    for _ in range(3):
        assert resumed.log_prob(x) == prior.log_prob(x)


def test_estimates_leave_the_global_state_alone():
    prior, x = bumpy(), torch.zeros(1, 2, dtype=torch.float64)
    before = torch.random.get_rng_state()
    prior.log_prob(x)
    prior.normalise(100)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_state_has_the_normalisation():
    prior, x = bumpy(), torch.zeros(3, 2, dtype=torch.float64)
    prior.normalise(500, seeded(9))
    other = bumpy(seed=4)
    other.load_state_dict(prior.state_dict())
    assert torch.equal(other.eval().log_prob(x), prior.log_prob(x))
    assert {"log_rejection", "relative_error", "estimates"} <= prior.state_dict().keys()
    prior.normalise(500, seeded(10))
    assert not torch.equal(other.log_prob(x), prior.log_prob(x))


def test_gradient_of_training_is_that_of_the_exact_density():
    """Along the last weights, Z from a grid, within 4.9 errors of 200 estimates and what their bias may be."""
    prior = bumpy(20, shift=-8.0, samples=4096)
    x = prior.sample(500, seeded(11))
    weight = prior.network[-1].weight
    slopes = [
        float((torch.autograd.grad(prior.log_prob(x).mean(), weight)[0] * weight.detach()).sum()) for _ in range(200)
    ]
    values, step = [], 1e-4
    for factor in (1 + step, (1 - step) / (1 + step)):
        with torch.no_grad():
            weight.mul_(factor)
            values.append(float(by_trials(prior, x)[0].log().mean()))
    exact, error = (values[0] - values[1]) / (2 * step), np.std(slopes) / math.sqrt(200)
    assert abs(np.mean(slopes) - exact) < 4.9 * error + 2 / 4096
    assert abs(exact) > 20 * error


def test_maximum_likelihood_learns_two_modes():
    """Two Gaussians at -1.5 and 1.5 under a normal base: far above the base, and below the truth."""
    torch.manual_seed(12)
    signs = 2.0 * torch.randint(0, 2, (6000, 1), generator=seeded(13)) - 1
    centres = signs * torch.tensor([1.5, 0.0], dtype=torch.float64)
    data = centres + 0.4 * torch.randn(6000, 2, dtype=torch.float64, generator=seeded(14))
    train, test = data[:4000], data[4000:]
    prior = Resampled(Normal((2,)), hidden=(32, 32), samples=512)
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2)
    for step in range(300):
        optimizer.zero_grad()
        (-prior.log_prob(train[torch.randint(0, 4000, (256,), generator=seeded(step))]).mean()).backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in prior.parameters())
        optimizer.step()
    prior.normalise(2**16)
    parts = [stats.multivariate_normal((s, 0), 0.16).pdf(test.numpy()) for s in (-1.5, 1.5)]
    truth, base = np.log(np.mean(parts, axis=0)).mean(), float(prior.base.log_prob(test).mean())
    with torch.no_grad():
        found = float(prior.log_prob(test).mean())
    assert base + 0.8 * (truth - base) < found < truth + 0.05
    drawn = prior.sample(4000, seeded(15))
    assert 0.4 < float((drawn[:, 0] > 0).double().mean()) < 0.6
    assert float((drawn[:, 0].abs() < 0.5).double().mean()) < 0.06


def test_gradients_reach_the_base():
    prior = Resampled(StudentT((2,), degrees_of_freedom=4.0), hidden=(8,))
    prior.log_prob(prior.sample(20, seeded(16))).sum().backward()
    assert prior.base.log_degrees_of_freedom.grad.abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_a_flow_sampler(dtype):
    sampler = FlowSampler(bumpy(), Sequential()).to(dtype)
    sampler.prior.normalise(1000)
    with torch.no_grad():
        x, log_q = sampler.sample(8, seeded(17))
        assert x.dtype == dtype
        assert log_q.dtype == torch.float64
        assert torch.equal(sampler.log_prob(x), log_q)
    assert isinstance(sampler.prior, Prior)
    assert "prior.log_rejection" in sampler.state_dict()


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"truncation": 0}, "truncation must be an integer of at least 1, got 0"),
        ({"truncation": 2.5}, "truncation must be an integer of at least 1, got 2.5"),
        ({"hidden": (8, 0)}, "hidden must be an integer of at least 1, got 0"),
        ({"samples": 1}, "samples must be an integer of at least 2, got 1"),
    ],
)
def test_bad_arguments_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Resampled(Normal((2,)), **settings)


def test_too_few_samples_for_the_normalisation_are_named():
    with pytest.raises(ValueError, match="samples must be an integer of at least 2, got 1"):
        bumpy().normalise(1)
