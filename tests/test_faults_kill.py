"""Runs that are killed or interrupted at any moment go on, bit for bit, with `--resume` and without a clean-up.

The program is driven by its command line. Importing it takes longer than all that it does here, so this file, run as a
script, imports it once and forks a warm child for every life of a run (`serve`). A child is killed by the clock, or it
kills itself at the n-th system call by which it changes the disk. Figures are left out: they would take most of a life.
"""

import gc
import itertools
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from unittest.mock import patch

import h5py
import numpy as np
import pytest

import latticeflow
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
steps = 6
batch = 4
checkpoint_every = 3
window = 2
[chain]
kernels = ["hmc", "winding", "independence"]
replica = 4
draws = 8
block = 2
candidates = 8
thermalisation = 4
[baseline]
samples = 16
beta = 1.0
sector = 0.1
[analysis]
observables = ["plaquette", "topological_charge"]
"""

SLOW_TRAINING = ("training.steps=60", "training.checkpoint_every=1000000")
SLOW_CHAIN = ("chain.thermalisation=20", "chain.draws=20")
LONG_BLOCK = ("chain.thermalisation=2", "chain.draws=30", "chain.block=30")

SYSTEM_CALLS = ("fsync", "replace", "rename", "pwrite", "link", "unlink", "ftruncate", "posix_fallocate", "mkdir")
KILLED, INTERRUPTED = -signal.SIGKILL, 130
MEASURED_TIME = ("training/seconds", "analysis/cost")
REFERENCES = ("DIMENSION_LIST", "REFERENCE_LIST")
PATIENCE = 120.0  # seconds


def serve() -> None:
    """Live one life of the program for every order (a line of JSON), and print its process and its exit code."""
    import torch._dynamo  # noqa: F401, torch's Adam loads it, which takes longer than a life

    from latticeflow.cli import commands, main

    gc.freeze()
    fork = multiprocessing.get_context("fork")
    with patch.object(commands, "draw_figures"):
        print(latticeflow.__file__, flush=True)
        for line in sys.stdin:
            order = json.loads(line)
            child = fork.Process(target=live, args=(main, order))
            child.start()
            print(child.pid, flush=True)
            child.join(order.get("delay", PATIENCE))
            child.kill()
            child.join()
            print(child.exitcode, flush=True)


def live(main: Callable[[list[str]], int], order: dict) -> None:
    """Run the program in this child; `order` has its words, its standard error, and may have a call to die at."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    os.dup2(os.open(order["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    made = watch_calls(order)
    code = main(order["words"])
    if "calls" in order:
        Path(order["calls"]).write_text("\n".join(made))
    sys.exit(code)


def watch_calls(order: dict) -> list[str]:
    """Note every system call that changes the disk from now on, and its file; die before or after the ordered one."""
    made: list[str] = []

    def watched(name: str, call: Callable) -> Callable:
        def calling(*arguments: object, **keywords: object) -> object:
            place = "" if isinstance(arguments[0], int) else os.path.basename(arguments[0])
            made.append(f"{name} {place}")
            here = len(made) == order.get("call")
            if here and not order["after"]:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*arguments, **keywords)
            if here:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return calling

    for name in SYSTEM_CALLS:
        setattr(os, name, watched(name, getattr(os, name)))
    return made


@dataclass
class Server:
    """The process that runs `serve`, for one life at a time."""

    process: subprocess.Popen
    living: int | None = None

    def start(self, run: "Run", words: list[str], **order: object) -> int:
        """Begin a life and return its process."""
        order |= {"words": words, "stderr": str(run.stderr)}
        print(json.dumps(order), file=self.process.stdin, flush=True)
        self.living = int(self.process.stdout.readline())
        return self.living

    def end(self) -> int:
        """Wait for the end of a life and return its exit code."""
        self.living = None
        return int(self.process.stdout.readline())

    def live(self, run: "Run", words: list[str], **order: object) -> int:
        self.start(run, words, **order)
        return self.end()


