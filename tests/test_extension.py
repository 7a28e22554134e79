"""More draws for a finished run (`--extend N`): the longer run bit for bit, in a further file beside the first."""

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import h5py
import numpy as np
import pytest

from latticeflow.cli import commands, folder, main
from latticeflow.storage import Ensemble, atomic

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
[chain]
kernels = ["hmc", "independence"]
replica = 4
draws = 64
block = 16
thermalisation = 16
candidates = 32
"""
FIRST, SECOND, THIRD = "ensemble.h5", "ensemble-2.h5", "ensemble-3.h5"
Usage = namedtuple("Usage", "total used free")


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


def done(*words: object) -> str:
    outcome = program(*words)
    assert outcome.code == 0, (words, outcome)
    return outcome.out


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(commands, "draw_figures", lambda *_, **__: [])


@pytest.fixture(scope="module")
def make(tmp_path_factory) -> Callable[..., Path]:
    """Return a function from a number of draws to the finished run that had it from the start; read only."""
    made: dict[tuple[int, int], Path] = {}

    def run_of(draws: int, *, seed: int = 5) -> Path:
        if (draws, seed) not in made:
            made[draws, seed] = tmp_path_factory.mktemp("whole") / "run"
            config = made[draws, seed].with_suffix(".toml")
            config.write_text(CONFIG.replace("draws = 64", f"draws = {draws}").replace("seed = 5", f"seed = {seed}"))
            done("train", config)
            for stage in ("sample", "measure", "analyse"):
                done(stage, made[draws, seed])
        return made[draws, seed]

    return run_of


@pytest.fixture
def run(make, tmp_path) -> Path:
    """A finished run of 64 draws, to be extended."""
    return Path(shutil.copytree(make(64), tmp_path / "run"))


def again(run: Path, *options: object) -> list[object]:
    return ["run", run / "config.toml", "--out", run, "--resume", *options]


def values(run: Path) -> dict[str, bytes]:
    """All that belongs to the draws, over all files."""
    with Ensemble.open(run / FIRST) as ensemble:
        found = {f"history/{name}": ensemble.history(name) for name in ensemble.history_names}
        found |= {f"proposals/{name}": ensemble.proposals(name) for name in ensemble.proposal_names}
        found |= {f"observables/{name}": ensemble.observable(name) for name in ensemble.observable_names}
        found["fields/links"] = ensemble.field("links")
        assert ensemble.verify() == []
    return {name: array.tobytes() for name, array in found.items()}


def datasets(path: Path) -> dict[str, bytes]:
    """All of a file but its results, read by HDF5 alone."""
    found = {}
    with h5py.File(path) as file:
        for group in ("fields", "history", "proposals", "checksum", "state"):
            found |= {f"{group}/{name}": item[()].tobytes() for name, item in file[group].items()}
        return found | {name: repr(value).encode() for name, value in file.attrs.items()}


def numbers(run: Path) -> dict[str, dict[str, float]]:
    return json.loads(done("analyse", run, "--json"))["observables"]


@pytest.mark.parametrize("command", ["sample", "resume"])
def test_an_extended_chain_is_the_longer_run_bit_for_bit(run, make, command):
    if command == "sample":
        done("sample", run, "--extend", 32)
        done("measure", run)
    else:
        done(*again(run, "--extend", 32))
    assert values(run) == values(make(96))
    assert numbers(run) == numbers(make(96))
    assert [path.name for path in sorted(run.glob("*.h5"))] == [SECOND, FIRST]


def test_a_second_extension_is_a_third_file(run, make):
    done("sample", run, "--extend", 32)
    done("sample", run, "--extend", 48)
    done("measure", run)
    assert values(run) == values(make(112))
    with Ensemble.open(run / FIRST) as ensemble:
        assert [path.name for path in ensemble.paths] == [FIRST, SECOND, THIRD]
    assert "112 of 112 draws" in done("verify", run)


def test_the_same_command_again_changes_nothing(run):
    done("sample", run, "--extend", 32)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done("sample", run, "--extend", 32)
    done("sample", run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    draws = values(run)["fields/links"]
    done(*again(run, "--extend", 32))
    assert values(run)["fields/links"] == draws
    assert not (run / THIRD).exists()


def test_the_first_file_is_as_it_was_until_it_is_measured(run):
    """Sampling notes the kernel's tuning in it again; chain, header and size stay."""
    before, size = datasets(run / FIRST), (run / FIRST).stat().st_size
    done("sample", run, "--extend", 32)
    assert datasets(run / FIRST) == before
    assert (run / FIRST).stat().st_size == size
    done("measure", run)
    done("analyse", run)
    assert datasets(run / FIRST) == before


