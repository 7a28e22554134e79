"""A run whose files are damaged: the lost draws are named, nothing wrong is served, and a repair computes them again.

All of it through the command line, on a small run with a further file: 64 draws and 32 more in 4 chains, block 16.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import h5py
import numpy as np
import pytest

from latticeflow.cli import commands, folder, main
from latticeflow.storage import DataError, Ensemble, checkpoint_steps, handle, journal

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
kernels = ["independence"]
replica = 4
draws = 64
block = 16
thermalisation = 0
candidates = 32
[baseline]
samples = 16
beta = 2.0
"""
COLUMNS = (
    *("fields/links", "history/action", "history/accepted", "history/log_weight"),
    *("proposals/log_weight", "checksum/crc32"),
)
FILES = ("ensemble.h5", "ensemble-2.h5")
STAGES = ("sample", "measure", "analyse")
GARBAGE = (b"", b"[]", b"\xff\x00\xfe", b'{"cpu_seconds": 3, "resumed": 3, "step": "x"}')


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


def refused(*words: object) -> str:
    """Return the line with which a command refused bad data."""
    outcome = program(*words)
    assert outcome.code == 65, (words, outcome)
    return outcome.err.strip().rpartition("latticeflow: ")[2]


def done(*words: object) -> str:
    """Return what a command printed that did what it was asked for."""
    outcome = program(*words)
    assert outcome.code == 0, (words, outcome)
    return outcome.out


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> Path:
    """The run that the others are damaged copies of."""
    path = tmp_path_factory.mktemp("damage") / "run"
    path.with_suffix(".toml").write_text(CONFIG)
    done("train", path.with_suffix(".toml"))
    done("sample", path)
    done("sample", path, "--extend", 32)
    done("measure", path)
    done("analyse", path)
    return path


@pytest.fixture
def run(healthy, tmp_path) -> Path:
    return Path(shutil.copytree(healthy, tmp_path / "run"))


def rows(run: Path) -> dict[tuple[str, str], bytes]:
    """All that the chain left in both files, read by HDF5 alone."""
    found = {}
    for name in FILES:
        with h5py.File(run / name) as file:
            found |= {(name, path): file[path][()].tobytes() for path in (*COLUMNS, "state/n_committed")}
    return found


def served(run: Path) -> dict[str, object]:
    """All that the ensemble serves; raises DataError for what it refuses."""
    with Ensemble.open(run / "ensemble.h5") as ensemble:
        if ensemble.verify():
            raise DataError("verify found it")
        values = {f"history/{name}": ensemble.history(name).tobytes() for name in ensemble.history_names}
        values |= {f"proposals/{name}": ensemble.proposals(name).tobytes() for name in ensemble.proposal_names}
        values |= {f"observables/{name}": ensemble.observable(name).tobytes() for name in ensemble.observable_names}
        analysis = repr(sorted((name, sorted(map(repr, found.items()))) for name, found in ensemble.analysis().items()))
        return values | {
            "fields/links": ensemble.field("links").tobytes(),
            "n_committed": ensemble.n_committed,
            "header": (ensemble.theory, ensemble.lattice_shape, ensemble.config, ensemble.draws, ensemble.block),
            "analysis": analysis,
        }


def chunk(file: Path, column: str, draw: int, chain: int) -> int:
    """Where the block of a draw, counted in its file, is."""
    with h5py.File(file) as opened:
        dataset = opened[column]
        return dataset.id.get_chunk_info_by_coord((chain, draw, *(0,) * (dataset.ndim - 2))).byte_offset


