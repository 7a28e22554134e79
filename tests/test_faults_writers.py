"""One run and several processes: a second writer is refused, and readers see a consistent prefix at every moment."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import h5py
import numpy as np
import pytest

from latticeflow.cli import main
from latticeflow.storage import DataError, Ensemble, LockedError, RunLock, lock_holder, survey

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
draws = 240
block = 8
thermalisation = 0
candidates = 32
"""
PATIENCE = 60


def program(*words: object) -> tuple[int, str, str]:
    """Run a command as from a shell; an exception that it lets pass fails the test."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


@contextmanager
def running(*words: object) -> Iterator[subprocess.Popen]:
    """A command in another process, which is killed if it is still there in the end."""
    command = [sys.executable, "-m", "latticeflow", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(what: object, process: subprocess.Popen) -> None:
    """Wait until a function of no arguments is true."""
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def committed(path: Path) -> int:
    if not path.exists():
        return 0
    with Ensemble.open(path) as ensemble:
        return ensemble.n_committed


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(CONFIG)
    return path


def trained(config: Path, *options: object) -> Path:
    """A run folder whose chain can begin."""
    code, _, error = program("train", config, *options)
    assert code == 0, error
    return config.with_suffix("")


def rows(path: Path) -> dict[str, bytes]:
    with h5py.File(path) as file:
        names = [f"{group}/{name}" for group in ("fields", "history", "proposals", "checksum") for name in file[group]]
        return {name: file[name][()].tobytes() for name in names}


def test_a_second_writer_is_refused_by_the_name_of_the_first_which_finishes(config, tmp_path):
    """Whatever the second one wants to do; the run is then that of an undisturbed process, bit for bit."""
    run = trained(config)
    with running("sample", run) as first:
        wait_for(lambda: committed(run / "ensemble.h5"), first)
        first.send_signal(signal.SIGSTOP)  # so that it does not finish while the others try
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        for words in (
            *(["sample", run], ["sample", run, "--extend", 8], ["measure", run], ["analyse", run]),
            *(["run", config, "--resume"], ["train", config, "--resume"], ["verify", run, "--repair"]),
        ):
            code, _, error = program(*words)
            assert code == 75, (words, error)
            assert f"process {first.pid} on {platform.node()}, started " in error
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
        first.send_signal(signal.SIGCONT)
        _, error = first.communicate(timeout=PATIENCE)
        assert first.returncode == 0, error
    trained(config, "--out", tmp_path / "alone")
    assert program("sample", tmp_path / "alone")[0] == 0
    assert rows(run / "ensemble.h5") == rows(tmp_path / "alone" / "ensemble.h5")


@pytest.fixture
def ensemble(tmp_path) -> Iterator[Ensemble]:
    settings = {"theory": "u1", "lattice_shape": (1,), "config": "", "chains": 2, "draws": 16, "block": 8}
    with Ensemble.create(tmp_path / "ensemble.h5", fields={"phi": ((1,), float)}, **settings) as created:
        yield created


def test_a_further_file_is_as_exclusive_as_the_first(ensemble):
    ensemble.extend(8)
    for _ in range(2):
        ensemble.append(fields={"phi": np.ones((2, 8, 1))})
    for path in ensemble.paths:
        with pytest.raises(LockedError, match=f"process {os.getpid()} on "):
            Ensemble.open(path, "a")
    ensemble.append(fields={"phi": np.ones((2, 8, 1))})
    assert ensemble.n_committed == 24


def test_a_killed_run_leaves_nothing_to_clean_up(config):
    """The lock files still name the dead process; the next one takes them over at once."""
    run = trained(config)
    with running("sample", run) as first:
        wait_for(lambda: committed(run / "ensemble.h5"), first)
        first.kill()
        first.wait()
    assert json.loads((run / "run.lock").read_text())["pid"] == first.pid
    assert lock_holder(run / "run.lock") is None
    assert json.loads(program("status", run, "--json")[1])["state"] == "stopped"
    code, _, error = program("sample", run)
    assert code == 0, error
    assert committed(run / "ensemble.h5") == 240


def plain_rows(path: Path) -> tuple[int, dict[str, np.ndarray]]:
    """The newest committed rows by HDF5 alone, after their checksums, and how many there are."""
    with h5py.File(path, "r") as file:
        count = int(file["state/n_committed"][()])
        names = ("fields/links", "history/action", "checksum/crc32")
        found = {name: file[name][:, max(0, count - 16) : count] for name in names}
    for place in np.ndindex(found["checksum/crc32"].shape):
        assert zlib.crc32(found["fields/links"][place].tobytes()) == found["checksum/crc32"][place]
    return count, found


def packaged_rows(path: Path) -> tuple[int, dict[str, np.ndarray]]:
    with Ensemble.open(path) as ensemble:
        count = ensemble.n_committed
        newest = slice(max(0, count - 16), count)
        return count, {
            "fields/links": ensemble.field("links", newest),
            "history/action": ensemble.history("action", newest),
        }


SLOW = ("--set", "chain.kernels=['hmc']", "--set", "chain.hmc.step_size=0.004")


@pytest.mark.long
def test_readers_during_a_run_see_a_consistent_prefix(config):
    """Plain h5py, the package, `status` and `verify`, in turn, from the first moment to the end of the run.

    HDF5 alone may meet a change of the file's structure half done: that it cannot open, and tries again.
    """
    path, seen, counts = config.with_suffix("") / "ensemble.h5", [], {"plain": [], "package": [], "status": []}
    alarms = []
    with running("run", config, *SLOW) as process:
        wait_for(path.exists, process)
        while process.poll() is None:
            for name, look in (("plain", plain_rows), ("package", packaged_rows)):
                try:
                    seen.append(look(path))
                except DataError as error:
                    alarms.append(str(error))
                except (OSError, KeyError, RuntimeError):
                    assert name == "plain"
                else:
                    counts[name].append(seen[-1][0])
            counts["status"].append(drawn(path.parent))
            code, _, error = program("verify", path.parent)
            alarms += [error] if code else []
        assert process.returncode == 0
    with h5py.File(path) as file:
        final = {name: file[name][()] for name in ("fields/links", "history/action", "checksum/crc32")}
    for count, found in seen:
        for name, values in found.items():
            np.testing.assert_array_equal(values, final[name][:, max(0, count - 16) : count])
    for found in counts.values():
        assert found == sorted(found)
        assert len({*found}) > 3, "the readers came while the run went on"
    assert alarms == []


def drawn(run: Path) -> int:
    code, out, error = program("status", run, "--json")
    assert code == 0, error
    found = json.loads(out)
    assert "damage" not in found, found
    return found["draws"]


CHANGES = """
import sys
import numpy as np
from latticeflow.storage import Ensemble

