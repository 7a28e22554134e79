"""Energy-based flows: the keys, what is refused, and what is built."""

import pytest
import torch

from latticeflow.config import Config
from latticeflow.config.building import build_sampler, build_trainer
from latticeflow.config.loading import parse_config
from latticeflow.flows import Dense, LUDense, PeriodicConvolution
from latticeflow.flows.activations import Cubic, SmoothLeakyReLU
from latticeflow.samplers import EBFlowSampler, FlowSampler
from latticeflow.training.estimators import ESTIMATORS, ON_SAMPLES, REVERSE, SCORE_ESTIMATORS
from latticeflow.training.score import WIDTHS

SCALAR = '[lattice]\nshape = [4, 4]\n[action]\nkind = "scalar"\nm2 = -4\nlam = 8\n'
LINKS = '[lattice]\nshape = [8, 8]\n[action]\nkind = "u1"\nbeta = 2\n'
PLANE = '[lattice]\nshape = [2]\n[action]\nkind = "two_moons"\n'
EBFLOW = '[sampler]\nkind = "ebflow"\n'
LINEAR = '[sampler.flow]\nkind = "linear"\n'
GLOW = '[sampler.flow]\nkind = "glow"\nlevels = 1\nsteps = 1\nhidden = 4\n'
CONVOLUTION = LINEAR + 'linear = "convolution"\n'
EXPLICIT = '[training]\nestimator = "explicit"\nsteps = 6\nbatch = 8\n'
DRAWS = "[training]\nsteps = 6\nbatch = 8\ndraws = 50\n"

PHI4 = SCALAR + EBFLOW + EXPLICIT
MOONS = PLANE + EBFLOW + DRAWS


def only(found, path):
    """Return the problem of a key, which must be the only one."""
    assert list(found) == [path]
    return found[path]


# ---------------------------------------------------------------- defaults


def test_an_energy_based_flow_has_dense_layers_unless_told():
    config = parse_config(SCALAR + EBFLOW)
    assert config.sampler.prior.model_dump() == {"kind": "normal", "scale": 1.0}
    assert config.sampler.flow.model_dump() == {
        "kind": "linear",
        "layers": 2,
        "linear": "dense",
        "kernel": None,
        "activation": "leaky_relu",
        "slope": 0.3,
        "symmetry": "none",
    }
    assert config.training is None


def test_glow_has_defaults():
    flow = parse_config(SCALAR + EBFLOW, ["sampler.flow.kind=glow"]).sampler.flow
    assert (flow.levels, flow.steps, flow.hidden) == (2, 4, 32)


def test_a_third_of_the_steps_is_by_the_other_estimator_unless_told():
    training = parse_config(PHI4, ["training.fine_tuning_estimator=path"]).training
    assert (training.fine_tuning, training.fine_tuning_rate, training.schedule) == (1 / 3, None, None)
    assert parse_config(PHI4).training.fine_tuning is None


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        (PHI4, []),
        (PHI4, ["training.fine_tuning_estimator=reinforce", "training.fine_tuning_rate=1e-4", "training.ema=0.99"]),
        (SCALAR + EBFLOW + CONVOLUTION + EXPLICIT, ["sampler.flow.kernel=3", "sampler.flow.slope=0.5"]),
        (SCALAR + EBFLOW + GLOW, []),
        (SCALAR + LINEAR, []),
        (MOONS, ["training.estimator=denoising", "training.noise=0.3"]),
        (MOONS, ["training.estimator=finite_difference", "training.difference=1e-2"]),
    ],
)
def test_round_trip(text, overrides):
    config = parse_config(text, overrides)
    assert parse_config(config.to_toml()) == config
    assert parse_config(config.to_toml()).to_toml() == config.to_toml()


def test_a_configuration_made_in_python_is_filled_in_too():
    action = {"kind": "scalar", "m2": -4, "lam": 8}
    assert Config(lattice={"shape": [4, 4]}, action=action, sampler={"kind": "ebflow"}).sampler.flow.kind == "linear"


# ---------------------------------------------------------------- what is refused: flows


@pytest.mark.parametrize("flow", ["", LINEAR, GLOW, '[sampler.flow]\nkind = "gauge"\n'])
def test_gauge_theories_have_no_energy_based_flow(problems, flow):
    problem = only(problems(LINKS + EBFLOW + flow), "sampler.kind")
    assert problem.expected == '"flow" or "piecewise" for action.kind = "u1"'
    assert problem.found == '"ebflow"'


