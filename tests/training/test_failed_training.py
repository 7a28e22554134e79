"""A training that had to stop: its state is whole, it goes on when the fault is gone and stops again while it lasts."""

import math

import pytest
import torch

from latticeflow.actions import Action, ScalarAction
from latticeflow.flows import linear_flow
from latticeflow.priors import Normal
from latticeflow.samplers import EBFlowSampler, StabilisedSampler, mirrored
from latticeflow.stats import ess, ess_error
from latticeflow.training import (
    LikelihoodSettings,
    Trainer,
    TrainingError,
    TrainingSettings,
    fit,
    hopeless,
    make_estimator,
)


class Faulty(Action):
    """phi^4, but NaN from a chosen call on, counted from 1."""

    def __init__(self, bad_from):
        self.bad_from, self.calls = bad_from, 0

    def __call__(self, field):
        self.calls += 1
        values = ScalarAction(1.0, 0.5)(field)
        return values if self.calls < self.bad_from else torch.full_like(values, math.nan)

    def field_shape(self, shape):
        return shape


def trainer(*, bad_from=math.inf, steps=30):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = StabilisedSampler((4, 4), layers=2, hidden=(4,), shared=True).double()
    settings = TrainingSettings(steps=steps, batch=4, warmup=0, window=2)
    return Trainer(model, Faulty(bad_from), make_estimator("path"), settings)


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.sampler.parameters()])


@pytest.fixture
def failed():
    run = trainer(bad_from=3)
    with pytest.raises(TrainingError, match="step 22: 20 steps in a row"):
        run.run()
    return run


def test_each_step_has_its_record(failed):
    """Also the one that ended it: a log of the records counts all 20."""
    assert failed.step == 22
    assert [record.step for record in failed.records] == list(range(1, 23))
    assert [record.step for record in failed.records if record.skipped] == list(range(3, 23))


def test_the_one_that_ended_it_is_shown():
    run, seen = trainer(bad_from=3), []
    with pytest.raises(TrainingError):
        run.run(lambda trainer, record: seen.append(record.step))
    assert seen == list(range(1, 23))


def test_the_weights_are_those_of_the_last_good_step(failed):
    """The state holds them, and the ones that a training of the good steps alone would have."""
    short, at_step = trainer(), {}
    short.run(lambda run, record: at_step.update({record.step: weights(run)}))
    assert torch.equal(weights(failed), at_step[2])
    assert all(bool(torch.isfinite(tensor).all()) for tensor in failed.state_dict()["weights"].values())


def test_it_goes_on_without_the_fault(failed):
    continued = trainer()
    continued.load_state_dict(failed.state_dict())
    continued.run()
    assert [record.step for record in continued.records] == list(range(1, 31))
    assert sum(record.skipped for record in continued.records) == 20


def test_it_stops_at_once_while_the_fault_lasts(failed):
    with pytest.raises(TrainingError, match="step 23"):
        failed.run()


def test_after_the_last_step_it_is_refused_again():
    """There is no step left to take; the weights stay as they were."""
    run = trainer(bad_from=3, steps=22)
    for _ in range(2):
        with pytest.raises(TrainingError, match="step 22: 20 steps in a row"):
            run.run()
    again = trainer(steps=22)
    again.load_state_dict(run.state_dict())
    with pytest.raises(TrainingError, match="step 22: 20 steps in a row"):
        again.run()
    assert len(again.records) == 22
    assert torch.equal(weights(again), weights(run))


@pytest.mark.parametrize(
    ("skipped", "expected"),
    [
        ([], False),
        ([True] * 19, False),
        ([True] * 20, True),
        ([False] + [True] * 20, True),
        ([True] * 20 + [False], False),
        ([True] * 30 + [False] + [True] * 19, False),
    ],
)
def test_a_training_is_hopeless_after_twenty_skipped_steps(skipped, expected):
    assert hopeless(skipped) == expected


@pytest.mark.parametrize("bad_from", [1, 5])
def test_a_skipped_last_step_keeps_earlier_weights(bad_from):
    """The windows of good steps compete, one that a bad step ends does not, with whatever ESS."""
    run, at_step = trainer(bad_from=bad_from, steps=6), {}
    at_step[0] = weights(run)
    run.run(lambda run, record: at_step.update({record.step: weights(run)}))
    assert torch.equal(weights(run), at_step[bad_from - 1])
    assert run.best_ess == (run.records[3].ess if bad_from == 5 else 0.0)


def test_weights_with_a_non_finite_loss_are_not_the_best():
    """The first update may have ruined the weights, which the window's ESS, measured before it, does not see."""
    run = trainer(bad_from=2, steps=6)
    start = weights(run)
    run.run()
    assert [record.skipped for record in run.records] == [False] + [True] * 5
    assert torch.equal(weights(run), start)


class Singular(EBFlowSampler):
    """An energy-based flow whose last layer is 0 from a chosen evaluation of its density on, counted from 1."""

    def __init__(self, bad_from):
        super().__init__(Normal((4, 4)), linear_flow((4, 4)))
        self.bad_from, self.calls = bad_from, 0

    def energy(self, x):
        self.calls += 1
        if self.calls == self.bad_from:
            self.flow.layers[2].weight.data.zero_()
        return super().energy(x)


@pytest.mark.parametrize("estimator", ["explicit", "path", "reinforce"])
def test_singular_weights_end_a_training_and_are_named(estimator):
    sampler, settings = EBFlowSampler(Normal((4, 4)), linear_flow((4, 4))), TrainingSettings(steps=9, batch=4)
    run = Trainer(sampler, ScalarAction(1.0, 0.0), make_estimator(estimator), settings)

    def spoil(trainer, record):
        if record.step == 3:
            trainer.sampler.flow.layers[2].weight.data.zero_()

    with pytest.raises(TrainingError, match=r"step 4: the weights of layers\.2, Dense, are singular.*learning_rate"):
        run.run(spoil)
    assert run.step == len(run.records) == 3


@pytest.mark.parametrize("bad_from", [3, 4])
def test_singular_weights_end_a_fit_and_the_best_ones_are_restored(bad_from):
    """Whether they are noticed in a step or in the evaluation after it."""
    sampler, data = Singular(bad_from).double(), torch.randn(40, 4, 4, dtype=torch.float64)
    with pytest.raises(TrainingError, match=r"step [23]: the weights of layers\.2, Dense, are singular"):
        fit(sampler, data, settings=LikelihoodSettings(steps=9, batch=8, evaluate_every=2))
    assert sampler.log_prob(data).isfinite().all()


def test_scores_are_those_of_one_flow():
    sampler = mirrored(StabilisedSampler((4, 4), layers=2, hidden=(4,)))
    with pytest.raises(ValueError, match="scores are those of one flow, got a PiecewiseSampler"):
        Trainer(sampler, ScalarAction(-4.0, 8.0), make_estimator("explicit"), TrainingSettings())


@pytest.mark.parametrize(("errors", "kept"), [(1.5, True), (2.5, False)])
def test_weights_lose_only_to_a_window_that_is_higher_by_two_errors(errors, kept):
    """The highest of many windows is high by luck as well."""
    run = trainer(steps=4)
    log_weight = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    run.recent[0].append(log_weight)
    run.step, run.best_ess = 4, ess(log_weight) + errors * ess_error(log_weight)
    before, highest = run.best_weights, run.best_ess
    run._keep_best()
    assert (run.best_weights is not before) == kept
    assert run.best_ess == highest
