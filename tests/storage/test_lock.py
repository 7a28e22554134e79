import os
import platform
import signal
import subprocess
import sys

import pytest

from latticeflow.storage import Ensemble, LockedError, RunLock

HOLDER = """
import sys, time
from latticeflow.storage import RunLock

with RunLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_lock_names_the_holder_and_leaves_it_alone(tmp_path):
    path = tmp_path / "run.lock"
    expected = rf"process {os.getpid()} on {platform.node()}, started \d{{4}}-\d\d-\d\dT"
    with RunLock(path):
        for _ in range(2):
            with pytest.raises(LockedError, match=expected) as caught, RunLock(path):
                pass
        assert caught.value.exit_code == 75
    with RunLock(path), pytest.raises(LockedError, match="another run"):
        RunLock(path).acquire()


def test_a_lock_can_be_taken_again_after_its_release(tmp_path):
    lock = RunLock(tmp_path / "run.lock")
    for _ in range(2):
        with lock, pytest.raises(LockedError, match="held already"):
            lock.acquire()
    lock.release()


def test_a_killed_holder_leaves_nothing_to_clean_up(tmp_path):
    path = tmp_path / "run.lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=f"process {holder.pid} "):
            RunLock(path).acquire()
        holder.kill()
        assert holder.wait() == -signal.SIGKILL
    with RunLock(path), pytest.raises(LockedError, match=f"process {os.getpid()} "):
        RunLock(path).acquire()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}'])
def test_a_holder_without_a_name_is_still_a_holder(tmp_path, content):
    path = tmp_path / "run.lock"
    with RunLock(path):
        path.write_text(content)
        with pytest.raises(LockedError, match="has not written its name"):
            RunLock(path).acquire()


def test_a_second_writer_of_an_ensemble_is_refused_and_readers_are_not(path, kit):
    with kit.fill(Ensemble.create(path, **kit.settings()), 8) as ensemble:
        with pytest.raises(LockedError, match=f"process {os.getpid()} "):
            Ensemble.open(path, "a")
        with Ensemble.open(path) as reader:
            kit.check(reader)
        kit.check(kit.fill(ensemble))
    Ensemble.open(path, "a").close()