@dataclass(frozen=True)
class Run:
    """A run folder below a folder with a blank in its name, and the words that begin the run or go on with it."""

    root: Path
    name: str
    changes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.root.mkdir(exist_ok=True)
        self.config.write_text(CONFIG)

    @property
    def config(self) -> Path:
        return self.root / "small.toml"

    @property
    def folder(self) -> Path:
        return self.root / self.name

    @property
    def stderr(self) -> Path:
        return self.root / f"{self.name}.stderr"

    @property
    def first(self) -> list[str]:
        changes = itertools.chain.from_iterable(("--set", change) for change in self.changes)
        return ["run", str(self.config), "--out", str(self.folder), *changes]

    @property
    def again(self) -> list[str]:
        return [*self.first, "--resume"]

    @property
    def next(self) -> list[str]:
        return self.again if self.folder.exists() else self.first

    def status(self) -> dict:
        """Return what status.json says, which must be whole at any time."""
        path = self.folder / "status.json"
        return json.loads(path.read_text()) if path.exists() else {"stage": "none", "done": 0}

    def said(self) -> str:
        return self.stderr.read_text()

    def copied(self, name: str) -> "Run":
        copy = Run(self.root, name, self.changes)
        shutil.rmtree(copy.folder, ignore_errors=True)
        if self.folder.exists():
            shutil.copytree(self.folder, copy.folder)
        return copy


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing disturbed: its contents, how long it took, and the system calls that it made."""

    run: Run
    contents: dict[str, object]
    seconds: float
    calls: list[str] = field(repr=False)

    def differences(self, run: Run) -> list[str]:
        """Return the names of what differs in the ensemble and the training record of a run; none should."""
        found = contents(run.folder)
        return sorted(name for name in self.contents | found if self.contents.get(name) != found.get(name))

    def death(self, random: np.random.Generator, *, within: float) -> dict[str, object]:
        """Return a random death by the clock or at a system call, within this part of an undisturbed life.

        Calls of one kind in a row count as one place to die at, and
        early places are likelier, for the analysis makes more calls than all other stages.
        """
        if random.random() < 0.5:
            return {"delay": random.uniform(0, within * self.seconds)}
        numbers = range(1, len(self.calls) + 1)
        places = [list(group) for _, group in itertools.groupby(numbers, key=lambda n: self.calls[n - 1].split()[0])]
        place = places[int(len(places) * within * random.random() ** 2)]
        return {"call": int(random.choice(place)), "after": bool(random.integers(2))}

    def number(self, call: str, occurrence: int) -> int:
        """Return the number, from 1, of a call such as "replace step-*.pt.partial"."""
        found = [number for number, made in enumerate(self.calls, start=1) if fnmatchcase(made, call)]
        assert len(found) >= occurrence, f"{call} was made {len(found)} times"
        return found[occurrence - 1]


def contents(folder: Path) -> dict[str, object]:
    """Return every data set and attribute of an ensemble and the steps of its training, but for measured times."""
    found: dict[str, object] = {}

    def note(name: str, item: h5py.HLObject) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = (item.shape, item.dtype.str, item[...].tobytes())
        for key in set(item.attrs) - set(REFERENCES):
            value = np.asarray(item.attrs[key])
            found[f"{name}@{key}"] = value.tolist() if value.dtype == object else value.tobytes()

    with h5py.File(folder / "ensemble.h5") as file:
        note("", file)
        file.visititems(note)
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    found["metrics"] = [record | {"seconds": 0.0} for record in records]
    return {name: value for name, value in found.items() if not name.startswith(MEASURED_TIME)}


@pytest.fixture(scope="module")
def warm_server() -> Iterator[Server]:
    environment = os.environ | {
        "PYTHONPATH": str(Path(latticeflow.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    command = [sys.executable, "-P", __file__]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **streams) as process:
        assert process.stdout.readline().strip() == latticeflow.__file__
        yield Server(process)


@pytest.fixture
def server(warm_server) -> Iterator[Server]:
    """Lend the server to a test, and end the life that the test left behind where it failed."""
    yield warm_server
    if warm_server.living is not None:
        with suppress(ProcessLookupError):
            os.kill(warm_server.living, signal.SIGKILL)
        warm_server.end()


@pytest.fixture(scope="module")
def undisturbed(warm_server, tmp_path_factory) -> Callable[..., Undisturbed]:
    """Return a function from changes of the configuration to the run that nothing disturbed, done once for each."""
    known: dict[tuple[str, ...], Undisturbed] = {}

    def make(*changes: str) -> Undisturbed:
        run, started = Run(tmp_path_factory.mktemp("undisturbed"), "run", changes), time.monotonic()
        calls = run.root / "calls"
        assert warm_server.live(run, run.first, calls=str(calls)) == 0, run.said()
        seconds = time.monotonic() - started
        return Undisturbed(run, contents(run.folder), seconds, calls.read_text().splitlines())

    def get(*changes: str) -> Undisturbed:
        if changes not in known:
            known[changes] = make(*changes)
        return known[changes]

    return get


@dataclass
class Tally:
    """What became of runs that were killed: the stages of the kills, and the resumes that ended as undisturbed."""

    kills: int = 0
    stages: Counter = field(default_factory=Counter)
    identical: int = 0
    wrong: list[str] = field(default_factory=list)

    def count(self, server: Server, reference: Undisturbed, run: Run, death: dict[str, object]) -> bool:
        """Count a kill and return whether a copy of what is left, and of its locks, goes on to the undisturbed end."""
        self.kills += 1
        self.stages.update(stages_of(run.folder))
        copy = run.copied("copy")
        code = server.live(copy, copy.again)
        wrong = reference.differences(copy)[:3] if code == 0 else f"exit {code}, {copy.said().strip()}"
        self.identical += not wrong
        self.wrong += [f"after {death}: {wrong}"] if wrong else []
        return not wrong


def killed_runs(
    server: Server, reference: Undisturbed, root: Path, *, kills: int, stages: set[str], seed: int
) -> Tally:
    """Kill runs so many times, and on, up to three times as often, until all stages were hit.

    Each folder that is left is looked at, and a copy of it goes on to the end. A run that was killed goes on, to be
    killed again, until it ends, or its copy could not, or, every other time, it was measuring and not much is left.
    The first life of a run dies early, in its training, the others where they may.
    """
    random, tally = np.random.default_rng(seed), Tally()
    run, committed = Run(root, "run"), 0
    while tally.kills < kills or (not stages <= set(tally.stages) and tally.kills < 3 * kills):
        death = reference.death(random, within=0.5 if run.folder.exists() else 0.25)
        code = server.live(run, run.next, **death)
        if code == KILLED:
            committed = check_committed(run, reference, least=committed)
            fit = tally.count(server, reference, run, death)
            over = not fit or ("measuring" in stages_of(run.folder) and random.random() < 0.5)
        else:
            assert code == 0, run.said()
            assert reference.differences(run) == []
            over = True
        if over:
            shutil.rmtree(run.folder, ignore_errors=True)
            committed = 0
    return tally


def stages_of(folder: Path) -> set[str]:
    """Return what a run was at when it was killed, by what is there."""
    half_made = any((folder / "checkpoint").glob("*/*.partial"))
    return {"checkpointing", stage_of(folder)} if half_made else {stage_of(folder)}


def stage_of(folder: Path) -> str:
    if not (folder / "run.lock").exists():
        return "starting"
    if not (folder / "ensemble.h5").exists():
        return "training"
    with Ensemble.open(folder / "ensemble.h5") as ensemble:
        if ensemble.n_committed == ensemble.draws:
            return "measuring"
        return "sampling" if ensemble.n_committed else "thermalising"


def check_committed(run: Run, reference: Undisturbed, *, least: int) -> int:
    """Check that what was committed is whole and what the undisturbed run has there; return the number of draws."""
    path = run.folder / "ensemble.h5"
    if not path.exists():
        assert least == 0, f"{path} is gone"
        return 0
    with Ensemble.open(path) as found, Ensemble.open(reference.run.folder / "ensemble.h5") as expected:
        count = found.n_committed
        assert count >= least, "committed draws were lost"
        assert found.verify() == []
        assert rows(found, count) == rows(expected, count)
    return count


def rows(ensemble: Ensemble, count: int) -> dict[str, bytes]:
    """Return the bytes of the first draws of every column."""
    draws, kept = slice(count), {}
    kept |= {name: ensemble.field(name, draws) for name in ensemble.field_names}
    kept |= {name: ensemble.history(name, draws) for name in ensemble.history_names}
    kept |= {"proposed": ensemble.proposals("log_weight")[:, :count]}
    return {name: values.tobytes() for name, values in kept.items()}


def test_ten_kills_at_random_times(server, undisturbed, tmp_path):
    """Ten kills by the clock and at system calls; each folder that is left goes on to the undisturbed end."""
    stages = {"training", "sampling"}
    tally = killed_runs(server, undisturbed(), tmp_path / "a run", kills=10, stages=stages, seed=1)
    assert not tally.wrong, "\n".join(tally.wrong)
    assert tally.identical == tally.kills >= 10
    assert stages <= set(tally.stages), tally.stages


@pytest.mark.long
def test_two_hundred_kills_at_random_times(server, undisturbed, tmp_path):
    stages = {"starting", "training", "checkpointing", "thermalising", "sampling", "measuring"}
    tally = killed_runs(server, undisturbed(), tmp_path / "a run", kills=200, stages=stages, seed=2)
    assert not tally.wrong, "\n".join(tally.wrong)
    assert tally.identical == tally.kills >= 200
    assert stages == set(tally.stages), tally.stages


@pytest.mark.parametrize(
    ("call", "occurrence"),
    [
        pytest.param("replace provenance.json.partial", 1, id="before the provenance"),
        pytest.param("replace config.toml.partial", 1, id="before the configuration"),
        pytest.param("replace step-*.pt.sha256.partial", 1, id="before the first checkpoint of the training"),
        pytest.param("replace step-*.pt.sha256.partial", 3, id="before the first checkpoint of the chain"),
        pytest.param("replace step-*.pt.partial", 3, id="in the first checkpoint of the chain"),
        pytest.param("replace step-*.pt.partial", 4, id="in the second checkpoint of the chain"),
        pytest.param("unlink ensemble.h5.journal", 5, id="between the parts of the baseline"),
    ],
)
def test_kill_at_a_dangerous_moment(server, undisturbed, tmp_path, call, occurrence):
    """Before the given call of a life: moments when something is half made and where a random kill seldom falls."""
    reference, run = undisturbed(), Run(tmp_path / "a run", "killed")
    number = reference.number(call, occurrence)
    assert server.live(run, run.first, call=number, after=False) == KILLED
    check_committed(run, reference, least=0)
    assert server.live(run, run.again) == 0, run.said()
    assert reference.differences(run) == []


def wait_for(condition: Callable[[], bool], process: int, run: Run) -> None:
    """Look again and again until something is so; fail with what the program said where it never is."""
    while not condition():
        assert Path(f"/proc/{process}").exists(), f"the life is over: {run.said()}"
        time.sleep(0.005)


def test_stale_locks_need_no_clean_up(server, undisturbed, tmp_path):
    """The lock files of a killed run still name it, and yet `--resume` goes on."""
    reference, run = undisturbed(), Run(tmp_path / "a run", "killed")
    process = server.start(run, run.first)
    wait_for(lambda: run.status()["stage"] == "sampling", process, run)
    os.kill(process, signal.SIGKILL)
    assert server.end() == KILLED
    for lock in ("run.lock", "ensemble.h5.lock"):
        assert json.loads((run.folder / lock).read_text())["pid"] == process
    assert server.live(run, run.again) == 0, run.said()
    assert reference.differences(run) == []


def go_on_as_told(server: Server, reference: Undisturbed, run: Run) -> None:
    """Run the command that an interrupted run printed, as a shell would read it, and compare its end."""
    said = run.said()
    assert "Traceback" not in said
    [line] = [line for line in said.splitlines() if "latticeflow run" in line]
    command = line[line.index("latticeflow run") : line.index("--resume") + len("--resume")]
    assert server.live(run, shlex.split(command)[1:]) == 0, run.said()
    assert reference.differences(run) == []


signals = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


@signals
def test_signal_in_training_keeps_the_last_step(server, undisturbed, tmp_path, number):
    """The next regular checkpoint is far beyond the last step, so the one there is was made for the signal."""
    run, metrics = Run(tmp_path / "a run", "stopped", SLOW_TRAINING), tmp_path / "a run" / "stopped" / "metrics.jsonl"
    process = server.start(run, run.first)
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, process, run)
    os.kill(process, number)
    assert server.end() == INTERRUPTED, run.said()
    step = load_checkpoint(run.folder / "checkpoint" / "training").step
    assert step == json.loads(metrics.read_text().splitlines()[-1])["step"] < 60
    go_on_as_told(server, undisturbed(*SLOW_TRAINING), run)


@signals
def test_signal_in_thermalisation_keeps_the_last_block(server, undisturbed, tmp_path, number):
    run = Run(tmp_path / "a run", "stopped", SLOW_CHAIN)
    seen = stopped_in("thermalising", server, run, number)
    checkpoint = load_checkpoint(run.folder / "checkpoint" / "chain")
    assert seen <= checkpoint.state["thermalised"] < 20
    go_on_as_told(server, undisturbed(*SLOW_CHAIN), run)


@signals
def test_signal_in_sampling_keeps_the_last_block(server, undisturbed, tmp_path, number):
    run = Run(tmp_path / "a run", "stopped", SLOW_CHAIN)
    seen = stopped_in("sampling", server, run, number)
    with Ensemble.open(run.folder / "ensemble.h5") as ensemble:
        assert seen <= ensemble.n_committed < 20
        last = ensemble.field("links")[:, -1]
    state = load_checkpoint(run.folder / "checkpoint" / "chain").state["state"]
    np.testing.assert_array_equal(state["field"], last)
    go_on_as_told(server, undisturbed(*SLOW_CHAIN), run)


def stopped_in(stage: str, server: Server, run: Run, number: int) -> int:
    """Signal a run once it is in a stage of its chain; return how far it was then."""
    process = server.start(run, run.first)
    wait_for(lambda: run.status()["stage"] == stage, process, run)
    seen = run.status()
    os.kill(process, number)
    assert server.end() == INTERRUPTED, run.said()
    assert seen["stage"] == stage, "the stage was over before it could be interrupted"
    return seen["done"]


@signals
def test_second_signal_stops_at_once(server, undisturbed, tmp_path, number):
    """The first one leaves the long block of draws running, the second one ends it: nothing of it is committed."""
    run = Run(tmp_path / "a run", "stopped", LONG_BLOCK)
    process = server.start(run, run.first)
    wait_for(lambda: run.status()["stage"] == "thermalising", process, run)
    for pause in (0.05, 0.1):  # seconds; the block takes longer
        time.sleep(pause)
        os.kill(process, number)  # raises ProcessLookupError if the first signal has ended it
    assert server.end() == INTERRUPTED, run.said()
    with Ensemble.open(run.folder / "ensemble.h5") as ensemble:
        assert ensemble.n_committed == 0
    go_on_as_told(server, undisturbed(*LONG_BLOCK), run)


if __name__ == "__main__":
    serve()
