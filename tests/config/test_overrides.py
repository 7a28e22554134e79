"""Settings from the command line."""

import pytest

from latticeflow.config.loading import parse_config


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("run.seed=3", "run", "seed", 3),
        (" run.seed = 3 ", "run", "seed", 3),
        ("run.device=cuda:0", "run", "device", "cuda:0"),
        ('run.device="cuda:1"', "run", "device", "cuda:1"),
        ("action.beta=1e-3", "action", "beta", 1e-3),
        ("lattice.shape=[4, 16]", "lattice", "shape", (4, 16)),
        ("analysis.observables=[]", "analysis", "observables", ()),
        ("training.decay=none", "training", "decay", "none"),
    ],
)
def test_a_value_is_toml_or_a_bare_word(gauge, override, section, key, value):
    assert getattr(getattr(parse_config(gauge, [override]), section), key) == value


def test_sections_are_made_and_later_overrides_win(scalar):
    assert parse_config(scalar, ["chain.draws=5", "chain.draws=6"]).chain.draws == 6


def test_a_table_can_be_replaced(gauge):
    overrides = ['sampler.flow={kind = "identity"}', "training.steps=0"]
    assert parse_config(gauge, overrides).sampler.flow.kind == "identity"


@pytest.mark.parametrize(
    "override",
    [
        "",
        "=",
        "run.seed",
        "seed=3",
        "=3",
        "run.=3",
        ".seed=3",
        "run..seed=3",
        "run seed.x=3",
        "run.s\u00e9ed=3",
        '"run".seed=3',
    ],
)
def test_bad_keys_are_problems(gauge, problems, override):
    (problem,) = problems(gauge, override).values()
    assert problem.path.startswith('override "')
    assert problem.expected == "section.key=value"


@pytest.mark.parametrize("value", ["", "[1, 2", '"open', "two words", "1\nother = 2", "{a", "[" * 5000])
def test_bad_values_are_problems(gauge, problems, value):
    (problem,) = problems(gauge, f"run.seed={value}").values()
    assert problem.path.startswith('override "run.seed=')
    assert "TOML value" in problem.expected


def test_a_path_through_a_value_is_a_problem(gauge, problems):
    (problem,) = problems(gauge, "lattice.shape.first=4").values()
    assert problem.expected == "a section [lattice.shape]"
    assert problem.found == "[8, 8]"


def test_unknown_sections_and_wrong_values_are_problems_like_others(gauge, problems):
    found = problems(gauge, "trainig.steps=5", "run.seed=True", "bad")
    assert set(found) == {"trainig", "run.seed", 'override "bad"'}
    assert found["trainig"].suggestion == "did you mean training?"
    assert found["run.seed"].found == '"True"'