def flip(file: Path, bit: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(bit // 8)
        byte = opened.read(1)[0]
        opened.seek(bit // 8)
        opened.write(bytes([byte ^ 1 << bit % 8]))


def places(text: str) -> list[str]:
    return re.findall(r"chain \d+ draws? \d+(?: to \d+)?", text)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fraction", [0.0, 0.00005, 0.01, 0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 0.99999])
def test_a_truncated_file_is_bad_data_wherever_it_is_cut(run, name, fraction):
    data = (run / name).read_bytes()
    (run / name).write_bytes(data[: int(fraction * len(data))])
    for command in ("measure", "analyse", "verify"):
        assert name in refused(command, run)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9, 0.999])
def test_a_file_that_lost_its_end_is_usable_after_the_repair_that_said_so(run, healthy, name, fraction):
    """Behind the chain there are results, which can be computed again; some of their names the file needs to open."""
    data = (run / name).read_bytes()
    end = max(chunk(run / name, column, 31, 3) for column in COLUMNS)
    (run / name).write_bytes(data[: end + int(fraction * (len(data) - end))])
    if (name, fraction) == ("ensemble.h5", 0.1):
        assert name in refused("verify", run, "--repair")
        return
    done("verify", run, "--repair")
    for stage in STAGES:
        done(stage, run)
    done("verify", run)
    assert rows(run) == rows(healthy)


def test_verify_names_the_configurations_that_a_truncated_file_has_lost(run):
    (run / "ensemble-2.h5").write_bytes(
        (run / "ensemble-2.h5").read_bytes()[: chunk(run / "ensemble-2.h5", "fields/links", 16, 3)]
    )
    assert places(refused("verify", run)) == ["chain 3 draws 80 to 95"]


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize(("name", "first", "damage"), [(FILES[0], 0, (1, 16)), (FILES[1], 64, (2, 80))])
def test_a_flipped_byte_is_named_by_its_chain_and_draws(run, column, name, first, damage):
    chain, draw = damage
    flip(run / name, 8 * (chunk(run / name, column, draw - first, chain) + 3) + 6)
    for command in ("verify", "measure", "analyse"):
        assert places(refused(command, run)) == [f"chain {chain} draws {draw} to {draw + 15}"], command


@pytest.mark.parametrize("column", ["fields/links", "history/accepted", "checksum/crc32"])
def test_skip_damaged_leaves_out_exactly_the_damaged_draws_and_warns(run, healthy, column):
    flip(run / FILES[0], 8 * (chunk(run / FILES[0], column, 16, 1) + 3) + 6)
    flip(run / FILES[1], 8 * (chunk(run / FILES[1], column, 16, 2) + 2) + 5)
    done("measure", run, "--skip-damaged")
    report = json.loads(done("analyse", run, "--skip-damaged", "--json"))
    kept = [draw for draw in range(96) if not 16 <= draw < 32 and not 80 <= draw < 96]
    intact = plaquettes(healthy)[:, kept]
    assert report["observables"]["plaquette"]["mean"] == pytest.approx(intact.mean(), rel=1e-12)
    assert report["observables"]["plaquette"]["n"] == intact.size
    assert any("32 draws of every chain are left out: damaged" in warning for warning in report["warnings"])
    assert "left out" in done("analyse", run, "--skip-damaged")


def plaquettes(run: Path) -> np.ndarray:
    """The plaquettes `(chain, draw)` by NumPy from the stored links."""
    links = []
    for name in FILES:
        with h5py.File(run / name) as file:
            links.append(file["fields/links"][()])
    time, space = np.moveaxis(np.concatenate(links, axis=1), 2, 0)
    angle = time + np.roll(space, -1, -2) - np.roll(time, -1, -1) - space
    return np.cos(angle).mean(axis=(-2, -1))


def other_file(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["x"] = 1


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["wrong magic", "empty", "another HDF5 file", "text", "directory"])
def test_what_is_no_ensemble_is_refused(run, name, kind):
    path, data = run / name, (run / name).read_bytes()
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "another HDF5 file":
        other_file(path)
    else:
        path.write_bytes({"wrong magic": b"\x89HDG" + data[4:], "empty": b"", "text": b"draws\n1\n"}[kind])
    for command in (*STAGES, "plot", "verify", "export"):
        outcome = program(command, run, *(("--to", "npz") if command == "export" else ()))
        assert outcome.code in ((2, 65) if kind == "directory" else (65,)), (command, outcome)
        assert name in outcome.err or (kind == "directory" and outcome.code == 2)
    assert program("status", run).code == 0


@pytest.mark.parametrize(("name", "count"), [(FILES[0], 250), (FILES[1], 150)])
def test_no_flipped_bit_makes_a_wrong_number(run, name, count, monkeypatch):
    """Single bits anywhere: all that is served is right and complete, or the damage is found."""
    monkeypatch.setattr(handle, "PAUSE", 0.0)  # nobody is writing, so nobody has to be waited for
    rng, right, detected = np.random.default_rng(17), served(run), 0
    for bit in rng.integers(8 * (run / name).stat().st_size, size=count).tolist():
        flip(run / name, bit)
        try:
            assert served(run) == right, f"bit {bit} of {name}"
        except DataError:
            detected += 1
        flip(run / name, bit)
    assert detected > count // 5
    assert served(run) == right


@pytest.mark.parametrize(
    ("name", "draw", "sound", "start"),
    [(FILES[0], 32, 32, "from its start"), (FILES[0], 0, 0, "from its start"), (FILES[1], 16, 80, "from draw 80")],
)
def test_repair_cuts_and_the_run_computes_the_rest_again(run, healthy, name, draw, sound, start):
    flip(run / name, 8 * (chunk(run / name, "fields/links", draw, 1) + 100))
    text = done("verify", run, "--repair")
    assert f"cut from 96 to {sound} draws" in text
    assert start in text
    assert all(step <= sound for step in checkpoint_steps(run / "checkpoint/chain"))
    with Ensemble.open(run / "ensemble.h5") as ensemble:
        assert ensemble.n_committed == sound
    for command in STAGES:
        done(command, run)
    assert rows(run) == rows(healthy)
    assert "nothing to repair" in done("verify", run, "--repair")
    done("verify", run)


def test_repair_goes_on_by_the_command_that_it_names(run, healthy, monkeypatch):
    monkeypatch.setattr(commands, "draw_figures", lambda _: [])
    flip(run / FILES[1], 8 * (chunk(run / FILES[1], "history/action", 16, 3) + 8))
    command = done("verify", run, "--repair").rpartition("latticeflow ")[2].split()
    done(*command)
    assert rows(run) == rows(healthy)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        *(("n_committed", value) for value in (0, 7, 27, -1, 59, 2**40)),
        *(("complement", value) for value in (~0, 0, 7)),
    ],
)
def test_a_damaged_marker_or_complement_is_found_and_repaired(run, healthy, name, scalar, value):
    with h5py.File(run / name) as file:
        place = file[f"state/{scalar}"].id.get_offset()
    with (run / name).open("r+b") as file:
        file.seek(place)
        file.write(value.to_bytes(8, "little", signed=True))
    for command in ("verify", "measure", "analyse"):
        assert "n_committed" in refused(command, run)
    assert "all 96 draws are kept" in done("verify", run, "--repair")
    assert rows(run) == rows(healthy)
    done("analyse", run)


