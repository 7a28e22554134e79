"""Maximum likelihood: it finds the moments, stops in time, keeps the best weights and never sees what is held out."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from latticeflow.flows import ActNorm, ElementwiseAffine, Sequential, autoregressive_flow
from latticeflow.priors import Normal
from latticeflow.samplers import FlowSampler
from latticeflow.training import LikelihoodSettings, TrainingError, fit, held_out_split


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def gaussian(n, seed=1):
    """Return samples of mean (3, -1) and width (0.5, 2)."""
    return normal(n, 2, seed=seed) * torch.tensor([0.5, 2.0]).double() + torch.tensor([3.0, -1.0]).double()


def affine(shape=(2,), sampler=FlowSampler):
    return sampler(Normal(shape), ElementwiseAffine(shape)).double()


def network(seed=1, layers=()):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        blocks = autoregressive_flow((2,), blocks=2, hidden=(30,))
    return FlowSampler(Normal((2,)), Sequential([blocks, *layers])).double()


def settings(**changes):
    return LikelihoodSettings(**{"steps": 400, "batch": 10**6, "learning_rate": 0.03, "patience": 100, **changes})


def split(n, chosen):
    return held_out_split(n, validation=chosen.validation, seed=chosen.seed)


def weights(sampler):
    return torch.cat([value.flatten().double() for value in sampler.state_dict().values()])


# ---------------------------------------------------------------- what it finds


def test_recovers_the_moments_of_a_gaussian():
    """Those of the training part to 1e-3, as far as the optimiser goes; the true ones to five standard errors."""
    data, sampler, n = gaussian(4000), affine(), 3200
    fit(sampler, data, settings=settings(steps=800, learning_rate=0.05, evaluate_every=800))
    training = data[split(4000, settings())[0]]
    shift, width = sampler.flow.shift.detach(), sampler.flow.log_scale.detach().exp()
    assert_close(shift, training.mean(0), rtol=0, atol=1e-3)
    assert_close(width, training.std(0, unbiased=False), rtol=1e-3, atol=0)
    truth = torch.tensor([[3.0, -1.0], [0.5, 2.0]]).double()
    assert ((shift - truth[0]).abs() < 5 * truth[1] / math.sqrt(n)).all()
    assert ((width - truth[1]).abs() < 5 * truth[1] / math.sqrt(2 * n)).all()


def test_small_batches_find_them_too():
    data, sampler = gaussian(4000), affine()
    fit(sampler, data, settings=settings(batch=100, steps=800))
    assert_close(sampler.flow.shift.detach(), data.mean(0), rtol=0, atol=0.1)
    assert_close(sampler.flow.log_scale.detach(), data.std(0).log(), rtol=0, atol=0.05)


def test_recovers_a_correlation():
    """The held-out loss comes down to the entropy, `log(2 pi e) + log(0.3)` for x_2 = x_1 + 0.3 noise."""
    data = normal(2000, 2)
    data[:, 1] = data[:, 0] + 0.3 * data[:, 1]
    records = fit(network(), data, settings=settings(steps=300, learning_rate=0.01))
    entropy = math.log(2 * math.pi * math.e) + math.log(0.3)
    assert min(record.held_out for record in records) == pytest.approx(entropy, abs=0.15)
    assert records[0].held_out > entropy + 0.5


def repetitions(data, times, part):
    return data[part].repeat_interleave(times[part], dim=0)


def test_weights_act_as_repetitions():
    """The losses to rounding, and the moments, those of the training part with every sample repeated."""
    data, chosen, sampler = gaussian(600), settings(), affine()
    times = torch.randint(0, 5, (600,), generator=generator(2))
    present = data[times > 0]
    training, held_out = (repetitions(present, times[times > 0], part) for part in split(len(present), chosen))
    start, first = (-sampler.log_prob(part).mean().item() for part in (held_out, training))
    records = fit(sampler, data, weights=0.7 * times.double(), settings=settings(steps=1))
    assert records[0].held_out == pytest.approx(start, abs=1e-12)
    assert records[1].loss == pytest.approx(first, abs=1e-12)
    fit(sampler, data, weights=times, settings=settings(steps=800, learning_rate=0.05, evaluate_every=800))
    assert_close(sampler.flow.shift.detach(), training.mean(0), rtol=0, atol=1e-3)
    assert_close(sampler.flow.log_scale.detach(), training.std(0, unbiased=False).log(), rtol=0, atol=1e-3)
    assert (training.mean(0) - present.mean(0)).abs().max() > 0.02


def test_weights_of_small_batches_are_unbiased():
    """Weights that differ by 100: a ratio of sums in each batch would be far off."""
    data = torch.cat([gaussian(1000), -gaussian(1000, seed=2)])
    one = torch.cat([torch.ones(1000), torch.full((1000,), 0.01)])
    sampler = affine()
    fit(sampler, data, weights=one, settings=settings(batch=4, steps=3000, learning_rate=0.01))
    mean = (one[:, None] * data).sum(0) / one.sum()
    assert_close(sampler.flow.shift.detach(), mean, rtol=0, atol=0.1)


# ---------------------------------------------------------------- stopping, and what is held out


def test_early_stopping_restores_the_best_weights():
    """A network that learns 40 samples by heart: the held-out loss falls, then rises."""
    data, sampler = gaussian(50), network()
    chosen = settings(learning_rate=0.01, evaluate_every=10, patience=5, steps=2000, decay="none")
    records = fit(sampler, data, settings=chosen)
    losses = [record.held_out for record in records]
    best = losses.index(min(losses))
    assert 0 < best < len(losses) - 1
    assert records[-1].step == records[best].step + 50 < 2000
    assert losses[-1] > losses[best] + 0.05
    held_out = data[split(50, chosen)[1]]
    assert -sampler.log_prob(held_out).mean().item() == pytest.approx(losses[best], abs=1e-12)


def test_training_that_only_harms_leaves_the_weights_as_they_were():
    sampler = affine()
    before = weights(sampler)
    records = fit(sampler, normal(500, 2), settings=settings(learning_rate=50.0, steps=30, evaluate_every=10))
    assert min(record.held_out for record in records[1:]) > records[0].held_out
    assert torch.equal(weights(sampler), before)


def losses_with(data, layers=()):
    """Return the loss of every batch, which tells the weights that every step began with."""
    sampler = network(layers=layers)
    records = fit(sampler, data, settings=settings(steps=40, batch=32, evaluate_every=1, learning_rate=0.01))
    return [record.loss for record in records[1:]], [record.held_out for record in records]


@pytest.mark.parametrize("layers", [[], [ActNorm]])
def test_held_out_samples_do_not_move_the_weights(layers):
    """Nor by way of an ActNorm, which takes its scale from the first batch it sees in training mode."""
    chosen, data = settings(), gaussian(200)
    other_held_out, other_training = data.clone(), data.clone()
    training, held_out = split(200, chosen)
    other_held_out[held_out] += 7.0
    other_training[training[0]] += 7.0
    (losses, on), (same, off), (different, _) = (
        losses_with(one, [layer((2,)) for layer in layers]) for one in (data, other_held_out, other_training)
    )
    assert losses == same
    assert min(b - a for a, b in zip(on, off, strict=True)) > 1
    assert losses != different


class Recording(FlowSampler):
    """Keeps the fields whose density it was asked for, in training mode and out of it."""

    def __init__(self, prior, flow):
        super().__init__(prior, flow)
        self.seen = {True: [], False: []}

    def log_prob(self, x):
        self.seen[self.training].append(x)
        return super().log_prob(x)


def test_batches_take_every_training_sample_once_in_an_epoch():
    data = torch.arange(100).double()[:, None] / 100
    sampler, chosen = affine((1,), Recording), settings(batch=25, steps=6, evaluate_every=3)
    fit(sampler, data, settings=chosen)
    training, held_out = ({100 * value for value in data[part].flatten().tolist()} for part in split(100, chosen))
    batches = [[100 * value for value in one.flatten().tolist()] for one in sampler.seen[True]]
    assert [len(batch) for batch in batches] == [25] * 6
    for epoch in (batches[:3], batches[3:]):
        drawn = [value for batch in epoch for value in batch]
        assert len(set(drawn)) == 75
        assert set(drawn) <= training
    assert batches[:3] != batches[3:]
    assert len(training) == 80
    evaluated = [{100 * value for value in one.flatten().tolist()} for one in sampler.seen[False]]
    assert evaluated == [held_out] * 3


def test_a_large_held_out_part_is_evaluated_in_pieces():
    data, sampler = gaussian(20000), affine((2,), Recording)
    records = fit(sampler, data, settings=settings(steps=0, validation=0.5))
    assert len(sampler.seen[False]) == 3
    expected = -sampler.log_prob(data[split(20000, settings(validation=0.5))[1]]).mean()
    assert records[0].held_out == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize("validation", [0.2, 0.5])
def test_split_is_a_partition(validation):
    training, held_out = held_out_split(1000, validation=validation, seed=3)
    assert sorted([*training.tolist(), *held_out.tolist()]) == list(range(1000))
    assert len(held_out) == 1000 * validation
    assert held_out.tolist() != sorted(held_out.tolist())
    assert not torch.equal(held_out, held_out_split(1000, validation=validation, seed=4)[1])


# ---------------------------------------------------------------- the same again


def test_the_seed_decides_everything():
    data, chosen = gaussian(300), settings(steps=30, batch=40, learning_rate=0.01)
    found = []
    for global_seed, one in ((1, chosen), (2, chosen), (1, settings(steps=30, batch=40, learning_rate=0.01, seed=1))):
        sampler = network()
        with torch.random.fork_rng():
            torch.manual_seed(global_seed)
            before = torch.random.get_rng_state()
            fit(sampler, data, settings=one)
            assert torch.equal(torch.random.get_rng_state(), before)
        found.append(weights(sampler))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_dtype_are_those_of_the_sampler(training):
    sampler = affine().float().train(training)
    fit(sampler, gaussian(100), settings=settings(steps=2))
    assert sampler.training == sampler.flow.training == training
    assert sampler.flow.shift.dtype == torch.float32
    assert sampler.flow.shift.abs().max() > 0


# ---------------------------------------------------------------- settings at work


def test_records_are_one_for_each_evaluation():
    records = fit(affine(), gaussian(100), settings=settings(steps=25, evaluate_every=10, learning_rate=0.1))
    assert [record.step for record in records] == [0, 10, 20, 25]
    assert math.isnan(records[0].loss)
    assert [record.loss for record in records[1:]] == sorted((record.loss for record in records[1:]), reverse=True)
    assert [record.skipped for record in records] == [0] * 4
    expected = [0.05 * (1 + math.cos(math.pi * step / 25)) for step in (0, 10, 20, 25)]
    assert [record.learning_rate for record in records] == pytest.approx(expected)
    assert records[-1].seconds > records[0].seconds > 0


def test_learning_rate_without_decay():
    records = fit(affine(), gaussian(100), settings=settings(steps=20, evaluate_every=10, decay="none"))
    assert [record.learning_rate for record in records] == [0.03, 0.03, 0.0]


def moved(**changes):
    sampler = affine()
    fit(sampler, gaussian(200), settings=settings(**{"steps": 50, "evaluate_every": 50, "decay": "none", **changes}))
    return sampler.flow.shift.detach()


def test_steps_follow_the_learning_rate():
    """Adam's first steps have its length."""
    assert_close(moved(steps=1), torch.tensor([0.03, -0.03]).double(), rtol=1e-5, atol=0)


