"""300 damaged configurations through the command line: exit code 78, every problem named, nothing made."""

import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest

from latticeflow.cli import main
from latticeflow.config import Config, load_config
from latticeflow.config.loading import parse_config

BAD_CONFIG, INVALID, CHECKED = 78, 300, 15

GAUGE = """\
[run]
seed = 7
device = "cpu"
[lattice]
shape = [8, 8]
[action]
kind = "schwinger"
beta = 2.0
kappa = 0.276
holonomies = [12, 6]
[sampler]
kind = "flow"
[sampler.prior]
kind = "quenched"
beta = 2.35
sector = 0.6
[sampler.flow]
kind = "gauge"
layers = 8
hidden = [32, 32]
dilations = [1, 1, 2]
[training]
estimator = "reinforce"
steps = 2000
learning_rate = 1e-3
betas = [0.9, 0.99]
signal_clip = 8
holonomies = [12, 1]
[chain]
kernels = ["hmc", "winding", "independence"]
replica = 16
draws = 128
[chain.hmc]
integrator = "omelyan"
[chain.flow_hmc]
target_acceptance = 0.7
[baseline]
samples = 1000
[analysis]
observables = ["plaquette", "topological_charge2"]
"""

SCALAR = """\
[lattice]
shape = [4, 4, 8]
[action]
kind = "scalar"
m2 = -4
lam = 8.0
[sampler.prior]
kind = "normal"
scale = 0.5
[chain]
kernels = ["hmc"]
start = "cold"
"""

STABILISED = """\
[lattice]
shape = [10]
[action]
kind = "student_t"
degrees_of_freedom = 1.0
[sampler]
kind = "stabilised"
layers = 32
mask = "random"
transform = "spline"
clamp = "asymmetric"
clamp_positive = 0.1
conditioner = "dense"
hidden = [100]
tau = 100.0
[sampler.prior]
kind = "student_t"
degrees_of_freedom = 30.0
sites = "own"
[training]
learning_rate = 1e-3
dtype = "float64"
[chain]
replica = 16
draws = 128
[analysis]
observables = ["first_coordinate", "coordinates_squared"]
"""

SHIPPED = sorted((Path(__file__).parents[1] / "runs").glob("*.toml"))
TEXTS = [
    *(path.read_text().replace('device = "cuda"', 'device = "cpu"') for path in SHIPPED),
    GAUGE,
    SCALAR,
    STABILISED,
]

ANY_VALUE = [
    *("-1", "0", "1", "6", "2.5", "0.5", "nan", "-inf", "true", '"7"', '"u1"', '"scalar"', '"identity"', '"haar"'),
    *("[]", "[6, 8]", "[8]", "[0, 1]", "[nan, 0.5]", "[[1], 2]", "{}", "{a = 1}", "1979-05-27", "9" * 30, "0xffff"),
    *('"forward_kl"', '["winding"]', "", "?", "'open", "[1,", "1 2"),
]
NEVER_RIGHT = ["nan", "-inf", "inf", "{a = 1}", "1979-05-27", "[[[]]]", "true", "9" * 30, "-" + "9" * 5000]
OUT_OF_RANGE = {
    "integer": ["-1", "-9223372036854775808", "9223372036854775808", "1" + "0" * 40],
    "number": ["nan", "inf", "-inf", "-1e400", "1e400", "-0.001"],
    "list": ["[-1, 8]", "[0, 0]", "[nan, inf]", "[1e400, 4]", "[[-1.0, 2.0]]", "[9223372036854775808, 4]"],
    "string": ['""', '"no such thing"', '"\\u0000"', "'\U0001f4a5'"],
}
EXTENTS = ["[6, 8]", "[8, 6]", "[2, 2]", "[7, 7]", "[4]", "[4, 4, 4]", "[0, 4]", "[65537, 4]", "[]", "[4, 4, 4, 4, 4]"]


@dataclass(frozen=True)
class Mutation:
    """A damaged file; the message must have one word of each of `names`."""

    content: bytes
    names: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    err: str


Mutator = Callable[[list[str], random.Random], Mutation]


# ---------------------------------------------------------------- lines of a file


def key_lines(lines: list[str]) -> list[int]:
    return [number for number, line in enumerate(lines) if re.match(r"\w+ = ", line)]


def headers(lines: list[str]) -> list[int]:
    return [number for number, line in enumerate(lines) if line.startswith("[")]


def section_of(lines: list[str], place: int) -> str:
    return next((line.strip("[]") for line in reversed(lines[: place + 1]) if line.startswith("[")), "")


