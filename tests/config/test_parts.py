"""Flows that are trained by parts: the keys, what is refused, and what is built."""

import pytest
import torch

from latticeflow.config import Config
from latticeflow.config.building import build_sampler, build_trainer
from latticeflow.config.loading import parse_config
from latticeflow.config.part_checks import OF_PARTS, OF_STAGES
from latticeflow.config.samplers import CouplingFlowSettings
from latticeflow.config.schema import TrainingSettings
from latticeflow.flows.coupling import CYCLE as COUPLING_CYCLE
from latticeflow.flows.gauge import CYCLE as GAUGE_CYCLE
from latticeflow.samplers import FlowSampler, PartwiseSampler
from latticeflow.training.schedule import SCHEDULES

SCALAR = '[lattice]\nshape = [4, 4]\n[action]\nkind = "scalar"\nm2 = -4\nlam = 8\n'
LINKS = '[lattice]\nshape = [8, 8]\n[action]\nkind = "u1"\nbeta = 2\n'
PLANE = '[lattice]\nshape = [2]\n[action]\nkind = "two_moons"\n'
STABILISED = '[sampler]\nkind = "stabilised"\nlayers = 8\nhidden = [4]\n'
COUPLING = '[sampler.flow]\nkind = "coupling"\nlayers = 8\nhidden = [4]\n'
GAUGE = '[sampler.flow]\nkind = "gauge"\nlayers = 24\nhidden = [4]\n'
AUTOREGRESSIVE = '[sampler.flow]\nkind = "autoregressive"\nblocks = 5\nhidden = [4]\n'
TRAINING = "[training]\nsteps = 12\nbatch = 8\n"

PHI4 = SCALAR + STABILISED + TRAINING + "parts = [4, 4]\n"
FLOWS = {
    "stabilised": (SCALAR + STABILISED + TRAINING, "[2, 6]", "sampler.layers = 8"),
    "coupling": (SCALAR + COUPLING + TRAINING, "[4, 2, 2]", "sampler.flow.layers = 8"),
    "gauge": (LINKS + GAUGE + TRAINING, "[8, 16]", "sampler.flow.layers = 24"),
    "autoregressive": (PLANE + AUTOREGRESSIVE + TRAINING, "[1, 3, 1]", "sampler.flow.blocks = 5"),
}
flows = pytest.mark.parametrize(("text", "parts", "layers"), FLOWS.values(), ids=FLOWS)


def only(found, path):
    """Return the problem of a key, which must be the only one."""
    assert list(found) == [path]
    return found[path]


# ---------------------------------------------------------------- defaults


def test_defaults_are_filled_in_and_shown():
    config = parse_config(PHI4)
    chosen = config.training.model_dump(include={"parts", *OF_PARTS})
    defaults = {"schedule": "alternate", "fine_tuning": 1 / 3, "fine_tuning_rate": None, "learning_rates": None}
    assert chosen == {"parts": (4, 4)} | defaults
    assert 'schedule = "alternate"' in config.to_toml()


def test_a_whole_flow_has_none_of_these_keys():
    text = parse_config(SCALAR + COUPLING + TRAINING).to_toml()
    assert not any(f"{key} =" in text for key in ("parts", *OF_PARTS))


@pytest.mark.parametrize("overrides", [[], ["training.schedule=sequential", "training.learning_rates=[1e-3, 2e-3]"]])
def test_round_trip(overrides):
    config = parse_config(PHI4, overrides)
    assert parse_config(config.to_toml()) == config
    assert parse_config(config.to_toml()).to_toml() == config.to_toml()


def test_settings_made_in_python_get_the_same_defaults():
    read = parse_config(PHI4)
    sections = {name: getattr(read, name) for name in ("lattice", "action", "sampler")}
    assert Config(**sections, training=TrainingSettings(steps=12, batch=8, parts=(4, 4))) == read


# ---------------------------------------------------------------- what is refused