@pytest.mark.parametrize("flow", ["linear", "glow"])
def test_linear_layers_are_of_real_fields(problems, flow):
    problem = only(problems(LINKS, f"sampler.flow.kind={flow}"), "sampler.flow.kind")
    assert (problem.expected, problem.found) == ('"gauge" or "identity" for action.kind = "u1"', f'"{flow}"')


@pytest.mark.parametrize("training", ["", EXPLICIT])
@pytest.mark.parametrize("flow", ["coupling", "autoregressive", "gauge", "identity"])
def test_an_energy_based_flow_has_linear_layers(problems, flow, training):
    problem = only(problems(SCALAR + EBFLOW + training, f"sampler.flow.kind={flow}"), "sampler.flow.kind")
    assert (problem.expected, problem.found) == ('"linear" or "glow" for sampler.kind = "ebflow"', f'"{flow}"')


OF_LINEAR = {
    "layers": (["0", "2.0"], "integer >= 1"),
    "linear": (['"sparse"', "1"], '"dense", "lu" or "convolution"'),
    "activation": (['"relu"', "0.3"], '"leaky_relu" or "cubic"'),
    "slope": (["0", "1", "-0.3", "nan"], "number > 0 and < 1"),
    "kernel": (["2", "0", "3.0"], "odd integer >= 1"),
    "symmetry": (['"Z(2)"'], '"none" or "z2"'),
}
OF_GLOW = {
    "levels": (["0", "17", "1.0"], "integer from 1 to 16"),
    "steps": (["0", "true"], "integer >= 1"),
    "hidden": (["0", "[32]"], "integer >= 1"),
}
OF_TRAINING = {
    "noise": (["0", "-0.1", "nan", '"wide"'], "number > 0"),
    "difference": (["0", "-1", "inf"], "number > 0"),
    "ema": (["1", "-0.1", "nan"], "number >= 0 and < 1"),
    "fine_tuning": (["-0.1", "1.5"], "number from 0 to 1"),
    "fine_tuning_rate": (["0", "11"], "number > 0 and <= 10"),
    "fine_tuning_estimator": (['"explicit"', '"forward_kl"', "1"], '"reinforce", "reparametrisation" or "path"'),
}
TABLES = (
    (SCALAR + EBFLOW + CONVOLUTION, "sampler.flow", OF_LINEAR),
    (SCALAR + EBFLOW + GLOW, "sampler.flow", OF_GLOW),
    (PHI4, "training", OF_TRAINING),
)
CASES = [
    (text, f"{section}.{key}", value, expected)
    for text, section, table in TABLES
    for key, (values, expected) in table.items()
    for value in values
]


@pytest.mark.parametrize(("text", "path", "value", "expected"), CASES)
def test_wrong_values_are_named(problems, text, path, value, expected):
    problem = only(problems(text, f"{path}={value}"), path)
    assert (problem.expected, problem.found) == (expected, value)


@pytest.mark.parametrize("linear", ["dense", "lu"])
def test_only_convolutions_have_a_window(problems, linear):
    found = problems(SCALAR + EBFLOW + LINEAR, f"sampler.flow.linear={linear}", "sampler.flow.kernel=3")
    problem = only(found, "sampler.flow.kernel")
    assert problem.expected == 'no such key without sampler.flow.linear = "convolution"'
    assert problem.found == "3"


@pytest.mark.parametrize("sampler", ["", EBFLOW])
def test_a_symmetric_flow_is_cubic(problems, sampler):
    problem = only(problems(SCALAR + sampler + LINEAR, "sampler.flow.symmetry=z2"), "sampler.flow.activation")
    assert (problem.expected, problem.found) == ('"cubic" for sampler.flow.symmetry = "z2"', '"leaky_relu"')
    overrides = ["sampler.flow.symmetry=z2", "sampler.flow.activation=cubic"]
    assert parse_config(SCALAR + sampler + LINEAR, overrides).sampler.flow.symmetry == "z2"