def path_of(lines: list[str], place: int) -> str:
    return f"{section_of(lines, place)}.{lines[place].split(' = ')[0]}"


def names_of(lines: list[str], place: int) -> tuple[str, ...]:
    """Return how a message may name a key; a kind decides which other keys of its section are known."""
    path = path_of(lines, place)
    return (path.removesuffix("kind") if path.endswith(".kind") else path, f"line {place + 1}:")


def words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text))


def with_value(lines: list[str], place: int, value: str) -> list[str]:
    """Return the lines with another value of a key, also where the old one takes several lines."""
    end = place + 1
    while lines[place].endswith("[") and lines[end - 1] != "]":
        end += 1
    return [*lines[:place], f"{lines[place].split(' = ')[0]} = {value}", *lines[end:]]


def mutation(lines: list[str], *names: tuple[str, ...]) -> Mutation:
    return Mutation("\n".join(lines).encode(), names)


# ---------------------------------------------------------------- what can go wrong with a file


def drop_line(lines, rng):
    """The key itself is missing, or what followed a header is in the wrong section, or was several lines long."""
    place = rng.choice([number for number, line in enumerate(lines) if line.strip() and not line.startswith("#")])
    rest = "\n".join(lines[place:]).split("\n[")[0]
    names = words(rest) if lines[place].startswith("[") else (path_of(lines, place), "line ")
    if "sampler.kind" in names:  # without one it is "flow", and the keys that are left say of which kind they are
        names = (*names, '[sampler] of kind "')
    return mutation(lines[:place] + lines[place + 1 :], names)


def misspell_name(lines, rng):
    place = rng.choice(key_lines(lines) + headers(lines))
    old = rng.choice(re.findall(r"[A-Za-z]\w+", lines[place].split("=")[0]))
    new = misspelt(old, rng)
    return mutation([*lines[:place], lines[place].replace(old, new, 1), *lines[place + 1 :]], (new or '""', old))


def misspelt(word: str, rng: random.Random) -> str:
    at = rng.randrange(len(word))
    return word[:at] + rng.choice(["", "q", "_x", "-", word[at] * 2, word[at].upper()]) + word[at + 1 :]


def misspell_choice(lines, rng):
    """Kinds, estimators, kernels, observables that do not exist."""
    place = rng.choice([number for number in key_lines(lines) if '"' in lines[number]])
    old = rng.choice(re.findall(r'"(\w+)"', lines[place]))
    changed = lines[place].replace(f'"{old}"', f'"{misspelt(old, rng)}"', 1)
    return mutation([*lines[:place], changed, *lines[place + 1 :]], names_of(lines, place))


def duplicate_key(lines, rng):
    place = rng.choice([number for number in key_lines(lines) if not lines[number].endswith("[")])
    return mutation([*lines[: place + 1], *lines[place:]], (f"line {place + 2}:",))


def duplicate_section(lines, rng):
    """The whole of it, or its header alone, at the end of the file."""
    place = rng.choice(headers(lines))
    body = "\n".join(lines[place:]).split("\n[")[0].split("\n")
    again = rng.choice([body, body[:1]])
    return mutation([*lines, *again], (f"line {len(lines) + 1}:",))


def wrong_type(lines, rng):
    place = rng.choice(key_lines(lines))
    return mutation(with_value(lines, place, rng.choice(NEVER_RIGHT)), names_of(lines, place))


def out_of_range(lines, rng):
    place = rng.choice(key_lines(lines))
    value = lines[place].split(" = ")[1]
    kind = "list" if value.startswith("[") else "string" if value.startswith('"') else "integer"
    kind = "number" if kind == "integer" and re.search(r"[.e]", value) else kind
    return mutation(with_value(lines, place, rng.choice(OUT_OF_RANGE[kind])), names_of(lines, place))


def any_value(lines, rng):
    """Values that some keys take, and text that is no value; a list without an end is noticed where it goes on."""
    place = rng.choice(key_lines(lines))
    changed = with_value(lines, place, rng.choice(ANY_VALUE))
    after = next((number for number in range(place + 1, len(changed)) if changed[number]), place)
    return mutation(changed, (*names_of(lines, place), f"line {after + 1}:"))


def other_extents(lines, rng):
    place = lines.index("[lattice]") + 1
    return mutation(with_value(lines, place, rng.choice(EXTENTS)), ("lattice.shape",))


