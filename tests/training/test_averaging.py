"""Moving averages of weights: the recursion, and training with them, which goes on bit for bit."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from latticeflow.actions import Action
from latticeflow.flows import ActNorm, ElementwiseAffine, Sequential
from latticeflow.priors import Normal
from latticeflow.samplers import FlowSampler
from latticeflow.training import (
    LikelihoodSettings,
    Trainer,
    TrainingSettings,
    WeightAverage,
    fit,
    held_out_split,
    make_estimator,
    train,
)


class Well(Action):
    """`S = |x - 1|^2`."""

    def __call__(self, field):
        return ((field - 1) ** 2).sum(1)

    def field_shape(self, shape):
        return shape


class Module(nn.Module):
    """A weight, a buffer of floats and two that are none."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        self.register_buffer("scale", torch.tensor(3.0))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("begun", torch.tensor(data=False))


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sampler():
    return FlowSampler(Normal((2,)), Sequential([ElementwiseAffine((2,)), ElementwiseAffine((2,))])).double()


def state(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def averages(history, decay):
    """Return the averages by hand, the first of `history` being the start."""
    values = [history[0]]
    for n, weights in enumerate(history[1:]):
        d = min(decay, (1 + n) / (10 + n))
        values.append({name: d * values[-1][name] + (1 - d) * weights[name] for name in weights})
    return values


# ---------------------------------------------------------------- the recursion


@pytest.mark.parametrize("decay", [0.0, 0.05, 0.3, 0.999])
def test_recursion_with_its_warm_up(decay):
    module = Module()
    average, history = WeightAverage(module, decay), [{"weight": module.weight.detach().clone()}]
    for seed in range(30):
        with torch.no_grad():
            module.weight.copy_(normal(2, seed=seed))
        history.append({"weight": module.weight.detach().clone()})
        average.update(module)
    assert_close(average.weights["weight"], averages(history, decay)[-1]["weight"], rtol=1e-13, atol=1e-13)
    assert average.updates == 30
    assert decay or torch.equal(average.weights["weight"], module.weight)


def test_buffers_are_averaged_if_they_are_floats_and_else_copied():
    module = Module()
    average = WeightAverage(module, 0.999)
    module.scale, module.count, module.begun = torch.tensor(5.0), torch.tensor(100), torch.tensor(data=True)
    average.update(module)
    assert average.weights["scale"].item() == pytest.approx(0.1 * 3 + 0.9 * 5)
    assert average.weights["count"] == 100
    assert average.weights["begun"]
    assert average.weights["count"].dtype == torch.int64
    assert average.weights["begun"].dtype == torch.bool


def test_the_average_is_not_the_module():
    """Neither moves the other, nor do copies."""
    module = Module()
    average = WeightAverage(module, 0.5)
    kept, before = average.copy(), state(module)
    with torch.no_grad():
        module.weight.add_(1)
    assert_same(average.weights, before)
    average.update(module)
    assert_same(kept, before)
    assert not torch.equal(average.weights["weight"], before["weight"])


def test_constant_weights_are_their_average():
    module = Module()
    average = WeightAverage(module, 0.999)
    for _ in range(20):
        average.update(module)
    assert_same(average.weights, module.state_dict())


def test_state_round_trip_continues_bit_for_bit():
    """The state is a copy: what is updated afterwards does not change it."""
    module, first = Module(), WeightAverage(Module(), 0.7)
    for seed in range(5):
        with torch.no_grad():
            module.weight.copy_(normal(2, seed=seed))
        first.update(module)
    saved = first.state_dict()
    before = copy.deepcopy(saved)
    second = WeightAverage(Module(), 0.7)
    second.load_state_dict(saved)
    for seed in range(5, 10):
        with torch.no_grad():
            module.weight.copy_(normal(2, seed=seed))
        first.update(module)
        second.update(module)
    assert_same(second.weights, first.weights)
    assert second.updates == first.updates == 10
    assert_same(saved["weights"], before["weights"])
    assert saved["updates"] == 5


@pytest.mark.parametrize("decay", [1.0, -0.1, 2.0, math.nan])
def test_decays_out_of_range_are_refused(decay):
    with pytest.raises(ValueError, match=f"ema must be at least 0 and below 1, got {decay!r}"):
        WeightAverage(Module(), decay)
    for settings in (TrainingSettings, LikelihoodSettings):
        with pytest.raises(ValueError, match="0 <= ema < 1"):
            settings(ema=decay)


# ---------------------------------------------------------------- training


QUICK = {"steps": 10, "batch": 16, "warmup": 0, "window": 5, "learning_rate": 0.05, "decay": "none"}


def trainer(model=None, *, estimator=None, fine_tuner=None, **settings):
    estimator = estimator or make_estimator("path")
    chosen = TrainingSettings(**{**QUICK, **settings})
    return Trainer(model or sampler(), Well(), estimator, chosen, fine_tuner=fine_tuner)


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_best_weights_are_the_averages_at_the_end_of_a_window(decay):
    run = trainer(ema=decay, steps=10, window=10)
    history, last = [state(run.sampler)], []
    run.run(lambda t, record: (history.append(state(t.sampler)), last.append(state(t.sampler))))
    for name, expected in averages(history, decay)[-1].items():
        assert_close(run.best_weights[name], expected, rtol=1e-12, atol=1e-12)
    assert_same(state(run.sampler), run.best_weights)
    assert any((run.best_weights[name] - last[-1][name]).abs().max() > 1e-3 for name in last[-1])


def test_averages_do_not_change_the_training_itself():
    with_ema, without, paths = trainer(ema=0.9), trainer(), []
    for run in (with_ema, without):
        path = []
        run.run(lambda t, record, path=path: path.append(state(t.sampler)))
        paths.append(path)
    for one, other in zip(*paths, strict=True):
        assert_same(one, other)


def test_an_average_that_forgets_at_once_is_the_last_weights():
    runs = [trainer(ema=0.0), trainer()]
    for run in runs:
        run.run()
    assert_same(runs[0].best_weights, runs[1].best_weights)


@pytest.mark.parametrize("stored", [False, True])
def test_training_continues_bit_for_bit(stored, tmp_path):
    """Ten steps are five, a state and five; the state is taken before the first run goes on."""
    first, kept = trainer(ema=0.8), []

    def keep(t, record):
        if record.step == 5:
            kept.append(t.state_dict())

    first.run(keep)
    saved = kept[0]
    if stored:
        torch.save(saved, tmp_path / "state")
        saved = torch.load(tmp_path / "state", weights_only=True)
    second = trainer(ema=0.8)
    second.load_state_dict(saved)
    second.run()
    assert second.average.updates == first.average.updates == 10
    assert_same(second.average.weights, first.average.weights)
    assert_same(second.best_weights, first.best_weights)
    assert_same(state(second.sampler), state(first.sampler))


def scripted(bad):
    """Return an estimator with the gradient one everywhere and a weight that is no number at the calls in `bad`."""
    calls = []

    def estimate(sampler, action, batch, generator):
        calls.append(batch)
        log_weight = torch.zeros(batch, dtype=torch.float64)
        log_weight[0] = math.nan if len(calls) in bad else 0.0
        return sum(weight.sum() for weight in sampler.parameters()), log_weight

    return estimate


def test_skipped_steps_do_not_update_the_average():
    run, updates, weights = trainer(estimator=scripted({3, 4, 8}), ema=0.9), [], []
    run.run(lambda t, record: (updates.append(t.average.updates), weights.append(t.average.copy())))
    assert [record.skipped for record in run.records] == [step in (3, 4, 8) for step in range(1, 11)]
    assert updates == [1, 2, 2, 2, 3, 4, 5, 5, 6, 7]
    assert_same(weights[3], weights[1])
    assert not torch.equal(weights[4]["flow.layers.0.shift"], weights[3]["flow.layers.0.shift"])


def test_start_from_begins_the_average_anew():
    model = sampler()
    with torch.no_grad():
        [weight.add_(1) for weight in model.parameters()]
    run = trainer(ema=0.9)
    run.start_from(state(model))
    assert run.average.updates == 0
    assert run.average.decay == 0.9
    assert_same(run.average.weights, state(model))


def fit_settings(**changes):
    return LikelihoodSettings(**{"steps": 40, "batch": 64, "learning_rate": 0.05, "evaluate_every": 10, **changes})


def test_fits_evaluate_and_keep_the_averages():
    """The held-out losses are those of the averages of a run that knows none, step by step."""
    data, model, history, decay = 3 + normal(400, 2), sampler(), [], 0.8
    for steps in range(41):
        plain = sampler()
        fit(plain, data, settings=fit_settings(steps=steps, evaluate_every=max(1, steps), decay="none"))
        history.append(state(plain))
    records = fit(model, data, settings=fit_settings(ema=decay, decay="none"))
    expected = averages(history, decay)
    held_out = data[held_out_split(400, validation=0.2, seed=0)[1]]
    judge = sampler()
    for record in records:
        judge.load_state_dict(expected[record.step])
        assert record.held_out == pytest.approx(-judge.log_prob(held_out).mean().item(), abs=1e-10)
    best = min(records, key=lambda record: record.held_out).step
    for name, value in state(model).items():
        assert_close(value, expected[best][name], rtol=1e-12, atol=1e-12)
    assert best > 0


def test_fits_with_averages_train_on_as_without():
    """Evaluations put the last weights back, the flag of a normalisation with them."""
    data, losses = 3 + normal(400, 2), []
    for ema in (None, 0.9):
        model = FlowSampler(Normal((2,)), Sequential([ElementwiseAffine((2,)), ActNorm((2,))])).double()
        records = fit(model, data, settings=fit_settings(ema=ema))
        losses.append([record.loss for record in records[1:]])
    assert losses[0] == losses[1]


# ---------------------------------------------------------------- stages


def spy(name, seen):
    inner = make_estimator("path")

    def estimate(*args):
        seen.append(name)
        return inner(*args)

    return estimate


@pytest.mark.parametrize(("fine_tuning", "first"), [(1 / 3, 8), (0.5, 6), (0.0, 12), (1.0, 0)])
def test_the_last_part_of_the_steps_is_by_the_fine_tuner(fine_tuning, first):
    seen = []
    run = trainer(
        estimator=spy("first", seen), fine_tuner=spy("second", seen), steps=12, accumulate=2, fine_tuning=fine_tuning
    )
    run.run()
    assert seen == ["first"] * (2 * first) + ["second"] * (2 * (12 - first))


def test_without_a_fine_tuner_there_is_one_stage():
    seen = []
    run = trainer(estimator=spy("first", seen), steps=12, fine_tuning=0.5, fine_tuning_rate=1e-4)
    run.run()
    assert seen == ["first"] * 12
    assert run.records[-1].learning_rate == pytest.approx(0.05)


def test_the_second_stage_has_a_learning_rate_of_its_own():
    """Its warm-up and decay begin anew; without `fine_tuning_rate` those of all steps go on."""
    settings = {"steps": 12, "fine_tuning": 0.5, "warmup": 2, "decay": "cosine"}
    for own in (0.01, None):
        run = trainer(fine_tuner=make_estimator("path"), fine_tuning_rate=own, **settings)
        run.run()
        rates = [record.learning_rate for record in run.records]
        if own is None:
            expected = [run.settings.rate(step, 12) for step in range(12)]
        else:
            one = [run.settings.rate(step, 6) for step in range(6)]
            expected = [*one, *(own / 0.05 * rate for rate in one)]
        assert rates == pytest.approx(expected)


def test_stages_continue_bit_for_bit_from_a_state_before_the_switch():
    settings, target = {"steps": 12, "ema": 0.8, "fine_tuning_rate": 0.01}, lambda n, g=None: normal(n, 2) + 1
    chosen = make_estimator("denoising", target=target, noise=0.2)
    runs = [trainer(estimator=chosen, fine_tuner=make_estimator("reinforce"), **settings) for _ in range(2)]
    kept = []
    runs[0].run(lambda t, record: kept.append(t.state_dict()) if record.step == 5 else None)
    runs[1].load_state_dict(kept[0])
    runs[1].run()
    assert_same(state(runs[1].sampler), state(runs[0].sampler))
    assert [record.loss for record in runs[1].records] == [record.loss for record in runs[0].records]


def test_train_takes_a_fine_tuning_estimator_by_name():
    model, other = sampler(), sampler()
    settings = {**QUICK, "steps": 12, "fine_tuning": 0.5}
    records = train(model, Well(), "reinforce", fine_tuning_estimator="path", **settings)
    run = trainer(other, estimator=make_estimator("reinforce"), fine_tuner=make_estimator("path"), **settings)
    run.run()
    assert [record.loss for record in records] == [record.loss for record in run.records]
    assert_same(state(model), state(other))


@pytest.mark.parametrize("name", ["forward_kl", "sliced"])
def test_fine_tuning_needs_no_samples(name):
    with pytest.raises(ValueError, match=f"{name} needs target"):
        train(sampler(), Well(), fine_tuning_estimator=name, **QUICK)
