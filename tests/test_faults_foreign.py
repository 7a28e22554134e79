"""Files that do not belong to a run: other ensembles, other checkpoints, hostile ones, and another configuration.

Each is refused with what differs, nothing is changed, and a damaged checkpoint falls back to the one before.
"""

import dataclasses
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from hashlib import sha256
from io import StringIO
from pathlib import Path
from types import ModuleType

import h5py
import numpy as np
import pytest
import torch

from latticeflow.cli import commands, folder, main, metrics
from latticeflow.mcmc import IndependenceMetropolis
from latticeflow.storage import Ensemble

CONFIG = """
[run]
seed = 5
threads = 1
[lattice]
shape = [4, 4]
[action]
kind = "u1"
beta = 2.0
[sampler.prior]
kind = "quenched"
beta = 1.5
[sampler.flow]
kind = "gauge"
layers = 2
hidden = [4]
[training]
steps = 6
batch = 4
checkpoint_every = 2
[chain]
kernels = ["independence"]
replica = 4
draws = 64
block = 16
thermalisation = 0
candidates = 8
"""
ENSEMBLE, SECOND = "ensemble.h5", "ensemble-2.h5"
CHAIN, TRAINING = "checkpoint/chain", "checkpoint/training"


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


def program(*words: object) -> Outcome:
    """Run a command as from a shell; an exception that it lets pass fails the test."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = main([str(word) for word in words])
    return Outcome(code, out.getvalue(), err.getvalue())


def refused(*words: object, code: int = 65) -> str:
    outcome = program(*words)
    assert outcome.code == code, (words, outcome)
    return outcome.err


def done(*words: object) -> Outcome:
    outcome = program(*words)
    assert outcome.code == 0, (words, outcome)
    return outcome


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """They take longer than all the rest; what they read first is read."""

    def read_only(run: folder.RunFolder, *, skip_damaged: bool = False) -> list[str]:
        run.ensemble(skip_damaged=skip_damaged).close()
        return []

    monkeypatch.setattr(commands, "draw_figures", read_only)


@dataclass(frozen=True)
class Lives:
    """One run at four moments: trained for 5 of 6 steps, with 64 draws, stopped at 80 of 96, and finished."""

    half_trained: Path
    short: Path
    stopped: Path
    finished: Path


def copied(run: Path, path: Path) -> Path:
    return Path(shutil.copytree(run, path))


@contextmanager
def interrupted(module: ModuleType, name: str, last: Callable[..., bool]) -> Iterator[None]:
    """Interrupt the program after the call of a function that is the last one."""
    original = getattr(module, name)

    def called(*arguments: object) -> object:
        result = original(*arguments)
        if last(*arguments):
            raise KeyboardInterrupt
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, called)
        yield


@pytest.fixture(scope="module")
def lives(tmp_path_factory) -> Lives:
    base = tmp_path_factory.mktemp("foreign")
    run, config = base / "run", base / "run.toml"
    config.write_text(CONFIG)
    with interrupted(metrics, "append_line", lambda _, line: json.loads(line)["step"] == 5):
        assert program("train", config).code == 130
    half_trained = copied(run, base / "half_trained")
    done("train", config, "--resume")
    done("sample", run)
    short = copied(run, base / "short")
    with interrupted(folder, "save_checkpoint", lambda path, _, step: step == 80):
        assert program("sample", run, "--extend", 32).code == 130
    stopped = copied(run, base / "stopped")
    for stage in ("sample", "measure", "analyse"):
        done(stage, run)
    return Lives(half_trained, short, stopped, run)


@pytest.fixture
def run(lives, tmp_path) -> Path:
    return copied(lives.finished, tmp_path / "run")


@pytest.fixture
def stopped(lives, tmp_path) -> Path:
    return copied(lives.stopped, tmp_path / "run")


@pytest.fixture
def half_trained(lives, tmp_path) -> Path:
    return copied(lives.half_trained, tmp_path / "run")


def sampled(path: Path, *changes: str) -> Path:
    """A run with a further file of the configuration above and some changes."""
    path.with_suffix(".toml").write_text(CONFIG)
    done("train", path.with_suffix(".toml"), *(word for change in changes for word in ("--set", change)))
    done("sample", path)
    done("sample", path, "--extend", 32)
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Callable[..., Path]:
    """Return a function from changes to a run that has them, each made once."""
    made: dict[tuple[str, ...], Path] = {}

    def make(*changes: str) -> Path:
        if changes not in made:
            made[changes] = sampled(tmp_path_factory.mktemp("other") / "run", *changes)
            done("measure", made[changes])
        return made[changes]

    return make


def contents(run: Path) -> dict[str, bytes]:
    """Every file of a run but its locks."""
    paths = (path for path in run.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


def rows(run: Path) -> dict[tuple[str, str], bytes]:
    """The configurations and what belongs to them, read by HDF5 alone."""
    found = {}
    for name in (ENSEMBLE, SECOND):
        with h5py.File(run / name) as file:
            for group in ("fields", "history", "checksum", "state"):
                found |= {(name, f"{group}/{key}"): item[()].tobytes() for key, item in file[group].items()}
    return found


def newest(run: Path, stage: str, back: int = 1) -> Path:
    return sorted((run / stage).glob("step-*.pt"))[-back]


def unchanged(run: Path, before: dict[str, bytes]) -> bool:
    """Whether nothing but the notes of a run's lives was written."""
    after = contents(run)
    return {key for key in before | after if before.get(key) != after.get(key)} <= {"provenance.json", "status.json"}