def move_line(lines, rng):
    place, target = rng.choice(key_lines(lines)), rng.choice(key_lines(lines))
    rest = lines[:place] + lines[place + 1 :]
    names = (path_of(lines, place), f".{lines[place].split(' = ')[0]}", "line ")
    return mutation(rest[:target] + [lines[place]] + rest[target:], names)


def stray_line(lines, rng):
    """A key or a section of another program, an array of tables, a word, a merge conflict."""
    place = rng.choice([0, *headers(lines)])
    stray, name = rng.choice(
        [("colour = 1", "colour"), ("[extra.deep]", "extra"), ("[[chain]]", "line "), ("word", f"line {place + 1}:")]
        + [("<<<<<<< HEAD", f"line {place + 1}:"), ('"a b" = 2', '"a b"'), ("[[many]]", "many"), ("= 1", "line ")]
    )
    return mutation([*lines[:place], stray, *lines[place:]], (name,))


def truncate(lines, rng):
    """Cut anywhere: what names the problem is in the last line or in what is gone."""
    text = "\n".join(lines)
    cut = rng.randrange(len(text))
    last = text.count("\n", 0, cut)
    return Mutation(text[:cut].encode(), ((f"line {last + 1}:", *words("\n".join(lines[last:])), "lattice", "action"),))


def reencode(lines, rng):
    text = "\n".join(lines)
    codec, comment = rng.choice(
        [("latin-1", "\u00fc"), ("utf-16", ""), ("utf-16-le", "\u00fc"), ("utf-16-be", ""), ("utf-32-be", "\u00fc")]
        + [("cp1252", "\u20ac"), ("utf-8-sig", "\u00fc")]
    )
    return Mutation(f"# {comment}\n{text}".encode(codec), (("line 1:",),))


def damage_byte(lines, rng):
    """One byte replaced by what is no UTF-8, or by a control character, which TOML has nowhere."""
    content = bytearray("\n".join(lines).encode())
    place = rng.randrange(len(content))
    line = content.count(b"\n", 0, place) + 1
    content[place] = rng.choice([rng.randrange(128, 256), rng.choice([0, 1, 8, 27, 127])])
    return Mutation(bytes(content), ((f"line {line}:",),))


def several(lines, rng):
    """A wrong value in each of two to four sections: all must be in one message. A large integer may be a number.

    What belongs to a section whose kind is wrong is not known, so nothing need be said of it.
    """
    names = sorted({section_of(lines, place) for place in key_lines(lines)})
    chosen = rng.sample(names, min(len(names), rng.randrange(2, 5)))
    places = [rng.choice([p for p in key_lines(lines) if section_of(lines, p) == name]) for name in chosen]
    paths = [path_of(lines, place) for place in places]
    for place in sorted(places, reverse=True):
        lines = with_value(lines, place, rng.choice(NEVER_RIGHT[:-2]))
    unknown = [path.removesuffix("kind") for path in paths if path.endswith(".kind")]
    known = [path for path in paths if not any(path.startswith(one) and path != f"{one}kind" for one in unknown)]
    return mutation(lines, *((path,) for path in known))


MUTATORS: list[Mutator] = [drop_line, misspell_name, misspell_choice, duplicate_key, duplicate_section, wrong_type]
MUTATORS += [out_of_range, any_value, other_extents, move_line, stray_line, truncate, reencode, damage_byte, several]


# ---------------------------------------------------------------- the program on them


