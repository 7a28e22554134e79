"""Schedules of parts: whose turn it is, and that one part is the same as none, bit for bit."""

import math
from dataclasses import asdict

import pytest
import torch

from latticeflow.actions import ScalarAction
from latticeflow.flows import coupling_flow
from latticeflow.priors import Normal
from latticeflow.samplers import FlowSampler, PartwiseSampler
from latticeflow.training import LikelihoodSettings, Trainer, TrainingSettings, fit, make_estimator, train
from latticeflow.training.schedule import SCHEDULES, Optimizers, Schedule

SHAPE, ACTION = (4, 4), ScalarAction(-4.0, 8.0)
REVERSE = ("reinforce", "reparametrisation", "path")
QUICK = {"batch": 16, "window": 3, "warmup": 0, "learning_rate": 3e-3}


def sampler(*sizes):
    torch.manual_seed(1)
    flow = coupling_flow(SHAPE, layers=sum(sizes) or 6, hidden=(4,))
    return (PartwiseSampler(Normal(SHAPE), flow, sizes) if sizes else FlowSampler(Normal(SHAPE), flow)).double()


def weights(one):
    return {name: tensor.clone() for name, tensor in one.state_dict().items()}


def moved(before, after):
    """Return the layers whose weights differ."""
    names = [name for name in before if not torch.equal(before[name], after[name])]
    return {int(name.split(".")[2]) for name in names}


def comparable(records):
    return [asdict(record) | {"seconds": 0} for record in records]


@pytest.mark.parametrize("estimator", REVERSE)
def test_one_part_is_end_to_end_bit_for_bit(estimator):
    plain, one = sampler(), sampler(6)
    records = [train(each, ACTION, estimator, steps=5, **QUICK) for each in (plain, one)]
    assert comparable(records[0]) == comparable(records[1])
    assert not moved(weights(plain), weights(one))


def test_one_part_is_end_to_end_bit_for_bit_on_data():
    data = torch.randn(200, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    settings = LikelihoodSettings(steps=6, batch=32, evaluate_every=2)
    plain, one = sampler(), sampler(6)
    records = [fit(each, data, settings=settings) for each in (plain, one)]
    assert comparable(records[0]) == comparable(records[1])
    assert not moved(weights(plain), weights(one))


def test_end_to_end_with_parts_has_the_gradients_of_the_whole():
    """The optimizers are those of the parts, but Adam acts on each number by itself."""
    plain, parted = sampler(), sampler(2, 4)
    records = [train(each, ACTION, "path", steps=5, **QUICK) for each in (plain, parted)]
    assert [record.loss for record in records[0]] == [record.loss for record in records[1]]


@pytest.mark.parametrize("on_data", [False, True])
def test_turns(on_data):
    def turns(kind, parts, steps, fine_tuning=1 / 3):
        schedule = Schedule(kind, parts, steps, fine_tuning, on_data=on_data)
        found = [schedule.learning(step) for step in range(steps)]
        return [[k if not on_data else parts - 1 - k for k in turn] if turn else turn for turn in found]

    assert turns("end_to_end", 2, 3) == [None] * 3
    assert turns("sequential", 2, 6) == [[0], [0], [1], [1], None, None]
    assert turns("sequential", 3, 5, 0) == [[0], [0], [1], [1], [2]]
    assert turns("alternate", 2, 6) == [[0], [1], [0], [1], None, None]
    assert turns("alternate", 3, 4, 1.0) == [None] * 4
    both = [1, 0] if on_data else [0, 1]
    assert turns("simultaneous", 2, 3) == [both, both, None]


@pytest.mark.parametrize("estimator", REVERSE)
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("sequential", [{0, 1}, {0, 1}, {2, 3, 4, 5}, {2, 3, 4, 5}]),
        ("alternate", [{0, 1}, {2, 3, 4, 5}, {0, 1}, {2, 3, 4, 5}]),
        ("simultaneous", [set(range(6))] * 4),
    ],
)
def test_only_what_learns_moves(estimator, kind, expected):
    one = sampler(2, 4)
    settings = TrainingSettings(steps=6, schedule=kind, **QUICK)
    trainer = Trainer(one, ACTION, make_estimator(estimator), settings)
    before, found = weights(one), []

    def on_step(trainer, record):
        nonlocal before
        found.append(moved(before, weights(one)))
        before = weights(one)

    trainer.run(on_step)
    assert found == [*expected, set(range(6)), set(range(6))]


def test_records_name_the_part_and_its_ess():
    records = train(sampler(2, 4), ACTION, "path", steps=6, schedule="alternate", **QUICK)
    assert [record.part for record in records] == [1, 2, 1, 2, 0, 0]
    assert all(0 < record.ess <= 1 for record in records)


@pytest.mark.parametrize("kind", SCHEDULES[1:])
def test_a_training_goes_on_bit_for_bit(kind):
    settings = TrainingSettings(steps=9, schedule=kind, **QUICK)
    whole = Trainer(sampler(2, 4), ACTION, make_estimator("path"), settings)
    states = []
    whole.run(lambda trainer, record: states.append(trainer.state_dict()))
    for pause in (3, 7):
        again = Trainer(sampler(2, 4), ACTION, make_estimator("path"), settings)
        again.load_state_dict(states[pause - 1])
        again.run()
        assert comparable(again.records) == comparable(whole.records)
        assert not moved(weights(again.sampler), weights(whole.sampler))