def again(run: Path, *options: str) -> list[object]:
    return ["run", run / "config.toml", "--out", run, "--resume", *options]


def restamped(path: Path, **attributes: object) -> None:
    with h5py.File(path, "r+") as file:
        for name, value in attributes.items():
            file.attrs[name] = value


FOREIGN = {
    "shape": ("lattice.shape=[8, 4]", "8, 4", "4, 4"),
    "coupling": ("action.beta=2.5", "2.5", "2.0"),
    "seed": ("run.seed=6", "6", "5"),
}
READERS = (
    *(("sample",), ("measure",), ("analyse",), ("plot",), ("verify",), ("export", "--to", "npz")),
    ("resume",),
)


def reading(run: Path, reader: tuple[str, ...]) -> list[object]:
    return again(run) if reader == ("resume",) else [reader[0], run, *reader[1:]]


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader[0])
@pytest.mark.parametrize("kind", FOREIGN)
def test_an_ensemble_of_another_run_is_refused_with_both_values(run, other, kind, reader):
    change, found, expected = FOREIGN[kind]
    for name in (ENSEMBLE, SECOND):
        shutil.copy(other(change) / name, run / name)
    before = contents(run)
    text = refused(*reading(run, reader))
    assert found in text
    assert expected in text.replace(found, "")
    assert unchanged(run, before)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader[0])
@pytest.mark.parametrize(
    ("attribute", "value", "found", "expected"),
    [("format_version", 3, "3", "2"), ("theory", "phi4", "phi4", "u1"), ("format", "other", "other", "latticeflow")],
)
def test_another_header_is_refused_with_both_values(run, attribute, value, found, expected, reader):
    restamped(run / ENSEMBLE, **{attribute: value})
    text = refused(*reading(run, reader))
    assert found in text
    assert expected in text


@pytest.mark.parametrize("command", ["sample", "measure", "analyse", "plot", "verify"])
def test_another_dtype_is_refused_with_both_values(run, command):
    (run / SECOND).unlink()
    with Ensemble.open(run / ENSEMBLE) as ensemble:
        config, links, action = ensemble.config, ensemble.field("links"), ensemble.history("action")
    (run / ENSEMBLE).unlink()
    with Ensemble.create(
        *(run / ENSEMBLE,),
        **{"theory": "u1", "lattice_shape": (4, 4), "config": config, "chains": 4, "draws": 64, "block": 64},
        **{"fields": {"links": ((2, 4, 4), "float32")}, "history": {"action": float}},
    ) as ensemble:
        ensemble.append(fields={"links": links.astype("float32")}, history={"action": action})
    text = refused(command, run)
    assert "float32" in text
    assert "float64" in text


def test_status_of_a_run_with_a_foreign_ensemble_says_so(run, other):
    shutil.copy(other("action.beta=2.5") / ENSEMBLE, run / ENSEMBLE)
    found = json.loads(done("status", run, "--json").out)
    assert "2.5" in found["damage"] or "continues" in found["damage"]


@pytest.mark.parametrize("command", ["sample", "measure", "analyse", "verify", "repair"])
def test_a_further_file_of_another_run_is_refused(run, other, command):
    shutil.copy(other("action.beta=2.5") / SECOND, run / SECOND)
    before = contents(run)
    words = ["verify", run, "--repair"] if command == "repair" else [command, run]
    text = refused(*words)
    sums = re.findall(r"continues is '(\w{64})', expected '(\w{64})'", text)
    assert sums
    assert sums[0][0] != sums[0][1]
    assert unchanged(run, before)


@pytest.mark.parametrize("first", [0, 32, 96])
def test_a_further_file_of_other_draws_is_refused(run, first):
    restamped(run / SECOND, first_draw=first)
    for command in ("sample", "measure", "analyse", "verify"):
        assert f"first_draw is {first}, expected 64" in refused(command, run)


