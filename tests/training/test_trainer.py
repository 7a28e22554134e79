"""The training loop: it learns, it reproduces and continues bit for bit, and it survives bad steps but says so."""

import math
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from latticeflow.actions import Action, U1Action
from latticeflow.exact import u1_log_z
from latticeflow.flows import gauge_flow
from latticeflow.priors import HaarUniform
from latticeflow.samplers import FlowSampler
from latticeflow.stats import ess
from latticeflow.training import Trainer, TrainingError, TrainingSettings, make_estimator, train

SHAPE = (4, 4)
QUICK = {"steps": 12, "batch": 8, "warmup": 0, "window": 4, "learning_rate": 1e-2}


class FaultyAction(Action):
    """U(1) at beta = 1, but `value` for the first configuration of the batch at the chosen calls, counted from 1."""

    def __init__(self, calls, value=math.nan):
        self.bad_calls, self.value, self.calls = frozenset(calls), value, 0

    def __call__(self, field):
        self.calls += 1
        action = U1Action(1.0)(field)
        if self.calls in self.bad_calls:
            action = torch.cat([torch.full_like(action[:1], self.value), action[1:]])
        return action

    def field_shape(self, shape):
        return 2, *shape


def sampler(*, layers=2, hidden=(4,), seed=0):
    flow, draws = gauge_flow(SHAPE, layers=layers, hidden=hidden, bins=3), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in flow.layers:
            for parameter in layer.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draws))
            layer.network.layers[-1].linear.weight.mul_(0.01)
    return FlowSampler(HaarUniform(SHAPE), flow).double()


def trainer(*, action=None, estimator="reinforce", model=None, **settings):
    chosen = make_estimator(estimator) if isinstance(estimator, str) else estimator
    return Trainer(model or sampler(), action or U1Action(1.0), chosen, TrainingSettings(**{**QUICK, **settings}))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def comparable(records):
    """Return all of the records but the seconds."""
    return [{**vars(record), "seconds": None} for record in records]


def scripted(log_weights):
    """Return an estimator with the gradient one everywhere, whose log weights are `log_weights(call)`, from 1."""
    calls = []

    def estimate(sampler, action, batch, generator):
        calls.append(batch)
        return sum(p.sum() for p in sampler.parameters()), log_weights(len(calls))

    return estimate


def flat(call):
    return torch.zeros(8, dtype=torch.float64)


# ---------------------------------------------------------------- it learns


@pytest.mark.parametrize(("estimator", "steps"), [("path", 35), ("reinforce", 50)])
def test_training_lowers_the_loss_and_raises_the_ess(estimator, steps):
    """U(1) at beta = 1 from Haar: the untrained ESS is 0.003, the loss is bounded by -log Z = -3.77."""
    model = sampler(layers=8)

    def fresh():
        with torch.no_grad():
            x, log_q = model.sample(2000, torch.Generator().manual_seed(1))
            log_weight = -U1Action(1.0)(x) - log_q
        return -log_weight.mean().item(), ess(log_weight.numpy())

    loss_before, ess_before = fresh()
    records = train(model, U1Action(1.0), estimator, steps=steps, batch=64, window=10, warmup=5, learning_rate=2e-2)
    loss_after, ess_after = fresh()
    assert loss_before > -1
    assert ess_before < 0.1
    assert -u1_log_z(1.0, SHAPE) - 0.2 < loss_after < -2.5
    assert ess_after > 0.2
    first, last = (sum(r.loss for r in part) / 10 for part in (records[:10], records[-10:]))
    assert last < first - 1
    assert records[-1].ess > 2 * records[9].ess


def test_records_tell_each_step():
    run = trainer(steps=6)
    seen = []
    run.run(lambda t, record: seen.append((t is run, record)))
    assert [record for _, record in seen] == run.records
    assert all(same for same, _ in seen)
    assert [record.step for record in run.records] == [1, 2, 3, 4, 5, 6]
    seconds = [record.seconds for record in run.records]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    assert all(record.gradient_norm > 0 for record in run.records)
    assert not any(record.skipped for record in run.records)
    run.run()
    assert len(run.records) == 6


