"""A disk that fills up, wherever a run writes: exit 74 with both numbers, nothing lost, and --resume ends the same run.

Twice: on a real file system that is full (a small tmpfs in a private mount namespace, where the system permits one),
and by calls of the operating system that fail from a chosen one on. What is chosen is a place in the record of an
undisturbed run's writes, so the tests know the names of files and nothing of how they are written.
"""

import builtins
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import pytest

from latticeflow.cli import commands, main
from latticeflow.storage import Ensemble, load_checkpoint

CONFIG = """
[run]
seed = 3
threads = 1
[lattice]
shape = [4, 4]
[action]
kind = "schwinger"
beta = 1.0
kappa = 0.2
[sampler.prior]
kind = "quenched"
[sampler.flow]
kind = "gauge"
layers = 2
hidden = [8]
[training]
estimator = "path"
steps = 4
batch = 8
checkpoint_every = 2
window = 2
[chain]
replica = 4
draws = 16
block = 8
candidates = 32
thermalisation = 8
[baseline]
samples = 64
beta = 1.0
sector = 0.1
"""
THERMALISATION = 8
OF_TIME = ("training/seconds", "analysis/cost")
"""What differs between two runs that are the same."""
CRASHES = ("Traceback", "Exception ignored", "Segmentation", "HDF5-DIAG", "core dumped", "terminate called")


@dataclass
class Disk:
    """The system's calls that write into a folder: each is noted and fails from `full_from` on, as on a full disk."""

    folder: Path
    place: str = "$^"
    full_from: int = 0
    number: int = errno.ENOSPC
    calls: list[str] = field(default_factory=list)
    before: list[str] | None = None
    """The calls that succeeded before the disk was full."""
    seen: int = 0

    def call(self, name: str, path: str | os.PathLike[str]) -> None:
        """Note a call; raise OSError if the disk is full at, or since, the call number `full_from` on `place`."""
        path = os.path.abspath(path)
        if not path.startswith(f"{self.folder}{os.sep}"):
            return
        self.calls.append(f"{name} {os.path.relpath(path, self.folder)}")
        if re.search(self.place, self.calls[-1]):
            if self.seen == self.full_from:
                self.before = self.calls[:-1]
            self.seen += 1
        if self.before is not None:
            raise OSError(self.number, os.strerror(self.number))


class NotedFile(io.FileIO):
    """The unbuffered end of a file: what fails here fails where it would, which is often not before the close."""

    disk: Disk

    def write(self, data: bytes, /) -> int | None:
        self.disk.call("write", os.fsdecode(self.name))
        return super().write(data)