def test_gradient_clip_bounds_the_gradient():
    """Far below Adam's epsilon of 1e-8, the step is `learning_rate clip / epsilon` at most."""
    assert moved(gradient_clip=1e-12, steps=1).abs().max() < 0.03 * 1.01e-4
    assert moved(gradient_clip=1e-12, steps=1).abs().max() > 0.03 * 1e-5
    assert torch.equal(moved(gradient_clip=1e9), moved())


def test_weight_decay_pulls_to_zero():
    assert moved()[0] > 1
    assert moved(weight_decay=1e3)[0].abs() < 0.5


# ---------------------------------------------------------------- bad steps


class Faulty(FlowSampler):
    """NaN in the training steps `bad`, counted from 1, or in every evaluation."""

    bad = range(0)
    blind = False

    def __init__(self, prior, flow):
        super().__init__(prior, flow)
        self.calls = 0

    def log_prob(self, x):
        self.calls += self.training
        bad = self.calls in self.bad if self.training else self.blind
        return super().log_prob(x) * (math.nan if bad else 1.0)


def test_bad_steps_are_skipped_and_counted():
    sampler = affine((2,), Faulty)
    sampler.bad = range(3, 22)
    records = fit(sampler, gaussian(200), settings=settings(steps=30, evaluate_every=10, decay="none"))
    assert [record.skipped for record in records] == [0, 8, 10, 1]
    assert [math.isnan(record.loss) for record in records] == [True, False, True, False]
    assert records[1].held_out == records[2].held_out
    eleven = affine()
    fit(eleven, gaussian(200), settings=settings(steps=11, evaluate_every=11, decay="none"))
    assert_close(weights(sampler), weights(eleven), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("learning_rate", "best"), [(0.03, 12), (50.0, 0)])
