"""`Trainer.start_from`: the weights of another sampler where they fit, a message that names them where they do not."""

import re

import pytest
import torch

from latticeflow.actions import ScalarAction
from latticeflow.priors import FreeField, Normal, StudentT
from latticeflow.samplers import StabilisedSampler
from latticeflow.training import Trainer, TrainingSettings, make_estimator

ACTION = ScalarAction(1.0, 0.5)
HEAD = "the weights to start from do not fit: "


def sampler(shape=(4, 4), *, seed=0, dtype=torch.float64, **settings):
    """A small stabilised flow with shared weights, moved away from the identity by a seed."""
    chosen = {"layers": 2, "hidden": (4,), "shared": True, "prior": FreeField(shape, 1.0)} | settings
    draws = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = StabilisedSampler(shape, **chosen).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draws, dtype=torch.float64).to(parameter))
    return model


def trainer(model=None, *, steps=4, action=ACTION):
    settings = TrainingSettings(steps=steps, batch=8, warmup=0, window=2, learning_rate=1e-2)
    return Trainer(model or sampler(), action, make_estimator("path"), settings)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def refusal(run, weights):
    """Return what is wrong with the weights, piece by piece; nothing may have changed."""
    before = trainer(run.sampler)._weights()
    with pytest.raises(ValueError, match=f"^{HEAD}") as caught:
        run.start_from(weights)
    assert same(run._weights(), before)
    assert same(run.best_weights, before)
    return str(caught.value).removeprefix(HEAD).split("; ")


def without(weights, *names):
    return {name: tensor for name, tensor in weights.items() if name not in names}


# ---------------------------------------------------------------- weights that fit


@pytest.mark.parametrize("shape", [(4, 4), (8, 8), (4, 6), (6, 10)])
def test_weights_of_a_smaller_lattice_are_taken(shape):
    """Convolutions and shared parameters have the same shapes everywhere."""
    source, run = sampler(seed=1).state_dict(), trainer(sampler(shape, seed=2))
    assert not same(run.sampler.state_dict(), source)
    run.start_from(source)
    assert same(run.sampler.state_dict(), source)
    assert same(run.best_weights, source)


def test_training_starts_from_them():
    """Bit for bit as if the sampler had had them from the first; without a step the best weights are theirs."""
    source = sampler(seed=1)
    started, built = trainer(sampler(seed=2)), trainer(sampler(seed=1))
    started.start_from(source.state_dict())
    started.run()
    built.run()
    assert same(started.sampler.state_dict(), built.sampler.state_dict())
    assert [record.loss for record in started.records] == [record.loss for record in built.records]
    idle = trainer(sampler(seed=2), steps=0)
    idle.start_from(source.state_dict())
    idle.run()
    assert same(idle.sampler.state_dict(), source.state_dict())


def test_they_are_copied():
    source, run = sampler(seed=1), trainer(sampler(seed=2))
    weights = source.state_dict()
    kept = {name: tensor.clone() for name, tensor in weights.items()}
    run.start_from(weights)
    run.run()
    assert same(source.state_dict(), kept)
    assert not same(run.sampler.state_dict(), kept)


def test_another_precision_is_cast():
    run = trainer(sampler(seed=2, dtype=torch.float32))
    run.start_from(sampler(seed=1).state_dict())
    assert {parameter.dtype for parameter in run.sampler.parameters()} == {torch.float32}
    for name, tensor in sampler(seed=1).state_dict().items():
        assert torch.equal(run.sampler.state_dict()[name], tensor.float())


def test_a_prior_with_weights_of_its_own_takes_part():
    shared = {"prior": StudentT((4, 4), per_site=False)}
    source, run = sampler(seed=1, **shared), trainer(sampler((8, 8), prior=StudentT((8, 8), per_site=False)))
    run.start_from(source.state_dict())
    assert torch.equal(run.sampler.prior.degrees_of_freedom, source.prior.degrees_of_freedom)


def test_priors_without_weights_may_differ():
    run = trainer(sampler(prior=Normal((4, 4))))
    run.start_from(sampler(seed=1).state_dict())


# ---------------------------------------------------------------- weights that do not


def test_a_missing_weight_is_named():
    run = trainer()
    (piece,) = refusal(run, without(sampler().state_dict(), "flow.layers.3.shift"))
    assert piece == "flow.layers.3.shift is absent, expected []"


def test_an_extra_weight_is_named():
    run = trainer()
    (piece,) = refusal(run, {**sampler().state_dict(), "flow.layers.9.shift": torch.zeros(3)})
    assert piece == "flow.layers.9.shift is [3], expected absent"


def test_a_weight_of_another_shape_is_named():
    run, weights = trainer(), sampler().state_dict()
    (piece,) = refusal(run, {**weights, "flow.layers.3.log_scale": torch.zeros(4, 4)})
    assert piece == "flow.layers.3.log_scale is [4, 4], expected []"


def test_a_weight_of_as_many_numbers_but_another_shape_is_refused():
    """It would not do to reshape: the numbers belong to other sites."""
    run, name = trainer(), "flow.layers.0.network.network.layers.1.linear.weight"
    weights = sampler().state_dict()
    rows, columns = weights[name].shape
    assert refusal(run, {**weights, name: weights[name].T.clone()}) == [
        f"{name} is [{columns}, {rows}], expected [{rows}, {columns}]"
    ]


@pytest.mark.parametrize("wrong", [1, 2, 3, 4, 7])
def test_three_are_named_and_the_others_counted(wrong):
    run, weights = trainer(), sampler().state_dict()
    gone = sorted(weights)[:wrong]
    pieces = refusal(run, without(weights, *gone))
    assert len(pieces) == min(wrong, 3)
    assert [piece.split(" is ")[0] for piece in pieces] == gone[:3]
    counted = re.search(r" and (\d+) more$", pieces[-1])
    assert counted is None if wrong <= 3 else int(counted[1]) == wrong - 3


def test_missing_extra_and_misshaped_weights_come_in_one_message():
    run, weights = trainer(), sampler().state_dict()
    changed = {
        **without(weights, "flow.layers.3.shift"),
        "flow.layers.3.log_scale": torch.zeros(2),
        "a": torch.ones(()),
    }
    assert refusal(run, changed) == [
        "a is [], expected absent",
        "flow.layers.3.log_scale is [2], expected []",
        "flow.layers.3.shift is absent, expected []",
    ]


def test_no_weights_at_all_are_refused():
    run = trainer()
    pieces = refusal(run, {})
    assert pieces[-1].endswith(f" and {len(run.sampler.state_dict()) - 3} more")


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"conditioner": "dense"}, "flow.layers.0.network.network.layers.0.linear.weight"),
        ({"layers": 3}, "flow.layers.2.network.network.layers.0.linear.bias"),
        ({"shared": False}, "flow.layers.3.log_scale"),
        ({"odd": True}, "flow.layers.3.shift"),
        ({"kernel": 5}, "flow.layers.0.network.network.layers.0.linear.weight"),
        ({"hidden": (5,)}, "flow.layers.0.network.network.layers.0.linear.bias"),
        ({"transform": "spline"}, "flow.layers.0.network.network.layers.1.linear.bias"),
        ({"prior": StudentT((8, 8))}, "prior.log_degrees_of_freedom"),
    ],
)
def test_another_architecture_is_refused(settings, name):
    run = trainer(sampler((8, 8), **settings))
    assert any(piece.startswith(f"{name} is ") for piece in refusal(run, sampler(seed=1).state_dict()))