def test_record_holds_the_loss_and_the_pooled_ess():
    generator = torch.Generator().manual_seed(2)
    batches = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    run = trainer(estimator=scripted(lambda call: batches[call - 1]), steps=6, window=4)
    run.run()
    for step, record in enumerate(run.records, start=1):
        assert record.loss == pytest.approx(-batches[step - 1].mean().item())
        assert record.ess == pytest.approx(ess(batches[max(0, step - 4) : step].numpy()))


def test_train_returns_the_records_and_passes_everything_on():
    model, steps = sampler(), []
    records = train(
        model,
        U1Action(1.0),
        "reinforce",
        signal_clip=2.0,
        on_step=lambda trainer, record: steps.append(trainer.estimator.keywords["signal_clip"]),
        **QUICK,
    )
    assert len(records) == QUICK["steps"]
    assert steps == [2.0] * QUICK["steps"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"estimator": "pth"}, "estimator must be one of"),
        ({"estimator": "path", "signal_clip": 1.0}, "signal_clip"),
        ({"estimator": "forward_kl"}, "target"),
    ],
)
def test_train_refuses_contradictions(arguments, message):
    with pytest.raises(ValueError, match=message):
        train(sampler(), U1Action(1.0), **arguments)


def test_unknown_decay_is_refused():
    with pytest.raises(ValueError, match="decay"):
        train(sampler(), U1Action(1.0), decay="cosin", **QUICK)


# ---------------------------------------------------------------- it reproduces and continues


def test_same_seed_same_bits():
    runs = [trainer(), trainer(), trainer(seed=1)]
    for run in runs:
        run.run()
    assert torch.equal(weights(runs[0].sampler), weights(runs[1].sampler))
    assert comparable(runs[0].records) == comparable(runs[1].records)
    assert not torch.equal(weights(runs[0].sampler), weights(runs[2].sampler))


def test_global_random_state_is_neither_used_nor_changed():
    first, second = trainer(steps=4), trainer(steps=4)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        before = torch.random.get_rng_state()
        first.run()
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.manual_seed(2)
        second.run()
    assert torch.equal(weights(first.sampler), weights(second.sampler))


@pytest.mark.parametrize("estimator", ["reinforce", "path"])
@pytest.mark.parametrize("pause", [1, 4, 7, 12])
def test_continued_run_is_bitwise_the_uninterrupted_one(tmp_path, estimator, pause):
    """Through a file, as a checkpoint goes; the best weights, the running ESS and the schedule continue too."""
    whole = trainer(estimator=estimator)
    whole.run(lambda run, record: run.step == pause and torch.save(run.state_dict(), tmp_path / "state.pt"))
    continued = trainer(estimator=estimator, model=sampler(seed=5))
    continued.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert continued.step == pause
    continued.run()
    assert torch.equal(weights(continued.sampler), weights(whole.sampler))
    assert comparable(continued.records) == comparable(whole.records)
    assert continued.best_ess == whole.best_ess
    assert continued.records[-1].seconds >= continued.records[pause - 1].seconds


def test_state_dict_is_a_snapshot():
    whole, states = trainer(), {}
    whole.run(lambda run, record: states.setdefault(run.step, run.state_dict()))
    continued = trainer()
    continued.load_state_dict(states[6])
    continued.run()
    assert comparable(continued.records) == comparable(whole.records)
    assert torch.equal(weights(continued.sampler), weights(whole.sampler))


def test_a_trial_step_changes_nothing():
    run, plain = trainer(), trainer()
    run.trial_step()
    assert run.step == 0
    assert all(p.grad is None or not p.grad.any() for p in run.sampler.parameters())
    run.run()
    plain.run()
    assert torch.equal(weights(run.sampler), weights(plain.sampler))


# ---------------------------------------------------------------- bad steps


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_steps_are_skipped_counted_and_change_nothing(value):
    run, at_step = trainer(action=FaultyAction({1, 5, 6}, value)), {}
    start = weights(run.sampler)
    run.run(lambda t, record: at_step.update({record.step: weights(t.sampler)}))
    assert [r.step for r in run.records if r.skipped] == [1, 5, 6]
    assert torch.equal(at_step[1], start)
    assert torch.equal(at_step[5], at_step[4])
    assert torch.equal(at_step[6], at_step[4])
    for step in (2, 3, 4, 7, 8):
        assert not torch.equal(at_step[step], at_step[step - 1])
    assert all(torch.isfinite(w).all() for w in at_step.values())
    assert all(math.isfinite(r.ess) for r in run.records)
    assert run.records[0].ess == 0.0
    assert run.records[5].ess == run.records[3].ess
    assert torch.isfinite(weights(run.sampler)).all()