def test_a_damaged_marker_of_a_stopped_run_is_repaired_to_what_was_written(healthy, tmp_path, monkeypatch):
    """The rows behind the last block were never written: they do not come to life."""
    config, saved, save = tmp_path / "run.toml", [], folder.save_checkpoint

    def dies_in_the_third_block(path, *arguments):
        saved.append(path)
        if len(saved) == 4:
            raise KeyboardInterrupt
        return save(path, *arguments)

    config.write_text(CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr(folder, "save_checkpoint", dies_in_the_third_block)
        assert program("run", config).code == 130
    with h5py.File(tmp_path / "run/ensemble.h5", "r+") as file:
        assert file["state/n_committed"][()] == 48
        file["state/n_committed"][()] = 5
    refused("verify", tmp_path / "run")
    assert "all 48 draws are kept" in done("verify", tmp_path / "run", "--repair")
    done("sample", tmp_path / "run")
    assert {key: value for key, value in rows(healthy).items() if key[0] == FILES[0]} == first_file(tmp_path / "run")


def first_file(run: Path) -> dict[tuple[str, str], bytes]:
    with h5py.File(run / FILES[0]) as file:
        return {(FILES[0], path): file[path][()].tobytes() for path in (*COLUMNS, "state/n_committed")}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("path", ["history/action", "observables/plaquette"])
def test_a_number_of_another_configuration_is_found_by_computing_it_again(run, name, path):
    """All checksums hold; what is stored belongs to the draw after it."""
    with h5py.File(run / name, "r+") as file:
        file[path][...] = np.roll(file[path][()], 1, axis=1)
    for command in ("verify", "analyse", *(("measure",) if path == "history/action" else ())):
        text = refused(command, run)
        assert path.rpartition("/")[2] in text
        assert re.search(r"chain \d, draw \d+ is \S+, computed again", text)


@pytest.fixture
def interrupted(run, monkeypatch) -> Iterator[tuple[Path, Path]]:
    """A run that died when a change of its structure was in the journal and not yet in the file; and its journal."""

    def dies(*_):
        raise OSError(5, "died")

    with monkeypatch.context() as patch:
        patch.setattr(journal, "_replay", dies)
        with Ensemble.open(run / FILES[0], "a") as ensemble, pytest.raises(OSError, match="died"):
            ensemble.write_analysis("new", {"mean": 1.5})
    return run, run / f"{FILES[0]}.journal"


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9, 0.9999])
def test_a_damaged_journal_is_named_and_can_be_done_without(interrupted, healthy, fraction):
    """What was in it are results: the repair keeps the chain alone, and the stages compute the rest again."""
    run, path = interrupted
    data, before = path.read_bytes(), (run / FILES[0]).read_bytes()
    path.write_bytes(data[: int(fraction * len(data))])
    for command in (*STAGES, "verify"):
        assert path.name in refused(command, run)
    assert (run / FILES[0]).read_bytes() == before
    assert "journal" in done("verify", run, "--repair")
    assert not path.exists()
    for stage in STAGES:
        done(stage, run)
    done("verify", run)
    assert rows(run) == rows(healthy)


