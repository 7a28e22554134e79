"""The program as one of several processes that torchrun started: shared trainings, chains, refusals, and its end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

import latticeflow
from latticeflow.cli import processes
from latticeflow.cli.chains import _joined
from latticeflow.config import load_config
from latticeflow.exact import u1_plaquette
from latticeflow.mcmc import StepInfo
from latticeflow.storage import Ensemble, load_checkpoint
from latticeflow.training import Team

PATIENCE = 240.0  # seconds
FAILED, USAGE, BAD_CONFIG = 1, 2, 78
ROOT = Path(latticeflow.__file__).parents[1]
CONFIG = """
[run]
seed = 7
threads = 1
[lattice]
shape = [4, 4]
[action]
kind = "scalar"
m2 = -4.0
lam = 8.0
[sampler]
kind = "stabilised"
layers = 4
hidden = [4]
[training]
steps = 12
batch = 16
window = 2
checkpoint_every = 3
parts = [2, 2]
schedule = "simultaneous"
fine_tuning = 0.34
[chain]
replica = 8
draws = 8
block = 4
"""
LONG = ["--set", "training.steps=160"]


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "phi4.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def announced(monkeypatch):
    """Return a function that makes the program believe to be the first of several processes, which nobody helps."""

    def announce(count):
        monkeypatch.setenv("WORLD_SIZE", str(count))
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setattr(processes, "together", lambda command, options, tasks: command(options))

    return announce


def metrics(folder):
    return [json.loads(line) | {"seconds": 0} for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(one, other):
    """Assert that two trainings are bitwise the same but for the seconds."""
    left, right = (load_checkpoint(folder / "checkpoint" / "training").state for folder in (one, other))
    for weights in ("weights", "best_weights"):
        assert left[weights].keys() == right[weights].keys()
        assert all(torch.equal(value, right[weights][name]) for name, value in left[weights].items())
    assert left["best_ess"] == right["best_ess"]
    assert metrics(one) == metrics(other)


def started(*words):
    """Start the program as two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, "-m", "latticeflow", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, cwd=ROOT, text=True, **pipes)


def by_two(*words):
    """Return the exit code of two processes, what they printed and what they complained of."""
    with started(*words) as launched:
        try:
            out, err = launched.communicate(timeout=PATIENCE)
        finally:
            launched.kill()
    return launched.returncode, out, err


def test_run_by_two_processes_is_the_run_of_one(program, config, tmp_path):
    whole = tmp_path / "whole"
    assert program("train", config, "--out", whole).code == 0
    code, out, err = by_two("run", config)
    assert code == 0, err
    assert_same(whole, config.with_suffix(""))
    assert out.count("figures beside it") == 1
    assert err.count("training 12/12") == 1
    assert "latticeflow" not in err.lower().replace(str(config), "")


def test_interrupted_by_two_and_resumed_by_one(program, config, tmp_path):
    """A signal to torchrun reaches both; the first one stores where the states come together next."""
    whole, folder = tmp_path / "whole", config.with_suffix("")
    assert program("train", config, "--out", whole, *LONG).code == 0
    with started("train", config, *LONG) as launched:
        try:
            end = time.monotonic() + PATIENCE
            while not (folder / "metrics.jsonl").exists() and time.monotonic() < end:
                time.sleep(0.01)
            launched.send_signal(signal.SIGTERM)
            _, err = launched.communicate(timeout=PATIENCE)
        finally:
            launched.kill()
    assert "stopping after this step" in err
    assert "go on with: latticeflow train" in err
    reached = load_checkpoint(folder / "checkpoint" / "training").step
    assert 0 < reached == len(metrics(folder)) < 106
    assert program("train", config, *LONG, "--resume").code == 0
    assert_same(whole, folder)