def test_every_reader_sees_all_draws(run, make, tmp_path):
    done("sample", run, "--extend", 32)
    done("measure", run)
    found = numbers(run)
    assert found["plaquette"]["n"] == 4 * 96
    done("export", run, "--to", "npz", "--fields", "--out", tmp_path / "all.npz")
    with np.load(tmp_path / "all.npz") as exported, np.load(export_of(make(96), tmp_path)) as expected:
        assert exported["n_committed"] == 96
        for name in ("fields/links", "history/action", "observables/plaquette", "proposals/log_weight"):
            np.testing.assert_array_equal(exported[name], expected[name])
        assert exported["observables/plaquette"].mean() == pytest.approx(found["plaquette"]["mean"], rel=1e-12)
    assert compared(run, make(64, seed=6), tmp_path) == compared(make(96), make(64, seed=6), tmp_path)
    with h5py.File(run / SECOND) as file:
        assert file["observables/plaquette"].shape[:2] == (4, 32)


def compared(run: Path, other: Path, folder: Path) -> list[str]:
    """The rows of the observables in a comparison."""
    table = done("compare", run, other, "--out", folder / "compare.png")
    rows = [line for line in table.splitlines() if line.startswith(("plaquette", "topological"))]
    assert len(rows) == 4
    return rows


def export_of(run: Path, folder: Path) -> Path:
    done("export", run, "--to", "npz", "--fields", "--out", folder / "whole.npz")
    return folder / "whole.npz"


def test_draws_that_are_not_measured_yet_are_no_part_of_the_results(run):
    """Between sampling and measuring the observables are those of the first file, and stay readable."""
    before = numbers(run)
    done("sample", run, "--extend", 32)
    assert numbers(run)["plaquette"]["mean"] == before["plaquette"]["mean"]


@pytest.mark.parametrize("when", ["append", "save", "extend"])
@pytest.mark.parametrize("block", [0, 1])
def test_an_interrupted_extension_goes_on_as_the_same_run(run, make, when, block, monkeypatch):
    """With and without the number: the room is there, so the plain command fills it as well."""
    calls = []

    def dying(original: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            result = original(*arguments, **options)
            calls.append(1)
            if len(calls) > block:
                raise KeyboardInterrupt
            return result

        return call

    target, name = {"save": (folder, "save_checkpoint")}.get(when, (Ensemble, when))
    with monkeypatch.context() as patch:
        patch.setattr(target, name, dying(getattr(target, name)))
        outcome = program("sample", run, "--extend", 32)
    assert outcome.code == (130 if calls and len(calls) > block else 0)
    if outcome.code:
        assert f"latticeflow sample {run} --extend 32" in outcome.err
    done("sample", run, *(("--extend", 32) if block else ()))
    done("measure", run)
    assert values(run) == values(make(96))


@pytest.mark.parametrize("count", ["0", "-1", "many", "1.5", "", "²"])
@pytest.mark.parametrize("command", ["sample", "run"])
def test_only_a_number_of_at_least_one_extends(run, command, count, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    words = ["sample", str(run)] if command == "sample" else [str(word) for word in again(run)]
    with pytest.raises(SystemExit) as stop:
        main([*words, f"--extend={count}"])
    assert stop.value.code == 2
    assert "--extend" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_full_disk_leaves_the_run_as_it_was(run, make, monkeypatch):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(atomic.shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 1234, 1234))
        outcome = program("sample", run, "--extend", 32)
    assert outcome.code == 74
    assert SECOND in outcome.err
    assert "1234 bytes are free" in outcome.err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    done("verify", run)
    done("sample", run, "--extend", 32)
    done("measure", run)
    assert values(run) == values(make(96))


def test_a_new_run_can_be_extended_at_once(make, tmp_path):
    """There is no file yet, so one file has all of the draws."""
    config = tmp_path / "run.toml"
    config.write_text(CONFIG)
    done("run", config, "--extend", 32)
    assert not (tmp_path / "run" / SECOND).exists()
    assert values(tmp_path / "run") == values(make(96))