def test_no_flipped_bit_in_a_journal_makes_a_wrong_number(interrupted):
    run, path = interrupted
    data, image, detected = path.read_bytes(), (run / FILES[0]).read_bytes(), 0
    edges = 8 * np.r_[0:300, len(data) - 400 : len(data)]
    rng = np.random.default_rng(3)
    right = served(run)
    for bit in [*rng.choice(edges, 80).tolist(), *rng.integers(8 * len(data), size=40).tolist()]:
        path.write_bytes(data)
        flip(path, bit + int(rng.integers(8)) if bit % 8 == 0 else bit)
        try:
            Ensemble.open(run / FILES[0], "a").close()
            assert served(run) == right
        except DataError:
            detected += 1
        (run / FILES[0]).write_bytes(image)
    assert detected > 60


@pytest.mark.parametrize("name", ["status.json", "provenance.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", GARBAGE)
def test_damaged_bookkeeping_stops_nothing(run, healthy, name, content, monkeypatch):
    monkeypatch.setattr(commands, "draw_figures", lambda _: [])
    flip(run / FILES[1], 8 * (chunk(run / FILES[1], "history/action", 16, 3) + 8))
    done("verify", run, "--repair")
    (run / name).write_bytes(content)
    for words in (["status", run], ["status", run, "--json"], ["run", run / "config.toml", "--out", run, "--resume"]):
        done(*words)
    assert rows(run) == rows(healthy)


@pytest.mark.parametrize("content", [b"", b'{"torch": "2"}'])
def test_damaged_provenance_does_not_hide_the_message_of_the_self_test(run, content):
    """The last block is taken again on resuming, and the message then names machine and versions if it can."""
    with h5py.File(run / FILES[1], "r+") as file:
        file["history/log_weight"][0, 20] += 1.0
        file["state/n_committed"][()] = 16
        file["state/complement"][()] = ~16
    with h5py.File(run / FILES[0], "r+") as file:
        file["history/log_weight"][0, 60] += 1.0
    done("verify", run, "--repair")
    shutil.rmtree(run / "checkpoint")
    (run / "provenance.json").write_bytes(content)
    assert "draws 48 to 63 computed again differ in history/log_weight" in refused("sample", run)


HOLDER = """
import sys
from latticeflow.storage import RunLock

with RunLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def status(run: Path) -> dict[str, object]:
    text, found = done("status", run), json.loads(done("status", run, "--json"))
    assert str(found["state"]) in text
    assert ("damage" in found) == ("damaged: " in text)
    return found


def test_status_of_a_healthy_a_running_a_stopped_and_a_damaged_run(run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    found = status(run)
    assert (found["draws"], found["room"], found["files"], found["writer"]) == (96, 96, list(FILES), None)
    command = [sys.executable, "-c", HOLDER, str(run / "run.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        found = status(run)
        assert found["state"] == "running"
        assert f"process {holder.pid} on " in found["writer"]
        holder.communicate()
    assert status(run)["state"] != "running"
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    flip(run / FILES[0], 8)
    assert "not an HDF5 file" in status(run)["damage"]


def test_status_tells_a_finished_run_from_a_stopped_one(run, monkeypatch):
    monkeypatch.setattr(commands, "draw_figures", lambda _: [])
    done("run", run / "config.toml", "--out", run, "--resume")
    assert status(run)["state"] == "finished"
    flip(run / FILES[1], 8 * (chunk(run / FILES[1], "history/action", 16, 3) + 8))
    done("verify", run, "--repair")
    found = status(run)
    assert (found["state"], found["draws"], found["room"]) == ("stopped", 80, 96)
    assert "--resume" in done("status", run)
