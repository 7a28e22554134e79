import os
import subprocess
import sys

import h5py
import numpy as np
import pytest

from latticeflow.storage import DiskFullError, Ensemble, commit


@pytest.mark.parametrize("size", [1, 2, 3, 4, 719, 720, 721, 65535, 65536, 65537, 200003])
@pytest.mark.parametrize("fill", ["random", "zeros", "ones"])
def test_fletcher32_is_the_one_of_hdf5(path, size, fill):
    data = {"random": np.random.default_rng(size).bytes(size), "zeros": bytes(size), "ones": b"\xff" * size}[fill]
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("x", data=np.frombuffer(data, np.uint8), chunks=(size,), fletcher32=True)
        _, stored = dataset.id.read_direct_chunk((0,))
    assert bytes(stored) == data + commit.fletcher32(data).to_bytes(4, "little")


class Recorder:
    """Stands in for `os` in the commit module: what is written and synced, in order, and done as well."""

    def __init__(self):
        self.calls = []

    def pwrite(self, descriptor, data, offset):
        self.calls.append((offset, bytes(data)))
        return os.pwrite(descriptor, data, offset)

    def fsync(self, descriptor):
        self.calls.append("fsync")
        os.fsync(descriptor)


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(commit, "os", recorder)
    return recorder


def test_the_marker_comes_last_between_two_syncs(path, kit, recorder):
    with Ensemble.create(path, **kit.settings()) as ensemble:
        recorder.calls.clear()
        ensemble.append(**kit.block(0, 8))
    *rows, first_sync, complement, marker, second_sync = recorder.calls
    assert (first_sync, second_sync) == ("fsync", "fsync")
    assert complement[1] == (~8).to_bytes(8, "little", signed=True)
    assert marker[1] == (8).to_bytes(8, "little")
    assert len(rows) == 8  # links, action, accepted, crc32 of two chains
    assert "fsync" not in rows


def test_a_death_between_rows_and_marker_leaves_the_count(path, kit, monkeypatch):
    with kit.fill(Ensemble.create(path, **kit.settings()), 8) as ensemble:
        with monkeypatch.context() as patched:
            patched.setattr(commit, "_write_at", dies_at_the_marker)
            with pytest.raises(InterruptedError, match="before the marker"):
                ensemble.append(**kit.block(8, 8))
        assert ensemble.n_committed == 8
        with Ensemble.open(path) as reader:
            assert reader.n_committed == 8
            kit.check(reader)
        kit.check(kit.fill(ensemble))


def dies_at_the_marker(descriptor, data, offset):
    if len(data) == 8:
        raise InterruptedError("before the marker")
    os.pwrite(descriptor, data, offset)


def test_a_half_written_block_is_written_again(path, kit):
    """The last chunk is half empty: HDF5 would read it, and find a wrong checksum, before it wrote into it."""
    kit.fill(Ensemble.create(path, **kit.settings()), 16).close()
    with h5py.File(path) as file:
        chunks = [file["fields/links"].id.get_chunk_info_by_coord((chain, 16, 0, 0, 0)) for chain in range(2)]
    with path.open("r+b") as file:
        for chunk in chunks:
            file.seek(chunk.byte_offset)
            file.write(b"\xaa" * (chunk.size // 2))
    with Ensemble.open(path, "a") as ensemble:
        kit.check(kit.fill(ensemble))


def test_a_short_write_is_continued(path, kit, monkeypatch):
    monkeypatch.setattr(commit, "os", Recorder())
    monkeypatch.setattr(commit.os, "pwrite", lambda descriptor, data, at: os.pwrite(descriptor, data[:100], at))
    with Ensemble.create(path, **kit.settings()) as ensemble:
        kit.check(kit.fill(ensemble))


def test_no_space_during_a_run_is_named(path, kit, monkeypatch):
    def no_space(*_):
        raise OSError(28, os.strerror(28))

    with kit.fill(Ensemble.create(path, **kit.settings()), 8) as ensemble:
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", no_space)
            with pytest.raises(DiskFullError, match="are needed"):
                ensemble.append(**kit.block(8, 8))
        kit.check(kit.fill(ensemble))


FAILING_RUN = """
import resource, sys
from pathlib import Path
import numpy as np
from latticeflow.storage import Ensemble

ensemble = Ensemble.open(sys.argv[1], "a")
rows = np.zeros((2, 8))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    ensemble.append(fields={"links": np.zeros((2, 8, 2, 4, 4))}, history={"action": rows, "accepted": rows > 0})
except OSError as error:
    print(error.strerror)
"""


def test_a_write_that_the_system_refuses_is_reported_and_the_process_ends_in_order(path, kit):
    kit.fill(Ensemble.create(path, **kit.settings()), 8).close()
    done = subprocess.run([sys.executable, "-c", FAILING_RUN, str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "File too large\n", "")
    with Ensemble.open(path) as ensemble:
        assert ensemble.n_committed == 8
        kit.check(ensemble)