def noting_open(disk: Disk) -> Callable[..., io.IOBase]:
    """`open`, whose files for writing into the disk's folder are noted."""
    original = io.open

    def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
        other = isinstance(file, int) or opener is not None or not set(mode) & set("wax+")
        if other or not os.path.abspath(file).startswith(f"{disk.folder}{os.sep}"):
            return original(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = NotedFile(file, mode.replace("b", "").replace("t", ""))
        raw.disk = disk
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    return opened


def noting(disk: Disk, name: str) -> Callable[..., object]:
    """The system's call of this name, noted for the file that its descriptor has open."""
    original = getattr(os, name)

    def called(descriptor: int, *arguments: object) -> object:
        disk.call(name, os.readlink(f"/proc/self/fd/{descriptor}"))
        return original(descriptor, *arguments)

    return called


@contextmanager
def mounted(disk: Disk, *, figures: bool) -> Iterator[None]:
    """Run the block on this disk, with or without the figures: they take longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("write", "pwrite", "fsync", "fdatasync", "posix_fallocate"):
            patch.setattr(os, name, noting(disk, name))
        opened = noting_open(disk)
        patch.setattr(io, "open", opened)
        patch.setattr(builtins, "open", opened)
        if not figures:
            patch.setattr(commands, "draw_figures", lambda _: [])
        yield


@dataclass(frozen=True)
class Finished:
    """An undisturbed run, its configuration file and the calls that wrote it."""

    folder: Path
    config: Path
    calls: list[str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Finished:
    config = tmp_path_factory.mktemp("undisturbed") / "small.toml"
    config.write_text(CONFIG)
    disk = Disk(config.with_suffix(""))
    with mounted(disk, figures=True):
        assert main(["run", str(config)]) == 0
    return Finished(disk.folder, config, disk.calls)


def contents(path: Path) -> dict[str, np.ndarray]:
    """Every data set and attribute of an ensemble, by its place, other than times."""
    found = {}

    def note(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if name.startswith(OF_TIME):
            return
        if isinstance(item, h5py.Dataset):
            found[name] = item[...]
        names = set(item.attrs) - {"REFERENCE_LIST", "DIMENSION_LIST"}
        found.update({f"{name}@{key}": np.asarray(item.attrs[key]) for key in names})

    with h5py.File(path) as file:
        note("", file)
        file.visititems(note)
    return found


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def assert_same_run(folder: Path, finished: Path) -> None:
    """Bit for bit the undisturbed run, with nothing left over."""
    found, expected = contents(folder / "ensemble.h5"), contents(finished / "ensemble.h5")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    assert metrics(folder) == metrics(finished)
    assert json.loads((folder / "status.json").read_text())["stage"] == "done"
    assert not [path for path in folder.rglob("*") if path.suffix in (".partial", ".journal")]


def assert_refused(code: int, error: str) -> None:
    """Exit 74 with one message that names the needed and the free bytes, and no sign of a crash."""
    messages = [line for line in error.splitlines() if line.startswith("latticeflow: ")]
    assert (code, len(messages)) == (74, 1), error
    assert re.search(r"[1-9]\d* bytes are needed .*\d+ bytes are free", messages[0]), messages[0]
    assert not [words for words in CRASHES if words in error], error


def assert_intact(folder: Path, finished: Path, saved: dict[str, int]) -> None:
    """What was committed before the disk was full is there; `saved` has the newest step of each stage's checkpoints."""
    for stage, step in saved.items():
        checkpoint = load_checkpoint(folder / "checkpoint" / stage)
        assert (checkpoint.step >= step, checkpoint.notes) == (True, [])
    status = json.loads((folder / "status.json").read_text()) if (folder / "status.json").exists() else {}
    if not (folder / "ensemble.h5").exists():
        assert "chain" not in saved
        return
    with Ensemble.open(folder / "ensemble.h5") as ensemble, Ensemble.open(finished / "ensemble.h5") as whole:
        assert ensemble.verify() == []
        reported = status["done"] if status.get("stage") == "sampling" else 0
        assert ensemble.n_committed >= max(saved.get("chain", 0) - THERMALISATION, reported)
        np.testing.assert_array_equal(ensemble.field("links"), whole.field("links", slice(ensemble.n_committed)))
        for name in whole.history_names:
            rows = whole.history(name, slice(ensemble.n_committed))
            np.testing.assert_array_equal(ensemble.history(name), rows)


def newest_steps(calls: list[str]) -> dict[str, int]:
    """The steps of the newest checkpoints that calls have brought to the disk, by stage."""
    found = [re.fullmatch(r"fsync checkpoint/(\w+)/step-(\d+)\.pt\.partial", call) for call in calls]
    return {match[1]: int(match[2]) for match in found if match is not None}


def fail_and_resume(
    finished: Finished, config: Path, capsys, place: str, where: float, number: int = errno.ENOSPC
) -> None:
    """Run until the disk is full, look at what is left, make space and resume.

    It is full at a call on the place: the one of an index, or (a float) at a share of all of them.
    """
    calls = [call for call in finished.calls if re.search(place, call)]
    assert calls, f"an undisturbed run makes no call like {place}: {sorted(set(finished.calls))}"
    index = round(where * (len(calls) - 1)) if isinstance(where, float) else where
    disk = Disk(config.with_suffix(""), place, index, number)
    figures = "figures" in place
    with mounted(disk, figures=figures):
        code = main(["run", str(config)])
    assert disk.before is not None, "the run never came to this call"
    assert_refused(code, capsys.readouterr().err)
    assert_intact(disk.folder, finished.folder, newest_steps(disk.before))
    with mounted(Disk(disk.folder), figures=figures):
        assert main(["run", str(config), "--resume"]) == 0
    assert_same_run(disk.folder, finished.folder)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(CONFIG)
    return path


FIRST, MIDDLE, LAST = 0.0, 0.5, 1.0
SECOND_OF_BASELINE = 8
"""The training, what was rejected and what was tuned are stored before it, each in a write and an fsync."""


@pytest.mark.parametrize(
    ("place", "where"),
    [
        ("provenance.json", FIRST),
        ("config.toml", FIRST),
        (r"run\.lock", FIRST),
        (r"posix_fallocate ensemble\.h5\.partial", FIRST),
        (r"fsync ensemble\.h5\.partial", LAST),
        (r"ensemble\.h5\.lock", FIRST),
        ("checkpoint/training/", FIRST),
        ("checkpoint/training/", LAST),
        ("metrics.jsonl", FIRST),
        ("metrics.jsonl", LAST),
        ("status.json", LAST),
        ("checkpoint/chain/", FIRST),
        ("checkpoint/chain/", LAST),
        (r"pwrite ensemble\.h5$", FIRST),
        (r"pwrite ensemble\.h5$", LAST),
        (r"posix_fallocate ensemble\.h5$", FIRST),
        (r"ensemble\.h5\.journal", FIRST),
        (r"ensemble\.h5\.journal", SECOND_OF_BASELINE),
        (r"ensemble\.h5\.journal", LAST),
        (r"(?<!p)write ensemble\.h5$", MIDDLE),
        ("figures/", FIRST),
    ],
)
def test_full_disk_at_a_call(finished, config, capsys, place, where):
    fail_and_resume(finished, config, capsys, place, where)


def test_exceeded_quota_is_a_full_disk(finished, config, capsys):
    fail_and_resume(finished, config, capsys, "checkpoint/chain/", MIDDLE, errno.EDQUOT)


DRIVER = '''
"""Run scenarios on a small disk that is full: free bytes at the start, when it fills up, free bytes from then on."""
import contextlib, gc, io, json, os, shutil, sys
from pathlib import Path

from latticeflow.cli import commands, main
from latticeflow.cli.folder import RunFolder

disk, kept, undisturbed = (Path(word) for word in sys.argv[1:4])
filler, config = disk / "filler", disk / "small.toml"


def fill(free):
    """Take all the space of the disk but these bytes."""
    with filler.open("ab") as file:
        size = os.fstat(file.fileno()).st_size
        space = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - free
        if space > 0:
            os.posix_fallocate(file.fileno(), size, space)


def fill_after(when, free):
    """Fill the disk when a stage has got so far; every step before that finds space."""
    status = RunFolder.status

    def filling(folder, stage, done, total, **more):
        status(folder, stage, done, total, **more)
        if [stage, done] == when:
            fill(free)

    RunFolder.status = filling


def life(name, words, scenario):
    """Fork, run the program there to the end of its process, and return how that ended."""
    process = os.fork()
    if process == 0:
        for number, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(kept / f"{name}.{kind}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        if not scenario["figures"]:
            commands.draw_figures = lambda folder: []
        if scenario["when"] is not None:
            fill_after(scenario["when"], scenario["free"])
        sys.exit(main([*scenario["command"], str(config if "run" in scenario["command"] else disk / "small"), *words]))
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return {"code": code, "err": (kept / f"{name}.err").read_text(errors="replace")}


def played(name, scenario):
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copy(undisturbed.with_suffix(".toml"), config)
    if scenario["copied"]:
        shutil.copytree(undisturbed, disk / "small", ignore=shutil.ignore_patterns("figures"))
    if scenario["when"] is None:
        fill(scenario["free"])
    resume = ["--resume"] if scenario["copied"] and "run" in scenario["command"] else []
    lives = [life(f"{name}-full", resume, scenario)]
    shutil.copytree(disk / "small", kept / f"{name}-full", dirs_exist_ok=True)
    if scenario["again"]:
        lives.append(life(f"{name}-again", ["--resume"], {**scenario, "when": None}))
    filler.unlink()
    last = {**scenario, "when": None, "command": ["run"]}
    lives.append(life(f"{name}-resumed", ["--resume"], last))
    shutil.copytree(disk / "small", kept / f"{name}-resumed", dirs_exist_ok=True)
    return lives


def warm():
    """Do once what every life would: a first run imports and allocates for seconds, and so does tidying up after it."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(["run", str(undisturbed.with_suffix(".toml")), "--out", str(disk / "warm")])
    gc.collect()
    gc.freeze()


warm()
outcomes = {name: played(name, scenario) for name, scenario in json.loads(sys.argv[4]).items()}
(kept / "outcomes.json").write_text(json.dumps(outcomes))
'''
KIB = 1024
SIZE = 3072 * KIB


def scenario(free, *, when=None, command=("run",), copied=False, figures=False, again=False):
    """Free bytes on the disk, from the start or from the time that a stage has got to `when`; `again` while full."""
    return {"free": free, "when": when, "command": command, "copied": copied, "figures": figures, "again": again}


SCENARIOS = {
    "nothing free": scenario(0, again=True),
    "room for the provenance": scenario(4 * KIB),
    "no room for a checkpoint": scenario(32 * KIB),
    "no room for the ensemble": scenario(400 * KIB),
    "full in the training": scenario(0, when=["training", 2], again=True),
    "full in the sampling": scenario(0, when=["sampling", 8]),
    "room for half a journal": scenario(80 * KIB, when=["sampling", 16], again=True),
    "full when measured": scenario(16 * KIB, when=["measuring", 16]),
    "no room for figures": scenario(80 * KIB, command=("plot",), copied=True, figures=True),
}


@pytest.fixture(scope="module")
def small_disk(finished, tmp_path_factory) -> Path:
    """The outcomes of all scenarios on a real small disk; skipped where no file system may be mounted."""
    kept, disk = tmp_path_factory.mktemp("kept"), tmp_path_factory.mktemp("disk")
    shell = f'mount -t tmpfs -o size={SIZE} tmpfs "$0" && exec "$@"'
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", shell, str(disk)]
    if shutil.which("unshare") is None or subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("this system permits no mount in a user namespace of one's own")
    driver = kept / "driver.py"
    driver.write_text(DRIVER)
    words = [str(driver), str(disk), str(kept), str(finished.folder), json.dumps(SCENARIOS)]
    ran = subprocess.run(
        [*inside, sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},  # a process that uses it cannot fork
    )
    assert ran.returncode == 0, ran.stderr
    return kept


@pytest.mark.parametrize("name", SCENARIOS)
def test_full_disk(finished, small_disk, name):
    *full, resumed = json.loads((small_disk / "outcomes.json").read_text())[name]
    for life in full:
        assert_refused(life["code"], life["err"])
    left = small_disk / f"{name}-full"
    assert_intact(left, finished.folder, {path.parent.name: step_of(path) for path in sorted(left.rglob("step-*.pt"))})
    assert resumed["code"] == 0, resumed["err"]
    assert_same_run(small_disk / f"{name}-resumed", finished.folder)


def step_of(path: Path) -> int:
    return int(path.stem.partition("-")[2])