def test_a_missing_file_in_the_middle_hides_no_draws(run):
    done("sample", run, "--extend", 64)
    (run / SECOND).rename(run / "elsewhere.h5")
    for command in ("verify", "measure", "analyse", "sample"):
        assert SECOND in refused(command, run)


def test_a_further_file_alone_is_neither_verified_nor_cut(run):
    """Its draws count from those of the file before it; alone it would seem to have none."""
    restamped_marker(run / SECOND, 7)
    before = contents(run)
    for words in (["verify", run / SECOND], ["verify", run / SECOND, "--repair"]):
        assert program(*words).code in (2, 65)
    assert unchanged(run, before)


def restamped_marker(path: Path, count: int) -> None:
    with h5py.File(path, "r+") as file:
        file["state/n_committed"][()] = count


@pytest.mark.parametrize("stage", [CHAIN, TRAINING])
def test_checkpoints_of_another_run_are_refused_and_nothing_is_changed(stopped, other, stage):
    for path in [*(stopped / stage).iterdir()]:
        path.unlink()
    for path in (other("run.seed=6") / stage).glob("step-*" if stage == TRAINING else "step-*80.pt*"):
        shutil.copy(path, stopped / stage)
    before = contents(stopped)
    for words in (["sample", stopped], again(stopped)):
        assert "is of another run or version" in refused(*words)
    assert unchanged(stopped, before)


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.target),)


def forged(path: Path, target: Path, form: str) -> None:
    """Write a checkpoint as an attacker would, with a matching sum."""
    payload = {"format_version": 1, "step": int(path.stem[5:]), "state": Hostile(target)}
    if form == "zip":
        torch.save(payload, path)
    else:
        path.write_bytes(pickle.dumps(payload))
    path.with_name(f"{path.name}.sha256").write_text(f"{sha256(path.read_bytes()).hexdigest()}  {path.name}\n")


@pytest.mark.parametrize("form", ["pickle", "zip"])
@pytest.mark.parametrize("stage", [CHAIN, TRAINING])
def test_a_hostile_checkpoint_is_refused_and_runs_nothing(stopped, stage, form, tmp_path):
    target = tmp_path / "created"
    for path in (stopped / stage).glob("step-*.pt"):
        forged(path, target, form)
    before = contents(stopped)
    for words in (["sample", stopped], again(stopped)):
        assert "refused" in refused(*words)
    assert not target.exists()
    assert unchanged(stopped, before)
    pickle.loads(pickle.dumps(Hostile(target)))
    assert target.exists(), "the pickle was a hostile one"


DAMAGES = ("cut", "byte", "sum gone")
FORGERIES = ("pickle", "zip")


def spoil(path: Path, kind: str) -> None:
    data = path.read_bytes()
    if kind == "sum gone":
        path.with_name(f"{path.name}.sha256").unlink()
    elif kind in ("pickle", "zip"):
        forged(path, path.parent / "created", kind)
    else:
        path.write_bytes(data[:100] + (b"" if kind == "cut" else b"x" + data[101:]))


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_newest_checkpoint_of_the_chain_falls_back_and_replays(stopped, lives, kind):
    path = newest(stopped, CHAIN)
    spoil(path, kind)
    text = done("sample", stopped).err
    assert re.search(rf"note: .*{path.name}.*passed over for {newest(lives.stopped, CHAIN, 2).name}", text)
    assert rows(stopped) == rows(lives.finished)


@pytest.mark.parametrize("kind", FORGERIES)
def test_a_hostile_newest_checkpoint_of_the_chain_is_replaced(stopped, lives, kind):
    """The self-test begins a block before it, so it is not even read."""
    path = newest(stopped, CHAIN)
    spoil(path, kind)
    done("sample", stopped)
    assert rows(stopped) == rows(lives.finished)
    assert not (path.parent / "created").exists()


@pytest.mark.parametrize("kind", [*DAMAGES, *FORGERIES])
def test_a_damaged_checkpoint_before_the_newest_does_not_stand_in_the_way(stopped, lives, kind):
    """The newest one is whole, and all that is needed; the older one serves the self-test alone."""
    spoil(newest(stopped, CHAIN, 2), kind)
    done("sample", stopped)
    assert rows(stopped) == rows(lives.finished)