with Ensemble.open(sys.argv[1], "a") as ensemble:
    for version in range(100):
        ensemble.write_observable(f"o{version % 7}", np.full((2, 16, 600), float(version)))
"""


@pytest.mark.parametrize("look", ["survey", "open"])
def test_no_look_at_a_file_whose_structure_changes_finds_damage(ensemble, look):
    """100 observables are written one after another; a journal is there most of the time."""
    for _ in range(2):
        ensemble.append(fields={"phi": np.ones((2, 8, 1))})
    ensemble.close()
    looks, wrong = 0, []
    with subprocess.Popen([sys.executable, "-c", CHANGES, str(ensemble.path)]) as process:
        while process.poll() is None:
            looks += 1
            try:
                if look == "survey":
                    assert survey(ensemble.path).intact
                else:
                    check_observables(ensemble.path)
            except DataError as error:
                wrong.append(str(error))
    assert process.returncode == 0
    assert looks > 20
    assert wrong == []


def check_observables(path: Path) -> None:
    with Ensemble.open(path) as reader:
        assert reader.n_committed == 16
        for name in reader.observable_names:
            assert len(np.unique(reader.observable(name))) == 1


LOOKER = """
import sys
from latticeflow.storage import lock_holder

print("looking", flush=True)
while True:
    lock_holder(sys.argv[1])
"""


def test_a_look_at_the_lock_never_makes_a_writer_fail(tmp_path):
    """Three processes look as fast as they can; a writer starts four hundred times."""
    path, failures = tmp_path / "run.lock", []
    path.touch()
    with ExitStack() as lookers:
        for _ in range(3):
            looker = subprocess.Popen([sys.executable, "-c", LOOKER, str(path)], stdout=subprocess.PIPE, text=True)
            lookers.enter_context(looker)
            lookers.callback(looker.kill)
            assert looker.stdout.readline() == "looking\n"
        for _ in range(400):
            try:
                with RunLock(path):
                    pass
            except LockedError as error:
                failures.append(str(error))
    assert failures == []