def test_a_skipped_step_leaves_the_optimiser_alone():
    """After a bad step 1, step 2 is the first that Adam sees: its update has the size of the learning rate."""
    run, at_step = trainer(action=FaultyAction({1}), decay="none", gradient_clip=None, steps=2), {}
    start = weights(run.sampler)
    run.run(lambda t, record: at_step.update({record.step: weights(t.sampler)}))
    moved = (at_step[2] - start).abs()
    assert moved.max() == pytest.approx(QUICK["learning_rate"], rel=1e-3)
    assert moved.median() == pytest.approx(QUICK["learning_rate"], rel=1e-3)


def test_non_finite_gradient_alone_is_skipped():
    """Finite weights with an infinite derivative, as at a zero mode."""

    def estimate(sampler, action, batch, generator):
        total = sum(p.sum() for p in sampler.parameters())
        return torch.sqrt((total - total.detach()).abs()), flat(0)

    run = trainer(estimator=estimate, steps=3)
    start = weights(run.sampler)
    run.run()
    assert all(record.skipped for record in run.records)
    assert all(not math.isfinite(record.gradient_norm) for record in run.records)
    assert torch.equal(weights(run.sampler), start)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_weight_alone_is_skipped(value):
    """With a finite gradient, as a clipped signal may have."""
    run = trainer(estimator=scripted(lambda call: flat(call) + (value if call == 2 else 0.0)), steps=4, window=1)
    at_step = {}
    run.run(lambda t, record: at_step.update({record.step: weights(t.sampler)}))
    assert [record.skipped for record in run.records] == [False, True, False, False]
    assert torch.equal(at_step[2], at_step[1])
    assert math.isfinite(run.records[1].gradient_norm)


def test_persistent_failure_raises_with_advice():
    run = trainer(action=FaultyAction(range(3, 1000)), steps=100, learning_rate=0.25)
    with pytest.raises(TrainingError, match=r"step 22: 20 steps in a row.*non-finite.*lower learning_rate \(0\.25\)"):
        run.run()
    assert len(run.records) == run.step == 22
    assert issubclass(TrainingError, RuntimeError)


def test_failures_that_are_not_in_a_row_are_survived():
    bad = {*range(1, 20), *range(21, 40)}
    run = trainer(action=FaultyAction(bad), steps=42, batch=2)
    run.run()
    assert sum(record.skipped for record in run.records) == len(bad) == 38


# ---------------------------------------------------------------- schedule, accumulation, clipping


