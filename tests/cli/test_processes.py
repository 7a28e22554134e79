"""The program as one of several processes that torchrun started: the run of one process, refusals, and its end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import latticeflow
from latticeflow.storage import load_checkpoint

PATIENCE = 120.0  # seconds
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
    """Return a function that makes the program believe to be one of several processes."""

    def announce(processes, rank=0):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        monkeypatch.setenv("RANK", str(rank))

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


@pytest.mark.parametrize(
    "change",
    ["training.schedule=alternate", "training.schedule=end_to_end", "training.steps=0", 'chain.kernels=["hmc"]'],
)
def test_what_cannot_be_shared_is_refused(program, config, announced, change):
    announced(2)
    message = program("train", config, "--set", change).refused(USAGE)
    assert 'training.schedule = "simultaneous"' in message
    assert "start one process" in message
    assert not config.with_suffix("").exists()


def test_learning_from_samples_is_refused(program, config, announced, tmp_path):
    samples = tmp_path / "samples.h5"
    samples.touch()
    announced(2)
    changes = ["--set", "training.estimator=forward_kl", "--set", f'training.samples="{samples}"']
    message = program("train", config, *changes).refused(USAGE)
    assert 'training.estimator "reinforce", "reparametrisation" or "path"' in message


def test_averages_of_weights_are_refused(program, config, announced):
    announced(2)
    assert "training.ema: 2 processes" in program("train", config, "--set", "training.ema=0.9").refused(USAGE)


def test_more_processes_than_parts_are_refused(program, config, announced):
    announced(3)
    message = program("run", config).refused(USAGE)
    assert "training.parts: 2 parts cannot be shared by 3 processes; start 2 at most" in message


def test_only_the_first_process_says_what_is_wrong(program, config, announced):
    announced(3, rank=1)
    for words, code in (((), USAGE), (("--set", "training.parts=[1, 3]"), BAD_CONFIG)):
        outcome = program("train", config, *words)
        assert (outcome.code, outcome.out, outcome.err) == (code, "", "")


def test_other_commands_are_for_one_process(program, announced, tmp_path):
    announced(2)
    assert "2 processes are for `run` and `train`; start status alone" in program("status", tmp_path).refused(USAGE)


def test_a_number_of_processes_that_is_none(program, config, announced):
    announced("two")
    assert "WORLD_SIZE is 'two', expected a number" in program("train", config).refused(USAGE)