@pytest.mark.parametrize("sampler", ["", EBFLOW])
@pytest.mark.parametrize("shape", ["[8]", "[4, 4, 4]", "[4, 6]", "[2, 4]"])
def test_glow_halves_two_extents_at_each_level(problems, sampler, shape):
    found = problems(SCALAR + sampler + GLOW, f"lattice.shape={shape}", "sampler.flow.levels=2")
    problem = only(found, "lattice.shape")
    assert problem.expected == "two extents that are multiples of 4 for sampler.flow.levels = 2"
    assert problem.found == shape


# ---------------------------------------------------------------- what is refused: training


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_width_belongs_to_its_estimator(problems, width, estimator):
    text = MOONS if estimator in ON_SAMPLES else PLANE + EBFLOW + EXPLICIT
    overrides = [f"training.estimator={estimator}", f"training.{width}=0.1"]
    if estimator == WIDTHS[width]:
        assert getattr(parse_config(text, overrides).training, width) == 0.1
        return
    problem = only(problems(text, *overrides), f"training.{width}")
    assert problem.expected == f'no such key without training.estimator = "{WIDTHS[width]}"'


@pytest.mark.parametrize("estimator", ON_SAMPLES)
def test_learning_from_samples_needs_them(problems, estimator):
    problem = only(problems(PHI4, f"training.estimator={estimator}"), "training.samples")
    assert problem.expected == f'path of an ensemble, or training.draws, for training.estimator = "{estimator}"'


@pytest.mark.parametrize("estimator", REVERSE)
def test_reverse_estimators_learn_from_no_samples(problems, estimator):
    problem = only(problems(MOONS, f"training.estimator={estimator}"), "training.draws")
    assert f'with training.estimator = "{estimator}"' in problem.expected
    assert '"explicit"' in problem.expected
    problem = only(problems(PHI4, f"training.estimator={estimator}", 'training.samples="e.h5"'), "training.samples")
    assert problem.found == '"e.h5"'


def test_explicit_scores_may_be_of_samples():
    assert parse_config(MOONS, ["training.estimator=explicit"]).training.draws == 50
    assert parse_config(PHI4).training.samples is None


@pytest.mark.parametrize(
    ("text", "path"),
    [(PHI4, "sampler.kind"), (SCALAR + LINEAR + EXPLICIT, "sampler.flow"), (SCALAR + GLOW + EXPLICIT, "sampler.flow")],
)
def test_linear_layers_are_not_cut(problems, text, path):
    problem = only(problems(text, "training.estimator=path", "training.parts=[1, 1]"), "training.parts")
    assert problem.expected.startswith(f"no such key for {path}")
    assert problem.found == "[1, 1]"


@pytest.mark.parametrize("estimator", SCORE_ESTIMATORS)
def test_parts_have_no_scores(problems, estimator):
    samples = ['training.samples="e.h5"'] if estimator in ON_SAMPLES else []
    stabilised = SCALAR + '[sampler]\nkind = "stabilised"\nlayers = 4\n[training]\nparts = [2, 2]\n'
    overrides = [f"training.estimator={estimator}", *samples]
    problem = only(problems(stabilised, *overrides), "training.estimator")
    assert problem.expected.startswith("an estimator of a Kullback-Leibler divergence for training by parts")
    assert parse_config(stabilised, [*overrides, "training.schedule=end_to_end"]).training.estimator == estimator


@pytest.mark.parametrize("estimator", SCORE_ESTIMATORS)
def test_mirror_images_have_no_scores(problems, estimator):
    samples = ['training.samples="e.h5"'] if estimator in ON_SAMPLES else []
    text = SCALAR + '[sampler]\nkind = "piecewise"\npieces = "sign"\n' + LINEAR
    problem = only(problems(text, f"training.estimator={estimator}", *samples), "training.estimator")
    assert 'for sampler.pieces = "sign"' in problem.expected
    assert problem.found == f'"{estimator}"'


@pytest.mark.parametrize(("key", "value"), [("fine_tuning", "0.5"), ("fine_tuning_rate", "1e-3")])
def test_stages_need_another_estimator_or_parts(problems, key, value):
    problem = only(problems(PHI4, f"training.{key}={value}"), f"training.{key}")
    assert problem.expected == "no such key without training.parts or training.fine_tuning_estimator"
    config = parse_config(PHI4, [f"training.{key}={value}", "training.fine_tuning_estimator=path"])
    assert getattr(config.training, key) == float(value)