WRONG = {
    "parts": (["[]", "[0, 8]", "[4.0, 4]", "8"], "list of 1 or more integers >= 1"),
    "schedule": (['"alternating"', "2"], '"end_to_end", "sequential", "alternate" or "simultaneous"'),
    "fine_tuning": (["-0.1", "1.5", "nan", '"all"'], "number from 0 to 1"),
    "fine_tuning_rate": (["0", "-1", "11", "nan"], "number > 0 and <= 10"),
    "learning_rates": (["[]", "[0, 1e-3]", "[11, 1e-3]", "1e-3"], "list of 1 or more numbers > 0 and <= 10"),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, (values, _) in WRONG.items() for value in values])
def test_wrong_values_are_named(problems, key, value):
    problem = only(problems(PHI4, f"training.{key}={value}"), f"training.{key}")
    assert problem.expected == WRONG[key][1]


def test_the_schedules_are_those_of_the_training_package():
    for schedule in SCHEDULES:
        assert parse_config(PHI4, [f"training.schedule={schedule}"]).training.schedule == schedule


@pytest.mark.parametrize(
    ("key", "value"),
    [("schedule", "end_to_end"), ("fine_tuning", "0"), ("fine_tuning_rate", "1e-3"), ("learning_rates", "[1e-3]")],
)
def test_without_parts_there_are_none_of_the_other_keys(problems, key, value):
    problem = only(problems(SCALAR + COUPLING + TRAINING, f"training.{key}={value}"), f"training.{key}")
    stages = " or training.fine_tuning_estimator" if key in OF_STAGES else ""
    assert problem.expected == f"no such key without training.parts{stages}"


def test_pieces_are_not_cut(problems):
    text = SCALAR + '[sampler]\nkind = "piecewise"\npieces = "sign"\n' + COUPLING + TRAINING
    problem = only(problems(text, "training.parts=[4, 4]"), "training.parts")
    assert problem.expected.startswith('no such key for sampler.kind = "piecewise"')
    assert '"flow" or "stabilised"' in problem.expected


def test_the_identity_is_not_cut(problems):
    problem = only(problems(SCALAR, "training.steps=0", "training.parts=[4, 4]"), "training.parts")
    assert 'sampler.flow.kind = "identity"' in problem.expected


@flows
def test_parts_add_up_to_the_layers(problems, text, parts, layers):
    problem = only(problems(text, "training.parts=[8, 8, 4]"), "training.parts")
    assert problem.expected == f"integers that add up to {layers}"
    assert problem.found == "[8, 8, 4], which add up to 20"


@pytest.mark.parametrize(
    ("text", "parts", "cycle", "cuts", "places"),
    [
        (SCALAR + STABILISED, "[3, 5]", COUPLING_CYCLE, "[3]", "2, 4, 6 layers"),
        (SCALAR + COUPLING, "[2, 3, 3]", COUPLING_CYCLE, "[2, 5]", "2, 4, 6 layers"),
        (SCALAR + COUPLING.replace("8", "40"), "[1, 39]", COUPLING_CYCLE, "[1]", "2, 4, 6, ..., 38 layers"),
        (LINKS + GAUGE, "[4, 20]", GAUGE_CYCLE, "[4]", "8, 16 layers"),
    ],
)
def test_cuts_come_after_whole_cycles(problems, text, parts, cycle, cuts, places):
    problem = only(problems(text + TRAINING, f"training.parts={parts}"), "training.parts")
    assert problem.expected == f"cuts after multiples of {cycle} layers, when every variable has moved"
    assert problem.found == f"{parts}, cut after {cuts}"
    assert problem.suggestion == f"cuts may come after {places}"


def test_some_flows_have_no_place_for_a_cut(problems):
    problem = only(problems(LINKS + GAUGE.replace("24", "8") + TRAINING, "training.parts=[4, 4]"), "training.parts")
    assert problem.suggestion == "there is no place for a cut"


def test_layers_are_counted_with_their_default(problems):
    layers = CouplingFlowSettings.model_fields["layers"].default
    text = SCALAR + COUPLING.replace("layers = 8\n", "") + TRAINING
    assert only(problems(text, "training.parts=[8, 8]"), "training.parts").expected.endswith(f"= {layers}")