def call(*arguments: object) -> Outcome:
    """Return the outcome of a command; an exception that it lets through fails the test."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()) as err:
        code = main([str(argument) for argument in arguments])
    return Outcome(code, err.getvalue())


def problems(error: str, source: object) -> list[str]:
    """Return the problems in a refusal, which must be whole: a header with their number, then one line for each."""
    header, *lines = error.splitlines()
    found = re.fullmatch(rf"latticeflow: {re.escape(str(source))}( \(with .*\))?: (\d+) problems?", header)
    assert found, error
    assert len(lines) == int(found[2]) > 0, error
    assert all(re.fullmatch(r"  \S.*: expected .+, found .+", line) for line in lines), error
    assert len(set(lines)) == len(lines), error
    return lines


def explained(error: str, source: object, names: tuple[tuple[str, ...], ...]) -> None:
    text = "\n".join(problems(error, source))
    assert all(any(name in text for name in choice) for choice in names), (names, error)


@pytest.fixture
def only_validated(monkeypatch) -> None:
    """Let `check` stop after the validation, so that valid files cost nothing."""
    monkeypatch.setattr("latticeflow.cli.inspect.describe", lambda config: "valid")
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)


def drawn(mutate: Mutator, path: Path) -> tuple[list[Mutation], list[Mutation]]:
    """Return the invalid and the valid ones among mutations, drawn until there are enough invalid ones."""
    rng, invalid, valid = random.Random(mutate.__name__), [], []
    while len(invalid) < INVALID // len(MUTATORS):
        assert len(valid) < 40 * (1 + len(invalid)), "the mutation hardly ever does harm"
        mutated = mutate(rng.choice(TEXTS).splitlines(), rng)
        (valid if is_valid(path, mutated) else invalid).append(mutated)
    return invalid, valid


def is_valid(path: Path, mutated: Mutation) -> bool:
    path.write_bytes(mutated.content)
    outcome = call("check", path)
    assert outcome.code in (0, BAD_CONFIG), outcome
    return outcome.code == 0


@pytest.mark.usefixtures("only_validated")
@pytest.mark.parametrize("mutate", MUTATORS, ids=lambda mutate: mutate.__name__)
def test_invalid_files_are_refused_and_explained(tmp_path, mutate):
    """By every command alike; the ones that stay valid survive being written and read again."""
    path = tmp_path / "run.toml"
    invalid, valid = drawn(mutate, path)
    assert len(invalid) * len(MUTATORS) == INVALID
    for mutated in invalid:
        path.write_bytes(mutated.content)
        outcomes = [call(command, path) for command in ("check", "train", "run")]
        assert {outcome.code for outcome in outcomes} == {BAD_CONFIG}
        assert len({outcome.err for outcome in outcomes}) == 1
        explained(outcomes[0].err, path, mutated.names)
        assert os.listdir(tmp_path) == ["run.toml"]
    for mutated in valid:
        path.write_bytes(mutated.content)
        assert parse_config(load_config(path).to_toml()) == load_config(path)


def small(config: Config) -> Iterator[str]:
    """Yield overrides that make a valid configuration cheap to try, without keys that it has no use for."""
    yield from ("run.device=cpu", "run.threads=1", "chain.replica=2", "chain.candidates=4", "chain.draws=4")
    yield f"lattice.shape={[4] * len(config.lattice.shape)}"
    if config.training is not None:
        yield "training.batch=2"
    if config.sampler.kind == "stabilised":
        yield "sampler.layers=2"
    elif config.sampler.flow.kind == "gauge":
        yield from ("sampler.flow.layers=1", "sampler.flow.bins=2")
    if hasattr(config.action, "holonomies"):
        yield "action.holonomies=[1, 1]"


def some_valid(path: Path) -> Iterator[Mutation]:
    """Yield at most one valid mutation of each kind; some kinds of damage never leave a valid file."""
    for mutate in MUTATORS:
        rng = random.Random(f"valid {mutate.__name__}")
        tried = (mutate(rng.choice(TEXTS).splitlines(), rng) for _ in range(20))
        yield from [mutated for mutated in tried if is_valid(path, mutated)][:1]


def test_files_that_stay_valid_can_be_tried(tmp_path):
    """`check` builds, and takes one step of, all that such a file names."""
    path = tmp_path / "run.toml"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("latticeflow.cli.inspect.describe", lambda config: "valid")
        found = list(some_valid(path))
    assert 5 <= len(found) <= CHECKED
    for mutated in found:
        path.write_bytes(mutated.content)
        changes = [word for change in small(load_config(path)) for word in ("--set", change)]
        assert call("check", path, *changes).code in (0, BAD_CONFIG), mutated.content.decode()


@pytest.mark.usefixtures("only_validated")
def test_the_files_to_start_from_are_valid(tmp_path):
    assert len(SHIPPED) >= 5
    for text in TEXTS:
        (tmp_path / "run.toml").write_text(text)
        assert call("check", tmp_path / "run.toml").code == 0


# ---------------------------------------------------------------- overrides


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(GAUGE)
    return path


def changing(*changes: str) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


OVERRIDES = [
    ("actoin.beta=2.0", "actoin"),
    ("action.betta=2.0", "action.betta"),
    ("chain.hmc.step=1", "chain.hmc.step"),
    ("beta=2.0", 'override "beta=2.0"'),
    ("action.beta", 'override "action.beta"'),
    ("action.beta=", 'override "action.beta="'),
    ("=2", 'override "=2"'),
    (".beta=2", 'override ".beta=2"'),
    ("action..beta=2", 'override "action..beta=2"'),
    ("action.beta = [1,", "override"),
    ("action.beta=1 2", "override"),
    ("action.beta=1\naction.kappa=0", "override"),
    ("action.beta='open", "override"),
    ("action.beta.deep=1", "override"),
    ("action.beta=two", "action.beta"),
    ("action.beta=true", "action.beta"),
    ("action.beta=nan", "action.beta"),
    ("action.beta=1e400", "action.beta"),
    ("action.beta=-1", "action.beta"),
    ("action.beta=" + "9" * 5000, "action.beta"),
    ("action.beta=" + "[" * 5000, "action.beta"),
    ("action={a = 1}.b", "override"),
    ("action.kind=schwingr", "action.kind"),
    ("chain.draws=128.0", "chain.draws"),
    ("chain.draws=-4", "chain.draws"),
    ("chain.draws=0x1ffffffffffffffff", "chain.draws"),
    ("chain.kernels=hmc", "chain.kernels"),
    ("chain.hmc=3", "chain.hmc"),
    ("lattice.shape=[6, 4]", "lattice.shape"),
    ("run.device=abacus", "run.device"),
    ("run.device=cuda:-3", "run.device"),
    ("run.device='cuda:4096'", "run.device"),
    ("analysis.observables=['plakette']", "analysis.observables"),
    ("analysis.reference=nowhere", "analysis.reference"),
    ("action.beta=\udcff", "action.beta"),
    ("\udcff.beta=1", "override"),
]


@pytest.mark.parametrize("command", ["run", "train", "check"])
def test_wrong_overrides_are_refused_and_named(config, command):
    for override, name in OVERRIDES:
        outcome = call(command, config, "--set", override)
        assert outcome.code == BAD_CONFIG, override
        explained(outcome.err, config, ((name,),))
        assert os.listdir(config.parent) == ["run.toml"]


def test_mistakes_of_file_and_overrides_come_together(config):
    config.write_text(GAUGE.replace("kappa = 0.276", "kapa = 0.276").replace("draws = 128", 'draws = "128"'))
    outcome = call("check", config, *changing("action.beta=-1", "no equals", "training.window=0"))
    names = ("action.kapa", "action.kappa", "chain.draws", "action.beta", 'override "no equals"', "training.window")
    explained(outcome.err, config, tuple((name,) for name in names))
    assert len(problems(outcome.err, config)) == len(names)


def test_nothing_is_allocated_for_a_file_with_a_mistake(config):
    """Were one of these counts taken seriously before the mistake is found, the memory would not do."""
    huge = ("lattice.shape=[4096, 4096]", f"chain.replica={10**7}", f"chain.candidates={10**7}", "training.batch=2")
    huge += (f"sampler.flow.layers={2**62}", f"action.holonomies=[{2**40}, {2**40}]", "baseline.colour=1")
    outcome = call("run", config, *changing(*huge))
    assert outcome.code == BAD_CONFIG
    assert len(problems(outcome.err, config)) == 1
    assert os.listdir(config.parent) == ["run.toml"]


@pytest.mark.parametrize("change", ["run.threads=9223372036854775807", "run.device=meta", "chain.hmc.step_size=1e-320"])
@pytest.mark.parametrize("command", ["check", "run"])
def test_values_that_no_machine_can_follow_are_refused(config, monkeypatch, command, change):
    """They are in the range of their type, yet cannot be carried out. The number of threads is kept as it is."""
    monkeypatch.setattr("torch.set_num_threads", strict_threads)
    short = ("training.steps=1", "chain.thermalisation=1")
    outcome = call(command, config, *changing(*small(load_config(config)), *short, change))
    assert outcome.code == BAD_CONFIG
    assert change.partition("=")[0] in outcome.err
    assert os.listdir(config.parent) == ["run.toml"]


def strict_threads(number: int) -> None:
    """Refuse as torch does what its C int does not hold, and change nothing."""
    if number >= 2**31:
        raise ValueError("Overflow when unpacking long")


@pytest.mark.parametrize(("m2", "scale"), [("1e308", "1.0"), ("1.0", "1e308")])
@pytest.mark.parametrize("kernel", ["independence", "hmc"])
def test_check_survives_a_theory_without_finite_weights(config, kernel, m2, scale):
    """`run` ends with exit code 1 there and says that no proposal has a finite weight; so should `check`."""
    config.write_text(SCALAR.replace("scale = 0.5", f"scale = {scale}").replace("m2 = -4", f"m2 = {m2}"))
    outcome = call("check", config, *changing(f"chain.kernels=['{kernel}']", "chain.replica=2"))
    assert outcome.code in (0, 1, BAD_CONFIG)


# ---------------------------------------------------------------- files that are no configuration


UNREADABLE = {
    "a folder": lambda path: path.mkdir(),
    "an empty file": lambda path: path.write_bytes(b""),
    "blanks": lambda path: path.write_text(" \n\t\n# nothing\n"),
    "zeros": lambda path: path.write_bytes(bytes(512)),
    "a binary file": lambda path: path.write_bytes(random.Random(1).randbytes(4096)),
    "an HDF5 file": lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(96)),
    "JSON": lambda path: path.write_text('{"lattice": {"shape": [4, 4]}}\n'),
    "deep": lambda path: path.write_text("a = " + "[" * 20_000),
    "long": lambda path: path.write_text("[lattice]\nshape = [4, 4]\n[action]\nbeta = " + "9" * 10_000),
    "missing": lambda path: None,
    "a link to itself": lambda path: path.symlink_to(path),
    "a dangling link": lambda path: path.symlink_to(path.with_name("nowhere")),
}


@pytest.mark.parametrize("command", ["run", "train", "check"])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_is_no_configuration_is_refused(tmp_path, command, kind):
    path = tmp_path / "run.toml"
    UNREADABLE[kind](path)
    before = os.listdir(tmp_path)
    outcome = call(command, path)
    assert outcome.code == BAD_CONFIG
    explained(outcome.err, path, (("the file", "line 1:", "line 4:", "lattice"),))
    assert os.listdir(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_refused(config):
    config.chmod(0)
    outcome = call("run", config)
    assert outcome.code == BAD_CONFIG
    explained(outcome.err, config, (("the file",),))


@pytest.mark.parametrize("name", ["none.toml\0", "n" * 300, ""])
def test_impossible_names_are_refused(name):
    assert call("run", name).code == BAD_CONFIG


DAMAGES = {
    "line 3:": lambda text: text.replace("seed = 1", "seed = ", 1),
    "line 2:": lambda text: "# fine\n# \udcff\n" + text,
    "action.beta": lambda text: text.replace("beta = 2.0", "beta = -2.0", 1),
    "chain.replicas": lambda text: text.replace("replica = 4", "replicas = 4", 1),
    "lattice": lambda text: "",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run folder, trained for no steps."""
    path = tmp_path_factory.mktemp("folder") / "run.toml"
    path.write_text(
        '# written by hand\n[run]\nseed = 1\n[lattice]\nshape = [4, 4]\n[action]\nkind = "u1"\nbeta = 2.0\n'
        "[chain]\nreplica = 4\ndraws = 8\n"
    )
    assert call("train", path).code == 0
    (path.with_suffix("") / "config.toml").write_text(path.read_text())
    return path.with_suffix("")


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_configuration_of_a_run_folder_is_refused(folder, name):
    stored, before = folder / "config.toml", sorted(os.listdir(folder))
    whole = stored.read_text()
    damaged = DAMAGES[name](whole).encode("utf-8", "surrogateescape")
    assert damaged != whole.encode()
    stored.write_bytes(damaged)
    try:
        outcomes = [call(command, folder) for command in ("sample", "measure", "analyse", "plot")]
        outcomes.append(call("run", folder.with_suffix(".toml"), "--resume"))
    finally:
        kept = stored.read_bytes()
        stored.write_text(whole)
    for outcome in outcomes:
        assert outcome.code == BAD_CONFIG
        explained(outcome.err, stored, ((name,),))
    assert kept == damaged
    assert sorted(os.listdir(folder)) == before


# ---------------------------------------------------------------- as a process of its own


@pytest.mark.parametrize(
    ("content", "command", "name"),
    [
        (GAUGE.replace("kappa", "kapa").replace("replica = 16", "replica = -1").encode(), "run", "chain.replica"),
        (bytes(range(256)), "train", "line 2:"),
    ],
    ids=["mistakes", "binary"],
)
def test_from_a_shell(tmp_path, content, command, name):
    (tmp_path / "run.toml").write_bytes(content)
    process = subprocess.run(
        [sys.executable, "-m", "latticeflow", command, "run.toml", "--set", "action.beta=2"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == BAD_CONFIG
    assert process.stdout == ""
    explained(process.stderr, "run.toml", ((name,),))
    assert os.listdir(tmp_path) == ["run.toml"]