def test_schedule_warms_up_and_falls_as_a_cosine():
    settings = TrainingSettings(steps=1000, learning_rate=2e-3, warmup=100)
    rates = [settings.rate(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(2e-5)
    assert rates[49] == pytest.approx(1e-3, rel=0.01)
    assert max(rates) == pytest.approx(2e-3, rel=0.03)
    assert rates.index(max(rates)) == 99
    assert rates[500] == pytest.approx(1e-3)
    assert rates[250] == pytest.approx(2e-3 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert 0 < rates[-1] < 1e-8
    assert all(later < earlier for earlier, later in pairwise(rates[99:]))


def test_schedule_without_decay_or_warm_up():
    constant = TrainingSettings(steps=10, learning_rate=3e-3, warmup=4, decay="none")
    assert [constant.rate(step, 6) for step in range(6)] == pytest.approx([0.75e-3, 1.5e-3, 2.25e-3, 3e-3, 3e-3, 3e-3])
    assert TrainingSettings(steps=10, learning_rate=3e-3, warmup=0).rate(0, 10) == pytest.approx(3e-3)


def test_the_schedule_is_what_adam_takes():
    """With a constant gradient every weight moves by the learning rate."""
    run, moved = trainer(estimator=scripted(flat), steps=8, warmup=3, gradient_clip=None), [weights(sampler())]
    run.run(lambda t, record: moved.append(weights(t.sampler)))
    for record, before, after in zip(run.records, *zip(*pairwise(moved), strict=True), strict=True):
        assert record.learning_rate == run.settings.rate(record.step - 1, 8)
        assert_close(before - after, torch.full_like(before, record.learning_rate), rtol=1e-4, atol=0)


@pytest.mark.parametrize("accumulate", [1, 2, 5])
def test_accumulated_gradient_is_the_mean_over_the_batches(accumulate):
    gradients, real = [], make_estimator("reparametrisation")

    def recording(model, action, batch, generator):
        surrogate, log_weight = real(model, action, batch, generator)
        parts = torch.autograd.grad(surrogate, list(model.parameters()), retain_graph=True)
        gradients.append(torch.cat([part.flatten() for part in parts]))
        return surrogate, log_weight

    run, applied = trainer(estimator=recording, accumulate=accumulate, steps=1, gradient_clip=None), []
    run.run(lambda t, record: applied.append(torch.cat([p.grad.flatten() for p in t.sampler.parameters()])))
    assert len(gradients) == accumulate
    mean = torch.stack(gradients).mean(0)
    assert_close(applied[0], mean, rtol=1e-10, atol=1e-13)
    assert run.records[0].gradient_norm == pytest.approx(mean.norm().item())
    assert len({tuple(g.tolist()) for g in gradients}) == accumulate  # different batches


def test_accumulated_batches_are_pooled_in_the_record():
    run = trainer(estimator=scripted(lambda call: flat(0) + call), accumulate=3, steps=1)
    run.run()
    assert run.records[0].loss == pytest.approx(-2.0)
    assert run.records[0].ess == pytest.approx(ess([[1.0] * 8, [2.0] * 8, [3.0] * 8]))


@pytest.mark.parametrize(("clip", "limit"), [(1e-3, 1e-3), (1e6, math.inf), (None, math.inf)])
def test_gradient_clipping(clip, limit):
    """The record shows the norm before clipping, Adam receives it clipped; accumulation does not change that."""
    run, applied = trainer(gradient_clip=clip, steps=4, accumulate=2), []
    run.run(lambda t, _: applied.append(torch.cat([p.grad.flatten() for p in t.sampler.parameters()]).norm().item()))
    for record, norm in zip(run.records, applied, strict=True):
        assert record.gradient_norm > 1e-2
        assert norm == pytest.approx(min(record.gradient_norm, limit), rel=1e-3)


# ---------------------------------------------------------------- best weights


def run_with_good_steps(good, *, steps=12, window=4, **options):
    """Train with equal weights (ESS 1) at the good steps and spread ones elsewhere; return run and weights by step."""
    spread = torch.linspace(-5, 5, 8, dtype=torch.float64)
    run = trainer(estimator=scripted(lambda call: flat(0) if call in good else spread), steps=steps, window=window)
    at_step = {}
    run.run(lambda t, record: at_step.update({record.step: weights(t.sampler)}), **options)
    return run, at_step


@pytest.mark.parametrize(("good", "best"), [(range(1, 5), 4), (range(5, 9), 8), (range(9, 13), 12), ((), 12)])
def test_the_weights_of_the_best_window_are_restored(good, best):
    """Of equal windows the latest counts."""
    run, at_step = run_with_good_steps(good)
    assert torch.equal(weights(run.sampler), at_step[best])
    assert len({tuple(w.tolist()) for w in at_step.values()}) == 12
    assert run.best_ess == pytest.approx(run.records[best - 1].ess)


def test_the_last_window_may_be_cut_short():
    """With 10 steps and windows of 4, the running window at step 10 competes as well."""
    run, at_step = run_with_good_steps(range(7, 11), steps=10)
    assert torch.equal(weights(run.sampler), at_step[10])


def test_a_run_shorter_than_the_window_is_not_thrown_away():
    run, at_step = run_with_good_steps((), steps=3, window=50)
    assert torch.equal(weights(run.sampler), at_step[3])


def test_a_run_of_one_window_with_a_skipped_step_is_not_thrown_away():
    model = sampler()
    start = weights(model)
    train(model, FaultyAction({3}), "reinforce", **{**QUICK, "steps": 4, "window": 4})
    assert not torch.equal(weights(model), start)


def test_no_steps_leave_the_sampler_as_it_was():
    run = trainer(steps=0)
    start = weights(run.sampler)
    run.run()
    assert run.records == []
    assert torch.equal(weights(run.sampler), start)