def test_twenty_bad_steps_in_a_row_end_it_with_the_best_weights(learning_rate, best):
    """With a large rate they are those before training, else the last, evaluated while steps were skipped."""
    sampler, short = affine((2,), Faulty), affine()
    sampler.bad = range(13, 100)
    chosen = {"evaluate_every": 10, "decay": "none", "learning_rate": learning_rate}
    with pytest.raises(TrainingError, match=r"step 32: 20 steps in a row .* lower learning_rate \([05]"):
        fit(sampler, normal(200, 2) + 1, settings=settings(steps=60, **chosen))
    fit(short, normal(200, 2) + 1, settings=settings(steps=best, **chosen))
    assert_close(weights(sampler), weights(short), rtol=0, atol=1e-12)


def test_a_gradient_that_is_not_finite_is_a_bad_step():
    class Root(nn.Module):
        """A loss that is finite at 0 while its slope is not."""

        def __init__(self):
            super().__init__()
            self.parameter = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def sample(self, n, generator):
            return torch.zeros(n, 1), torch.zeros(n)

        def log_prob(self, x):
            return -self.parameter.abs().sqrt() + 0 * x[:, 0]

    with pytest.raises(TrainingError, match="step 20: 20 steps in a row"):
        fit(Root(), normal(50, 1), settings=settings())