@pytest.mark.parametrize("schedule", [None, *SCHEDULES[1:]])
def test_a_single_part_cannot_take_turns(problems, schedule):
    overrides = ["training.parts=[8]"] + ([f"training.schedule={schedule}"] if schedule else [])
    problem = only(problems(PHI4, *overrides), "training.schedule")
    assert problem.expected == '"end_to_end" for a single part, training.parts = [8]'
    assert parse_config(PHI4, ["training.parts=[8]", "training.schedule=end_to_end"]).training.parts == (8,)


@pytest.mark.parametrize("rates", ["[1e-3]", "[1e-3, 1e-3, 1e-3]"])
def test_each_part_has_one_learning_rate(problems, rates):
    problem = only(problems(PHI4, f"training.learning_rates={rates}"), "training.learning_rates")
    assert problem.expected == "2 numbers, one for each of training.parts = [4, 4]"


def test_every_problem_is_named(problems):
    overrides = ["training.parts=[3, 5]", "training.learning_rates=[1e-3]", "training.fine_tuning=2"]
    assert set(problems(PHI4, *overrides)) == {"training.parts", "training.learning_rates", "training.fine_tuning"}


def test_a_broken_part_is_one_problem(problems):
    only(problems(PHI4, "training.parts=[0, 8]", "training.learning_rates=[1e-3]"), "training.parts")


# ---------------------------------------------------------------- what is built


@flows
def test_the_sampler_is_the_same_but_cut(text, parts, layers):
    """Weights have the names and values of the whole flow, and the draws are bitwise the same."""
    whole, cut = (build_sampler(parse_config(text, overrides)) for overrides in ([], [f"training.parts={parts}"]))
    assert isinstance(cut, PartwiseSampler)
    assert isinstance(whole, FlowSampler)
    assert len(cut.parts) == parts.count(",") + 1
    assert cut.state_dict().keys() == whole.state_dict().keys()
    assert all(torch.equal(weight, whole.state_dict()[name]) for name, weight in cut.state_dict().items())
    drawn = [sampler.sample(3, torch.Generator().manual_seed(1)) for sampler in (whole, cut)]
    assert all(torch.equal(*pair) for pair in zip(*drawn, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_parts_share_the_weights_in_training_precision(dtype):
    sampler = build_sampler(parse_config(PHI4, [f"training.dtype={dtype}"]))
    own = {id(parameter) for part in sampler.parts for parameter in part.parameters()}
    assert own == {id(parameter) for parameter in sampler.flow.parameters()}
    assert {parameter.dtype for parameter in sampler.flow.parameters()} == {getattr(torch, dtype)}


def test_the_trainer_is_given_all_keys():
    keys = ["training.schedule=sequential", "training.fine_tuning=0.5", "training.learning_rates=[1e-3, 2e-3]"]
    config = parse_config(PHI4, keys)
    trainer = build_trainer(config, build_sampler(config))
    settings = trainer.settings
    assert (settings.schedule, settings.fine_tuning, settings.learning_rates) == ("sequential", 0.5, (1e-3, 2e-3))
    assert [trainer.schedule.learning(step) for step in range(0, 12, 3)] == [(0,), (1,), None, None]


def test_a_whole_flow_is_trained_end_to_end():
    config = parse_config(SCALAR + COUPLING + TRAINING)
    trainer = build_trainer(config, build_sampler(config))
    assert (trainer.schedule.kind, trainer.schedule.local_steps) == ("end_to_end", 0)


@flows
def test_parts_learn_in_turn(text, parts, layers):
    overrides = [f"training.parts={parts}", "training.fine_tuning=0.25", "lattice.shape=[4, 4]"]
    config = parse_config(text, overrides[:2] if "two_moons" in text else overrides)
    trainer = build_trainer(config, build_sampler(config))
    trainer.run()
    count = len(config.training.parts)
    assert [record.part for record in trainer.records] == [1 + step % count for step in range(9)] + [0] * 3
    assert not any(record.skipped for record in trainer.records)
