"""Defaults, types and ranges of the keys, and what a Config can say about itself."""

import pytest
from pydantic import ValidationError

from latticeflow.config import Config, ConfigError
from latticeflow.config.loading import parse_config
from latticeflow.training.estimators import ESTIMATORS, ON_SAMPLES

U1 = '[lattice]\nshape = [8, 8]\n[action]\nkind = "u1"\nbeta = 2\n'
FREE = '[lattice]\nshape = [6]\n[action]\nkind = "scalar"\nm2 = 1\nlam = 0\n'


def test_defaults_of_a_gauge_theory():
    config = parse_config(U1)
    assert (config.run.seed, config.run.device, config.run.threads) == (0, "cpu", None)
    assert (config.action.beta, config.action.holonomies) == (2.0, (1, 1))
    assert config.sampler.kind == "flow"
    assert (config.sampler.prior.kind, config.sampler.prior.beta, config.sampler.prior.sector) == (
        "quenched",
        None,
        0.0,
    )
    assert config.sampler.flow.kind == "identity"
    assert config.training is None
    chain = config.chain
    assert (chain.kernels, chain.replica, chain.draws, chain.block, chain.candidates) == (
        ("independence",),
        64,
        256,
        32,
        1024,
    )
    baseline = config.baseline
    assert (baseline.samples, baseline.beta, baseline.sector, baseline.smooth_sector) == (4096, None, 0.0, ())
    assert (config.analysis.s, config.analysis.observables) == (2.0, None)


def test_defaults_of_the_scalar_field():
    config = parse_config(FREE)
    assert (config.sampler.prior.kind, config.sampler.prior.scale) == ("normal", 1.0)
    assert config.sampler.flow.kind == "identity"
    assert config.baseline is None


def test_defaults_of_training_and_flow():
    config = parse_config(U1 + '[training]\n[sampler.flow]\nkind = "gauge"\n')
    flow, training = config.sampler.flow, config.training
    assert (flow.layers, flow.bins, flow.hidden, flow.kernel, flow.dilations) == (8, 6, (64, 64), 3, None)
    assert training.model_dump() == {
        "estimator": "path",
        "steps": 1000,
        "batch": 128,
        "accumulate": 1,
        "learning_rate": 1e-3,
        "betas": (0.9, 0.99),
        "warmup": 50,
        "decay": "cosine",
        "gradient_clip": None,
        "signal_clip": None,
        "dtype": "float32",
        "window": 50,
        "holonomies": None,
        "checkpoint_every": 200,
        "start_from": None,
        "samples": None,
        "draws": None,
        "validation": None,
        "patience": None,
        "evaluate_every": None,
        "processes": None,
        "parts": None,
        "schedule": None,
        "fine_tuning": None,
        "fine_tuning_rate": None,
        "learning_rates": None,
        **dict.fromkeys(("noise", "difference", "ema", "fine_tuning_estimator")),
        **dict.fromkeys(("recompute", "compile"), False),
    }


def test_schwinger_has_two_flavours_unless_told():
    assert parse_config(U1.replace("u1", "schwinger") + "kappa = 0.2\n").action.flavours == 2


def test_prior_is_filled_in_where_only_the_flow_is_given():
    assert parse_config(U1 + '[sampler.flow]\nkind = "gauge"\n').sampler.prior.kind == "quenched"


def test_estimators_are_those_of_the_training_package():
    for name in ESTIMATORS:
        samples = ['training.samples="e.h5"'] if name in ON_SAMPLES else []
        overrides = [f"training.estimator={name}", "sampler.flow.kind=gauge", *samples]
        assert parse_config(U1, overrides).training.estimator == name


def test_an_integer_is_a_number():
    beta = parse_config(U1).action.beta
    assert (beta, type(beta)) == (2.0, float)


@pytest.mark.parametrize("text", ["gauge", "scalar"])
def test_round_trip_through_toml(text, request):
    config = parse_config(request.getfixturevalue(text))
    assert parse_config(config.to_toml()) == config
    assert parse_config(config.to_toml()).to_toml() == config.to_toml()
    assert "shape = [" in config.to_toml()


@pytest.mark.parametrize(
    "word", ["a,", "x = [", "]", 'say "hi"', "tab\tnewline\n", "back\\slash", "\x7f\u2028\u00e9\U0001f600"]
)
def test_round_trip_of_awkward_strings(word):
    start = parse_config(U1).model_dump(exclude_none=True)
    config = Config.model_validate({**start, "analysis": {"observables": [word, word]}, "run": {"device": word}})
    assert parse_config(config.to_toml()) == config


@pytest.mark.parametrize("value", [1e-300, 0.1 + 0.2, 1e5, 123456789.123456789])
def test_round_trip_of_numbers_is_exact(value):
    assert parse_config(parse_config(U1, ["action.beta=0.0", f"analysis.s={value!r}"]).to_toml()).analysis.s == value


def test_resolved_text_says_the_defaults_and_leaves_absent_keys_out():
    text = parse_config(U1).to_toml()
    assert 'kind = "quenched"' in text
    assert "replica = 64" in text
    assert "threads" not in text
    assert "[training]" not in text


def test_differences_name_the_keys(gauge):
    config = parse_config(gauge)
    assert config.differences(config) == []
    other = parse_config(gauge, ["run.seed=8", "lattice.shape=[8, 12]", "run.threads=2", "sampler.prior.sector=0"])
    assert config.differences(other) == ["run.seed", "run.threads", "lattice.shape", "sampler.prior.sector"]
    assert other.differences(config) == config.differences(other)