def test_a_held_out_loss_that_is_never_finite_is_told():
    sampler = affine((2,), Faulty)
    sampler.blind = True
    before = weights(sampler)
    with pytest.raises(TrainingError, match="held-out samples was never finite"):
        fit(sampler, gaussian(200), settings=settings(steps=30, evaluate_every=10, patience=2))
    assert torch.equal(weights(sampler), before)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": -1}, "needs steps >= 0; got LikelihoodSettings"),
        ({"batch": 0}, "needs batch >= 1"),
        ({"evaluate_every": 0}, "needs evaluate_every >= 1"),
        ({"patience": 0}, "needs patience >= 1"),
        ({"seed": -1}, "needs seed >= 0"),
        ({"learning_rate": 0.0}, "needs 0 < learning_rate < inf"),
        ({"learning_rate": math.nan}, "needs 0 < learning_rate < inf"),
        ({"validation": 0.0}, "needs 0 < validation < 1"),
        ({"validation": 1.0}, "needs 0 < validation < 1"),
        ({"weight_decay": -1e-3}, "needs 0 <= weight_decay < inf"),
        ({"gradient_clip": 0.0}, "needs gradient_clip > 0"),
        ({"decay": "linear"}, "needs decay 'cosine' or 'none'"),
        ({"steps": -1, "batch": 0}, "needs steps >= 0, batch >= 1"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LikelihoodSettings(**changes)


def spoiled(value):
    data = gaussian(100)
    data[37, 1] = value
    return data


def weighted(index, value):
    one = torch.ones(100)
    one[index] = value
    return one


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (spoiled(math.nan), {}, "data must be finite, sample 37 is not"),
        (spoiled(-math.inf), {}, "data must be finite, sample 37 is not"),
        (normal(100, 3), {}, r"data have shape \(100, 3\), the sampler draws \(n, 2\)"),
        (normal(100), {}, r"data have shape \(100,\), the sampler draws \(n, 2\)"),
        (normal(100, 2, 1), {}, r"data have shape \(100, 2, 1\), the sampler draws \(n, 2\)"),
        (gaussian(7), {}, r"validation = 0.2 splits 7 samples of positive weight into 6 to train on and 1 held out"),
        (gaussian(3), {"settings": settings(validation=0.8)}, "into 1 to train on and 2 held out, expected at least 2"),
        (gaussian(0), {}, "splits 0 samples"),
        (gaussian(100), {"weights": (torch.arange(100) < 5).double()}, "splits 5 samples of positive weight into 4"),
        (gaussian(100), {"weights": torch.ones(99)}, r"weights have shape \(99,\), expected \(100,\)"),
        (gaussian(100), {"weights": torch.ones(100, 1)}, r"weights have shape \(100, 1\), expected \(100,\)"),
        (gaussian(100), {"weights": weighted(8, -0.5)}, "not negative, number 8 is -0.5"),
        (gaussian(100), {"weights": weighted(9, math.nan)}, "must be finite and not negative, number 9 is nan"),
        (gaussian(100), {"weights": weighted(9, math.inf)}, "must be finite and not negative, number 9 is inf"),
        (gaussian(100), {"weights": torch.zeros(100)}, "weights must not all be zero"),
    ],
)
def test_data_that_cannot_be_fitted_are_refused(data, options, message):
    sampler = affine()
    with pytest.raises(ValueError, match=message):
        fit(sampler, data, **options)
    assert not weights(sampler).any()


def test_a_sampler_without_parameters_is_refused():
    with pytest.raises(ValueError, match="no parameters to fit"):
        fit(FlowSampler(Normal((2,)), Sequential()), gaussian(100))