@pytest.mark.parametrize(("key", "value"), [("schedule", "alternate"), ("learning_rates", "[1e-3, 1e-3]")])
def test_stages_are_no_parts(problems, key, value):
    found = problems(PHI4, "training.fine_tuning_estimator=path", f"training.{key}={value}")
    assert only(found, f"training.{key}").expected == "no such key without training.parts"


def test_every_problem_is_named(problems):
    overrides = ["sampler.flow.kind=coupling", "training.noise=0.1", "training.ema=1", "training.fine_tuning=0.5"]
    assert set(problems(PHI4, *overrides)) == {
        *("sampler.flow.kind", "training.noise", "training.ema", "training.fine_tuning")
    }


# ---------------------------------------------------------------- what is built


@pytest.mark.parametrize(
    ("flow", "layers"),
    [
        ("layers = 3", [Dense, SmoothLeakyReLU] * 2 + [Dense]),
        ('linear = "lu"', [LUDense, SmoothLeakyReLU, LUDense]),
        ('linear = "convolution"\nactivation = "cubic"', [PeriodicConvolution, Cubic, PeriodicConvolution]),
        ("layers = 1", [Dense]),
    ],
)
@pytest.mark.parametrize("kind", ["flow", "ebflow"])
def test_the_flow_has_the_layers_of_the_keys(kind, flow, layers):
    sampler = build_sampler(parse_config(f'{SCALAR}[sampler]\nkind = "{kind}"\n{LINEAR}{flow}\n'))
    assert type(sampler) is {"flow": FlowSampler, "ebflow": EBFlowSampler}[kind]
    assert [type(layer) for layer in sampler.flow.layers] == layers


def test_the_same_flow_has_the_same_density_either_way():
    energy, plain = (build_sampler(parse_config(SCALAR + own + GLOW)).eval() for own in (EBFLOW, ""))
    x, log_q = plain.sample(5, torch.Generator().manual_seed(1))
    torch.testing.assert_close(energy.log_prob(x), log_q, rtol=1e-9, atol=1e-9)


def test_a_symmetric_flow_is_odd():
    overrides = ["sampler.flow.symmetry=z2", "sampler.flow.activation=cubic", "sampler.flow.kernel=3"]
    sampler = build_sampler(parse_config(SCALAR + EBFLOW + CONVOLUTION, overrides))
    x = torch.randn(3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(sampler.log_prob(-x), sampler.log_prob(x))
    assert list(sampler.flow.layers[0].weight.shape) == [1, 1, 3, 3]


def test_the_trainer_is_given_all_keys():
    keys = ["ema=0.5", "fine_tuning_estimator=path", "fine_tuning=0.5", "fine_tuning_rate=1e-4", "warmup=0"]
    config = parse_config(PHI4, [f"training.{key}" for key in keys])
    trainer = build_trainer(config, build_sampler(config))
    assert (trainer.settings.ema, trainer.schedule.first_steps, trainer.schedule.local_steps) == (0.5, 3, 0)
    trainer.run()
    assert trainer.records[3].learning_rate == pytest.approx(1e-4)
    assert trainer.average.updates == 6


@pytest.mark.parametrize(("estimator", "width"), [("denoising", "noise"), ("finite_difference", "difference")])
def test_the_estimator_is_given_its_width(estimator, width):
    norms = []
    for keys in ([], [f"training.{width}=0.1"], [f"training.{width}=0.4"]):
        config = parse_config(MOONS, [f"training.estimator={estimator}", "training.steps=1", *keys])
        trainer = build_trainer(config, build_sampler(config))
        trainer.run()
        norms.append(trainer.records[0].gradient_norm)
    assert norms[0] == norms[1] != norms[2]


@pytest.mark.parametrize("estimator", SCORE_ESTIMATORS)
@pytest.mark.parametrize("flow", ["coupling", "autoregressive"])
def test_other_flows_match_scores_too(flow, estimator):
    config = parse_config(PLANE + DRAWS, [f"sampler.flow.kind={flow}", f"training.estimator={estimator}"])
    trainer = build_trainer(config, build_sampler(config))
    trainer.trial_step()
    trainer.records.append(trainer._take_step())
    assert not trainer.records[0].skipped