@pytest.mark.parametrize("kind", [*DAMAGES, *FORGERIES])
def test_a_damaged_newest_checkpoint_of_the_training_falls_back_and_replays(half_trained, lives, kind):
    path = newest(half_trained, TRAINING)
    spoil(path, kind)
    text = done("train", half_trained / "config.toml", "--out", half_trained, "--resume").err
    assert re.search(rf"note: .*{path.name}.*passed over for step-0*2.pt", text)
    assert losses(half_trained) == losses(lives.finished)
    done("sample", half_trained)
    done("sample", half_trained, "--extend", 32)
    assert rows(half_trained) == rows(lives.finished)


def losses(run: Path) -> list[tuple[int, str]]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], repr(record["loss"])) for record in records]


@pytest.mark.parametrize("stage", [CHAIN, TRAINING])
def test_where_all_checkpoints_are_damaged_the_message_says_what_to_do(stopped, lives, stage):
    for path in (stopped / stage).glob("step-*.pt"):
        spoil(path, "byte")
    before = contents(stopped)
    text = refused("sample", stopped)
    advised = re.search(r"remove (\S+) to compute", text)
    assert advised is not None
    assert unchanged(stopped, before)
    shutil.rmtree(advised[1])
    done(*again(stopped, *(("--extend", "32"))))
    assert rows(stopped) == rows(lives.finished)


def test_an_older_copy_of_the_ensemble_is_refused(run, lives):
    """The further file is gone; the checkpoints know that there were more draws."""
    (run / SECOND).unlink()
    before = contents(run)
    for words in (["sample", run], again(run), ["sample", run, "--extend", 32]):
        assert "64 draws, its checkpoint 96: a file was lost, replaced or cut" in refused(*words)
        assert unchanged(run, before), words


def test_a_lost_ensemble_is_not_begun_again_beside_its_checkpoints(run):
    for name in (ENSEMBLE, SECOND):
        (run / name).unlink()
    before = contents(run)
    assert "checkpoint" in refused("sample", run)
    assert unchanged(run, before)


def test_a_changed_configuration_is_refused_with_all_keys(stopped):
    before = contents(stopped)
    changes = ("run.seed=6", "action.beta=2.5", "chain.block=8", "training.steps=8", "chain.draws=32")
    text = refused(*again(stopped, *(word for change in changes for word in ("--set", change))), code=78)
    for change in changes:
        key, _, value = change.partition("=")
        assert re.search(rf"{key}\W.*{value}", text), key
    assert contents(stopped) == before


def test_chain_draws_may_grow_and_then_extends(lives, tmp_path):
    short = copied(lives.short, tmp_path / "run")
    done(*again(short, "--set", "chain.draws=96"))
    assert rows(short) == rows(lives.finished)
    assert "chain.draws" in refused(*again(short, "--set", "chain.draws=64"), code=78)


def test_another_number_in_the_last_block_is_found_on_resuming(stopped):
    """The stored block has valid checksums; computed again it differs."""
    with h5py.File(stopped / SECOND, "r+") as file:
        file["history/log_weight"][2, 3] += 1e-12
    before = contents(stopped)
    for words in (["sample", stopped], again(stopped)):
        text = refused(*words)
        assert "draws 64 to 79 computed again differ in history/log_weight; resume with the same machine" in text
        assert torch.__version__ in text
    assert unchanged(stopped, before)


def test_a_machine_with_other_numbers_is_found_on_resuming(stopped, monkeypatch):
    step = IndependenceMetropolis.step

    def other(*arguments: object) -> object:
        state, info = step(*arguments)
        return dataclasses.replace(state, orbit=state.orbit.nextafter(state.orbit + 1)), info

    monkeypatch.setattr(IndependenceMetropolis, "step", other)
    assert "draws 64 to 79 computed again differ in history/action" in refused("sample", stopped)


def test_another_loss_after_the_checkpoint_is_found_on_resuming(half_trained):
    lines = (half_trained / "metrics.jsonl").read_text().splitlines()
    record = json.loads(lines[4])
    assert record["step"] == 5
    changed = json.dumps(record | {"loss": float(np.nextafter(record["loss"], 9e9))})
    (half_trained / "metrics.jsonl").write_text("\n".join([*lines[:4], changed, ""]))
    text = refused("train", half_trained / "config.toml", "--out", half_trained, "--resume")
    assert "step 5 computed again differs in loss" in text


@pytest.mark.parametrize("tail", [b"", b"{", b"\xff\xfe\n", b"[]\n{}\n", b'{"step": "x"}\n', b'{"step": 9}\n'])
def test_a_damaged_end_of_the_metrics_stops_nothing(half_trained, lives, tail):
    path = half_trained / "metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:4]) + tail)
    done("train", half_trained / "config.toml", "--out", half_trained, "--resume")
    assert losses(half_trained) == losses(lives.finished)
