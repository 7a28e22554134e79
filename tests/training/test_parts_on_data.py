"""Parts that learn from samples: which of them tells how good the whole sampler is."""

import pytest
import torch

from latticeflow.actions import TwoMoons
from latticeflow.flows import autoregressive_flow
from latticeflow.priors import Normal
from latticeflow.samplers import PartwiseSampler
from latticeflow.stats import ess
from latticeflow.training import Trainer, TrainingSettings, make_estimator


def trained(schedule, *, fine_tuning=0.0, steps=6, **settings):
    torch.manual_seed(2)
    sampler = PartwiseSampler(Normal((2,)), autoregressive_flow((2,), blocks=2, hidden=(4,)).double(), [1, 1])
    estimator = make_estimator("forward_kl", target=TwoMoons().sample)
    chosen = TrainingSettings(steps=steps, batch=64, schedule=schedule, fine_tuning=fine_tuning, **settings)
    trainer = Trainer(sampler, TwoMoons(), estimator, chosen)
    trainer.run()
    return trainer


def test_the_first_part_ends_the_sequence_with_the_whole_sampler():
    trainer = trained("sequential", window=1)
    assert [record.part for record in trainer.records] == [2, 2, 2, 1, 1, 1]
    assert trainer.best_ess == max(record.ess for record in trainer.records if record.part == 1)


@pytest.mark.parametrize("schedule", ["alternate", "simultaneous"])
def test_the_best_weights_are_those_of_the_whole_sampler(schedule):
    """Not of the last part on the prior, whose input the others would have made."""
    trainer = trained(schedule, window=3)
    own = ess(torch.cat(tuple(trainer.recent[0])).numpy())
    assert trainer.running_ess() == own != trainer.running_ess(1)
    assert trainer.best_ess in (own, *(record.ess for record in trainer.records if record.part == 1))


def test_all_at_once_is_recorded_as_the_part_that_reads_all():
    """Its loss is that of the same sampler and samples end to end, before anything was learned."""
    together, whole = trained("simultaneous", steps=1), trained("simultaneous", steps=1, fine_tuning=1.0)
    assert (together.records[0].part, whole.records[0].part) == (1, 0)
    assert together.records[0].loss == pytest.approx(whole.records[0].loss, rel=1e-12)
    assert together.records[0].ess == pytest.approx(whole.records[0].ess, rel=1e-12)


def test_end_to_end_steps_go_on_with_the_window_of_the_whole():
    trainer = trained("alternate", fine_tuning=0.5, window=50)
    assert [record.part for record in trainer.records] == [2, 1, 2, 0, 0, 0]
    assert [len(recent) for recent in trainer.recent] == [4, 2]


def test_the_learning_rate_is_that_of_the_part():
    trainer = trained(
        "alternate", fine_tuning=0.5, learning_rate=1e-3, learning_rates=(1e-3, 4e-3), warmup=0, decay="none"
    )
    assert [record.learning_rate for record in trainer.records] == pytest.approx([4e-3, 1e-3, 4e-3, *[1e-3] * 3])