def test_differences_name_a_section_that_only_one_has_and_a_changed_kind():
    config = parse_config(U1)
    trained = parse_config(U1 + '[training]\n[sampler.flow]\nkind = "gauge"\n')
    assert config.differences(trained) == [
        *(
            "sampler.flow.kind",
            "sampler.flow.layers",
            "sampler.flow.bins",
            "sampler.flow.hidden",
            "sampler.flow.conditioner",
            "sampler.flow.kernel",
            "sampler.flow.polyakov",
            "sampler.flow.holonomy_pairs",
        ),
        "training",
    ]


def test_a_config_is_frozen_and_hashable():
    config = parse_config(U1)
    with pytest.raises(ValidationError, match="frozen"):
        config.action.beta = 3.0
    assert hash(config) == hash(parse_config(config.to_toml()))


def test_a_config_made_in_python_is_checked_too():
    action = {"kind": "scalar", "m2": 1.0, "lam": 0.0}
    assert Config(lattice={"shape": [4, 4]}, action=action).sampler.prior.kind == "normal"
    with pytest.raises(ConfigError, match=r"action\.m2"):
        Config(lattice={"shape": [4, 4]}, action={**action, "m2": 0.0})


WRONG = {
    "run.seed": ["-1", "true", "1.0", '"7"', "9223372036854775808", "0x" + "f" * 5000],
    "run.device": ["0", '""', "true"],
    "run.threads": ["0", "true", "2.0"],
    "lattice.shape": [
        "[]",
        "[8, 0]",
        "[8, -8]",
        "[8.0, 8]",
        "[true, 8]",
        '["8", 8]',
        "8",
        '"88"',
        "[65537, 8]",
        "[2, 2, 2, 2, 2]",
    ],
    "action.beta": ["-0.1", "true", '"2"', "nan", "inf", "-inf", "[2.0]", "1e7", "1" + "0" * 400, "2024-01-01"],
    "action.kappa": ["0.5", "-0.1", "nan", "inf", "false"],
    "action.flavours": ["0", "-2", "2.0", "true"],
    "action.holonomies": ["[12]", "[12, 6, 1]", "[0, 6]", "[12, 6.0]", "12", "{a = 1}"],
    "sampler.kind": ['"flows"', "1"],
    "sampler.prior.beta": ["-1.0", "nan"],
    "sampler.prior.sector": ["-0.6", "inf", "true"],
    "sampler.flow.layers": ["0", "8.0"],
    "sampler.flow.bins": ["1", "65"],
    "sampler.flow.hidden": ["[]", "[32, 0]", "32"],
    "sampler.flow.kernel": ["2", "0", "-1", "3.0", "true"],
    "sampler.flow.dilations": ["[0, 1, 1]", "[]", "1"],
    "training.estimator": ['"reparameterization"', "1", "[1]"],
    "training.steps": ["-1", "1e3", "true"],
    "training.batch": ["1", "0"],
    "training.accumulate": ["0"],
    "training.learning_rate": ["0", "-1e-3", "nan"],
    "training.betas": ["[0.9]", "[0.9, 1.0]", "[-0.1, 0.9]", "[0.9, nan]", "[true, 0.9]", "0.9"],
    "training.warmup": ["-1"],
    "training.decay": ['"linear"'],
    "training.gradient_clip": ["0.0", "inf"],
    "training.signal_clip": ["0", "-8.0"],
    "training.dtype": ['"float16"', "32"],
    "training.window": ["0"],
    "training.holonomies": ["[0, 1]", "[12]"],
    "training.checkpoint_every": ["0"],
    "training.samples": ['""', "1"],
    "training.start_from": ['""', "1"],
    "training.draws": ["1", "1e4", "true"],
    "training.validation": ["0", "1", "nan", '"0.2"'],
    "training.patience": ["0", "2.5"],
    "training.evaluate_every": ["0"],
    "training.processes": ["0", "4097", "1.0"],
    "chain.kernels": ['"hmc"', '["metropolis"]', "[]", "[1]"],
    "chain.start": ['"hot"'],
    "chain.thermalisation": ["-1", "1.5"],
    "chain.hmc.trajectory_length": ["0", "inf"],
    "chain.hmc.step_size": ["-0.1"],
    "chain.hmc.integrator": ['"euler"'],
    "chain.hmc.jitter": ["1", "-0.1"],
    "chain.flow_hmc.target_acceptance": ["0", "1"],
    "chain.replica": ["0"],
    "chain.draws": ["-1", "1.5"],
    "chain.block": ["0"],
    "chain.candidates": ["0"],
    "baseline.samples": ["1"],
    "baseline.beta": ["-1", "inf"],
    "baseline.sector": ["-1"],
    "analysis.s": ["0", "nan", "true"],
    "analysis.observables": ['"plaquette"', "[1]", "1"],
    "analysis.reference": ['""', "1"],
}


@pytest.mark.parametrize(("path", "value"), [(path, value) for path, values in WRONG.items() for value in values])
def test_wrong_types_and_ranges_are_named(gauge, problems, path, value):
    found = problems(gauge, f"{path}={value}")
    assert list(found) == [path]
    assert found[path].expected
    assert found[path].found != "nothing"


@pytest.mark.parametrize(
    ("path", "low", "high"),
    [
        ("action.kappa", "0", "0.499"),
        ("action.beta", "0", "1e6"),
        ("sampler.flow.bins", "2", "64"),
        ("run.seed", "0", "0x7fffffffffffffff"),
    ],
)
def test_bounds_themselves_are_allowed(gauge, path, low, high):
    for value in (low, high):
        parse_config(gauge, [f"{path}={value}"])