def test_a_process_without_partners_fails(config):
    """It waits for as long as it was told to, then says why it ends, and leaves no folder."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    code = (
        "import sys; from datetime import timedelta; from latticeflow.cli import main, processes; "
        f"processes.PATIENCE = timedelta(seconds=2); sys.exit(main(['train', {str(config)!r}]))"
    )
    place = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    outcome = subprocess.run(
        [sys.executable, "-c", "import latticeflow.cli.processes; " + code],
        env=os.environ | place | {"PYTHONPATH": str(ROOT)},
        timeout=PATIENCE,
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == FAILED, outcome.stderr
    assert "latticeflow: 2 processes were announced and did not find each other" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert not config.with_suffix("").exists()


def test_averages_of_weights_are_refused_with_a_pipeline(program, config, announced):
    announced(2)
    assert "training.ema: 2 processes" in program("train", config, "--set", "training.ema=0.9").refused(USAGE)


def test_more_processes_than_parts_are_refused(program, config, announced):
    announced(3)
    message = program("run", config).refused(USAGE)
    assert "training.parts: 2 parts cannot be shared by 3 processes; start 2 at most" in message


@pytest.mark.parametrize(
    ("command", "several", "changes", "expected"),
    [
        ("train", 3, ["training.schedule=alternate"], "training.batch = 16 cannot be shared equally by 3 processes"),
        ("run", 3, ["training.steps=0"], "chain.replica = 8 chains cannot be shared equally by 3 processes"),
        (
            "run",
            16,
            ["training.schedule=end_to_end"],
            "chain.replica = 8 chains cannot be shared equally by 16 processes",
        ),
    ],
)
def test_what_is_not_shared_equally_is_refused(program, config, announced, command, several, changes, expected):
    announced(several)
    words = [word for change in changes for word in ("--set", change)]
    assert expected in program(command, config, *words).refused(USAGE)
    assert not config.with_suffix("").exists()


def test_more_processes_than_devices_are_refused(config, announced, monkeypatch):
    announced(4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    several = load_config(config, ["run.device=cuda"])
    with pytest.raises(processes.UsageError, match="4 processes per node, 2 CUDA devices: start 2 at most"):
        processes.check_shared(several, trains=True, samples=True)
    processes.check_shared(load_config(config, ["run.device=cuda:1"]), trains=False, samples=True)


def test_a_device_that_is_not_there(program, config, announced):
    announced(2)
    message = program("run", config, "--set", "run.device=meta")
    assert (message.code, message.err.count("run.device")) == (BAD_CONFIG, 1)


def test_clusters_are_refused(program, announced, tmp_path):
    announced(2)
    path = tmp_path / "moons.toml"
    path.write_text(CLUSTERS)
    message = program("train", path).refused(USAGE)
    assert 'sampler.pieces = "clusters": 2 processes cannot share its fits' in message
    assert "training.processes" in message


def test_other_commands_are_for_one_process(program, announced, tmp_path):
    announced(2)
    message = program("status", tmp_path).refused(USAGE)
    assert "2 processes are for `run`, `train` and `sample`; start status alone" in message


def test_a_number_of_processes_that_is_none(program, config, announced):
    announced("two")
    assert "WORLD_SIZE is 'two', expected a number" in program("train", config).refused(USAGE)


@pytest.mark.parametrize(("given", "threads"), [(None, 3), ("1", 3), ("2", 1)])
def test_threads_are_shared_by_the_processes_of_a_machine(config, monkeypatch, given, threads):
    """A number that torchrun does not set is left as it is."""
    before = torch.get_num_threads()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False) if given is None else monkeypatch.setenv(
        "OMP_NUM_THREADS", given
    )
    alone = load_config(config)
    try:
        torch.set_num_threads(1)
        processes.use_threads(alone.model_copy(update={"run": alone.run.model_copy(update={"threads": None})}))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


class Two(Team):
    """A team whose other process tells what this one does, its numbers doubled."""

    def __init__(self):
        self.processes, self.rank, self.wants_stop, self.stop_wanted = 2, 0, False, False
        self.elsewhere = self.cpu = 0.0

    def gathered(self, own):
        return torch.stack([own, 2 * own])


def test_kernels_learn_from_the_chains_of_all():
    own = StepInfo({"accepted": torch.tensor([False, True]), "delta_h": torch.tensor([0.5, -1.0]).double()}, bad=1)
    found = _joined(Two(), own)
    assert found.history["delta_h"].tolist() == [0.5, -1.0, 1.0, -2.0]
    assert found.history["accepted"].dtype == torch.bool
    assert found.bad == 3


U1 = """
[run]
seed = 3
threads = 1
[lattice]
shape = [4, 4]
[action]
kind = "u1"
beta = 2.0
[sampler.flow]
kind = "gauge"
layers = 2
hidden = [4]
[training]
steps = 8
batch = 8
window = 2
warmup = 2
checkpoint_every = 3
[chain]
kernels = ["independence", "hmc"]
replica = 8
draws = 48
block = 8
thermalisation = 20
[baseline]
samples = 64
beta = 2.0
"""
CLUSTERS = """
[lattice]
shape = [2]
[action]
kind = "two_moons"
[sampler]
kind = "piecewise"
pieces = "clusters"
[training]
estimator = "forward_kl"
draws = 400
"""


@pytest.fixture(scope="module")
def gauge(tmp_path_factory):
    """Return a configuration and the folder of its run by two processes."""
    path = tmp_path_factory.mktemp("two") / "u1.toml"
    path.write_text(U1)
    code, out, err = by_two("run", path)
    assert code == 0, err
    assert out.count("figures beside it") == err.count("training 8/8") == err.count("sampling 48/48") == 1
    return path, path.with_suffix("")


def drawn(folder):
    """Return what an ensemble and its training hold, but for measured times."""
    with Ensemble.open(folder / "ensemble.h5") as ensemble:
        found = {name: ensemble.history(name) for name in ensemble.history_names}
        found |= {"links": ensemble.field("links"), "proposed": ensemble.proposals("log_weight")}
    return {name: values.tobytes() for name, values in found.items()} | {"metrics": metrics(folder)}


def test_chains_of_two_processes(program, gauge, report):
    """All chains are there and differ; the statistics are right: one false alarm in 15,000 for an error that is."""
    _, folder = gauge
    assert program("verify", folder).code == 0
    with Ensemble.open(folder / "ensemble.h5") as ensemble:
        links = ensemble.field("links")
        assert (ensemble.chains, ensemble.n_committed) == (8, 48)
    assert len({chain.tobytes() for chain in links[:, 0]}) == 8
    found = report(folder)["observables"]["plaquette"]
    assert abs(found["mean"] - u1_plaquette(2.0, (4, 4))) < 4 * found["error"]
    assert load_checkpoint(folder / "checkpoint" / "chain").state["processes"] == 2
    status = json.loads((folder / "status.json").read_text())
    assert status["stage"] == "done"


def test_chains_begun_by_two_are_not_for_one(program, gauge):
    """What goes on is refused at once, what is finished is not computed again."""
    path, folder = gauge
    message = program("sample", folder, "--extend", 8).refused(USAGE)
    assert "the chains were begun by 2 processes, on which their numbers depend, this is 1; start 2" in message
    assert program("run", path, "--resume", "--extend", 8).code == USAGE
    assert program("train", path, "--resume").code == 0
    assert program("measure", folder).code == 0


def test_one_message_of_two_processes(config):
    """Each ends with the code of the first; torchrun reports them."""
    changes = ["--set", "training.schedule=end_to_end", "--set", "training.batch=15"]
    code, out, err = by_two("train", config, *changes)
    assert code != 0
    assert (out, err.count("training.batch = 15 cannot be shared equally by 2 processes")) == ("", 1)
    assert err.count("latticeflow:") == 1
    assert set(re.findall(r"exitcode *: (-?\d+)", err)) == {str(USAGE)}
    assert not config.with_suffix("").exists()


def rank_of(launched, rank):
    """Return the id of one of the processes that torchrun has started."""
    for child in psutil.Process(launched.pid).children():
        with suppress(psutil.Error):
            if child.environ().get("RANK") == str(rank):
                return child.pid
    raise AssertionError(f"there is no process {rank}")


def interrupted(path, folder, *, rank, number, stage):
    """Start a run of two, send a signal to one of them in a stage, and return what was said."""
    with started("run", path, "--out", folder) as launched:
        try:
            end = time.monotonic() + PATIENCE
            while stage_of(folder) != stage and time.monotonic() < end and launched.poll() is None:
                time.sleep(0.01)
            os.kill(rank_of(launched, rank), number)
            _, err = launched.communicate(timeout=PATIENCE)
        finally:
            launched.kill()
    assert launched.returncode != 0
    assert (folder / "status.json").exists()
    return err


def stage_of(folder):
    with suppress(OSError, ValueError):
        return json.loads((folder / "status.json").read_text())["stage"]


FAULTS = [
    pytest.param(1, signal.SIGKILL, "sampling", id="the second is killed in its chains"),
    pytest.param(0, signal.SIGKILL, "sampling", id="the first is killed in its chains", marks=pytest.mark.long),
    pytest.param(1, signal.SIGTERM, "sampling", id="the second is stopped in its chains", marks=pytest.mark.long),
    pytest.param(0, signal.SIGTERM, "sampling", id="the first is stopped in its chains", marks=pytest.mark.long),
    pytest.param(0, signal.SIGKILL, "training", id="the first is killed in its training", marks=pytest.mark.long),
    pytest.param(1, signal.SIGKILL, "training", id="the second is killed in its training", marks=pytest.mark.long),
    pytest.param(1, signal.SIGTERM, "training", id="the second is stopped in its training", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("rank", "number", "stage"), FAULTS)
def test_an_interrupted_run_of_two_goes_on_bit_for_bit(gauge, tmp_path, rank, number, stage):
    path, whole = gauge
    folder = tmp_path / "again"
    err = interrupted(path, folder, rank=rank, number=number, stage=stage)
    if number == signal.SIGTERM:
        assert err.count("go on with: latticeflow run") == 1
    code, _, err = by_two("run", path, "--out", folder, "--resume")
    assert code == 0, err
    assert drawn(folder) == drawn(whole)
