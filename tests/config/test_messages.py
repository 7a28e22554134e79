"""What a user reads: suggestions for misspelt keys, every problem at once, nothing of pydantic."""

import re

import pytest

from latticeflow.config import ConfigError
from latticeflow.config.loading import parse_config

BROKEN = """\
[run]
sed = 7
threads = true

[lattice]
shape = [6, 8]
kappa = 0.276

[action]
kind = "schwingr"
beta = -2.0
kapa = 0.2

[sampler.flow]
kind = "gauge"
kernel = 4
dilations = [1, 2]

[trainning]
steps = 10

[training]
learning_rate = nan
batch = "128"
estimator = "path"
signal_clip = 8

[chain]
layers = 3
block = 0
"""


@pytest.mark.parametrize(
    ("path", "suggestion"),
    [
        ("run.sead", "did you mean seed?"),
        ("lattice.Shape", "did you mean shape?"),
        ("lattice.extents", ""),
        ("action.kapa", "did you mean kappa?"),
        ("action.flavors", "did you mean flavours?"),
        ("training.learning-rate", "did you mean learning_rate?"),
        ("training.warm_up", "did you mean warmup?"),
        ("trainning.steps", "did you mean training?"),
        ("sampler.piror", "did you mean prior?"),
        ("lattice.kappa", 'kappa belongs to [action] of kind "schwinger"'),
        ("training.seed", "seed belongs to [run]"),
        (
            "chain.layers",
            'layers belongs to [sampler] of kind "stabilised" or '
            '[sampler.flow] of kind "gauge", "coupling" or "linear"',
        ),
        ("sampler.prior.scale", 'scale belongs to [action] of kind "funnel" or [sampler.prior] of kind "normal"'),
        ("sampler.tau", 'tau belongs to [sampler] of kind "stabilised"'),
        ("chain.learning_rat", "did you mean learning_rate of [training]?"),
        ("chain.analysi", "did you mean analysis of the top level?"),
    ],
)
def test_unknown_keys_come_with_the_nearest_known_one(gauge, problems, path, suggestion):
    found = problems(gauge, f"{path}=1")
    (problem,) = found.values()
    assert path.startswith(problem.path)
    assert problem.suggestion == suggestion


def test_a_near_key_and_the_owner_of_an_exact_one_are_both_named(gauge, problems):
    suggestion = problems(gauge, "training.beta=[0.9, 0.99]")["training.beta"].suggestion
    assert suggestion.startswith("did you mean betas? beta belongs to [action]")
    assert "[baseline]" in suggestion


def test_a_key_above_all_sections_is_sent_to_its_own(gauge, problems):
    assert problems(f"seed = 3\n{gauge}")["seed"].suggestion == "seed belongs to [run]"


@pytest.mark.parametrize(
    ("path", "word", "meant"),
    [
        ("action.kind", "Schwinger-model", '"schwinger"'),
        ("action.kind", "U1", '"u1"'),
        ("sampler.flow.kind", "guage", '"gauge"'),
        ("training.estimator", "reparameterization", '"reparametrisation"'),
        ("training.dtype", "float_64", '"float64"'),
    ],
)
def test_misspelt_choices_come_with_the_nearest_one(gauge, problems, path, word, meant):
    problem = problems(gauge, f"{path}={word}")[path]
    assert meant in problem.suggestion
    assert meant in problem.expected


def test_a_section_with_a_misspelt_kind_is_checked_as_the_nearest_one(gauge, problems):
    found = problems(gauge, "action.kind=schwingr", "action.kapa=1", "action.beta=-1")
    assert set(found) == {"action.kind", "action.kapa", "action.beta"}


def test_missing_sections_and_keys_are_named(problems):
    assert set(problems("")) == {"lattice", "action"}
    assert set(problems("[action]\nbeta = 1\n[lattice]\n")) == {"action.kind", "lattice.shape"}
    assert problems('[action]\nkind = "u1"\n[lattice]\nshape = [8, 8]\n')["action.beta"].found == "nothing"


@pytest.mark.parametrize("value", ["3", "[]", '"x"', "true", "[{}]"])
@pytest.mark.parametrize("section", ["run", "lattice", "action", "sampler", "sampler.prior", "training", "baseline"])
def test_a_section_that_is_a_value_is_named(problems, section, value):
    known = {"lattice": "{shape = [8, 8]}", "action": '{kind = "u1", beta = 1}'}
    lines = [f"{key} = {text}" for key, text in {**known, section: value}.items()]
    found = problems("\n".join(lines))
    assert list(found) == [section]
    assert f"a section [{section}]" in found[section].expected
    assert found[section].found == ("[a section]" if value == "[{}]" else value)


def test_odd_keys_are_quoted_in_ascii(gauge, problems):
    (path,) = problems(f'{gauge}"a.b\\u00e9 " = 1\n')
    assert path == 'analysis."a.b\\u00e9 "'


def test_every_problem_is_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        parse_config(BROKEN, ["x", "chn.foo=1"], source="broken.toml")
    paths = {problem.path for problem in caught.value.problems}
    assert paths == {
        'override "x"',
        *("run.sed", "run.threads", "lattice.kappa"),
        *("action.kind", "action.beta", "action.kapa", "action.kappa"),
        *("sampler.flow.kernel", "sampler.flow.dilations", "trainning", "chn"),
        *("training.learning_rate", "training.batch", "training.signal_clip", "chain.layers", "chain.block"),
    }
    header, *lines = str(caught.value).splitlines()
    assert header == 'broken.toml (with "x", "chn.foo=1"): 17 problems'
    assert len(lines) == 17
    assert all(re.match(r"  .+: expected .+, found .+", line) for line in lines)


def test_nothing_of_pydantic_is_said():
    with pytest.raises(ConfigError) as caught:
        parse_config(BROKEN)
    assert not re.search(r"pydantic|union|tag|Input|validation|literal|extra_|_type|Traceback", str(caught.value))
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_long_values_are_cut(gauge, problems):
    assert len(problems(gauge, f"lattice.shape={[0] * 5000}")["lattice.shape"].found) < 100
