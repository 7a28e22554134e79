"""A run that is killed: nothing that it had committed is lost."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from latticeflow.storage import Ensemble

RUN = """
import sys
import numpy as np
from latticeflow.storage import Ensemble

with Ensemble.open(sys.argv[1], "a") as ensemble:
    while ensemble.n_committed < ensemble.draws:
        first = ensemble.n_committed
        draws = np.arange(first, min(first + ensemble.block, ensemble.draws)) + np.array([[0.0], [0.5]])
        links = np.broadcast_to(draws[..., None, None, None], (*draws.shape, 2, 16, 16))
        print(ensemble.append(fields={"links": links}, history={"action": draws}), flush=True)
        if "measure" in sys.argv:
            ensemble.write_observable("twice", 2 * ensemble.history("action"))
"""


@pytest.mark.parametrize("also", ["append", "measure"])
def test_kill_9_five_times(path, kit, also):
    """Each life of the run ends after its first commit and a delay that differs from life to life."""
    delays = 0.02 * np.random.default_rng(1).random(5)
    settings = kit.settings(fields={"links": ((2, 16, 16), float)}, history={"action": float}, draws=4003, block=5)
    Ensemble.create(path, **settings).close()
    for delay in delays:
        reported = killed_after(path, also, delay)
        with Ensemble.open(path, "a") as ensemble:
            assert ensemble.n_committed >= reported
            check_rows(ensemble)
    assert 0 < ensemble.n_committed < 4003, "the run was killed on its way"


def killed_after(path, also, delay):
    """Start a run, kill it some time after its first commit, and return the last commit that it reported."""
    with subprocess.Popen([sys.executable, "-c", RUN, str(path), also], stdout=subprocess.PIPE, text=True) as run:
        first = run.stdout.readline()
        time.sleep(delay)
        run.kill()
        rest = run.stdout.read()
    assert run.returncode == -signal.SIGKILL
    return int((first + rest).split("\n")[-2])


def check_rows(ensemble):
    draws = np.arange(ensemble.n_committed) + np.array([[0.0], [0.5]])
    np.testing.assert_array_equal(ensemble.history("action"), draws)
    np.testing.assert_array_equal(ensemble.field("links")[..., 1, 3, 2], draws)
    assert ensemble.verify() == []
    if "twice" in ensemble.observable_names:
        measured = ensemble.observable("twice")
        np.testing.assert_array_equal(measured, 2 * draws[:, : measured.shape[1]])