@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_schedule_learns(kind):
    """The loss falls to a tenth."""
    settings = {"batch": 64, "window": 10, "warmup": 0, "learning_rate": 1e-2}
    records = train(sampler(2, 4), ACTION, "path", steps=60, schedule=kind, **settings)
    assert records[-1].loss < 0.1 * records[0].loss


@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_schedule_learns_from_data(kind):
    data = 3 * torch.randn(600, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    settings = LikelihoodSettings(steps=60, batch=64, learning_rate=1e-2, evaluate_every=20, schedule=kind)
    records = fit(sampler(2, 4), data, settings=settings)
    assert records[-1].held_out < records[0].held_out - 0.3


def test_fine_tuning_with_a_rate_of_its_own():
    settings = TrainingSettings(steps=10, learning_rate=1e-2, warmup=2, decay="none")
    on, own = (Schedule("alternate", 2, 10, 0.5, rate) for rate in (None, 2e-3))
    assert [on.rate(settings, step) for step in range(10)] == pytest.approx([5e-3, *[1e-2] * 9])
    assert [own.rate(settings, step) for step in range(10)] == pytest.approx([5e-3, *[1e-2] * 4, 1e-3, *[2e-3] * 4])
    cosine = TrainingSettings(steps=10, learning_rate=1e-2, warmup=0)
    assert own.rate(cosine, 5) == pytest.approx(2e-3)
    assert own.rate(cosine, 4) < 1e-2 / 5
    plain = Schedule("end_to_end", 2, 10, 0.5, 2e-3)
    assert [plain.rate(cosine, step) for step in range(10)] == [cosine.rate(step, 10) for step in range(10)]


def test_learning_rates_of_parts():
    one = sampler(2, 4)
    records = train(one, ACTION, "path", steps=6, schedule="alternate", learning_rates=(1e-12, 3e-3), **QUICK)
    before, after = weights(sampler(2, 4)), weights(one)
    change = {name: float((after[name] - before[name]).abs().max()) for name in before}
    assert max(value for name, value in change.items() if int(name.split(".")[2]) < 2) < 1e-10
    assert max(value for name, value in change.items() if int(name.split(".")[2]) >= 2) > 1e-4
    assert records[0].learning_rate == pytest.approx(1e-12)


def test_a_part_with_a_loss_that_is_not_finite_is_skipped_alone():
    class Poisoned(ScalarAction):
        calls = 0

        def __call__(self, field):
            self.calls += 1
            return super().__call__(field) * (math.nan if self.calls == 2 else 1)

    one = sampler(2, 4)
    settings = TrainingSettings(steps=1, schedule="simultaneous", fine_tuning=0.0, **QUICK)
    trainer = Trainer(one, Poisoned(-4.0, 8.0), make_estimator("reparametrisation"), settings)
    before = weights(one)
    states = []
    trainer.run(lambda trainer, record: states.append(weights(one)))
    assert moved(before, states[0]) == {0, 1}
    assert trainer.records[0].skipped


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("random",), "schedule must be one of end_to_end, sequential, alternate, simultaneous, got 'random'"),
        (("alternate", 1), "schedule 'alternate' needs a flow with two parts or more, got 1"),
        (("alternate", 2, 10, 1.5), "fine_tuning must be a fraction of the steps, from 0 to 1, got 1.5"),
        (("alternate", 2, 10, math.nan), "fine_tuning must be a fraction"),
    ],
)
def test_schedules_that_do_not_work_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(*arguments)


def test_a_schedule_of_a_flow_without_parts_is_refused():
    for one in (sampler(), sampler(6)):
        with pytest.raises(ValueError, match="'alternate' needs a flow with two parts or more, got 1"):
            train(one, ACTION, "path", steps=2, schedule="alternate")
    data = torch.randn(20, *SHAPE, dtype=torch.float64)
    with pytest.raises(ValueError, match="'alternate' needs a flow with two parts or more, got 1"):
        fit(sampler(), data, settings=LikelihoodSettings(schedule="alternate"))


@pytest.mark.parametrize(
    ("sizes", "rates", "message"),
    [
        ((2, 4), (1e-3,), "1 learning_rates for 2 parts"),
        ((2, 4), (1e-3, 1e-3, 1e-3), "3 learning_rates for 2 parts"),
        ((6,), (1e-3, 1e-3), "2 learning_rates for 1 part$"),
    ],
)
def test_learning_rates_of_the_wrong_number_are_refused(sizes, rates, message):
    with pytest.raises(ValueError, match=message):
        Optimizers(sampler(*sizes), 1e-3, rates)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan])
def test_learning_rates_out_of_range_are_refused(rate):
    with pytest.raises(ValueError, match="learning_rates"):
        TrainingSettings(learning_rates=(1e-3, rate))
    for settings in (TrainingSettings, LikelihoodSettings):
        with pytest.raises(ValueError, match="fine_tuning_rate"):
            settings(fine_tuning_rate=rate)
    with pytest.raises(ValueError, match="learning_rates"):
        LikelihoodSettings(learning_rates=(1e-3, rate))
