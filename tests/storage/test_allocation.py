import os
import shutil
from collections import namedtuple

import h5py
import pytest

from latticeflow.storage import DiskFullError, Ensemble, allocation

Usage = namedtuple("Usage", "total used free")


def test_all_space_is_taken_at_creation(path, kit):
    settings = kit.settings(draws=4000, block=100)
    with Ensemble.create(path, **settings) as ensemble:
        size = path.stat().st_size
        assert path.stat().st_blocks * 512 >= 2 * 4000 * (2 * 4 * 4 * 8 + 8 + 1 + 4)
        needed = allocation.needed_bytes(ensemble.header, ensemble._parts[0].columns.values())
        assert size <= needed <= 1.2 * size
        kit.fill(ensemble, 200)
    assert path.stat().st_size == size


def test_a_full_disk_fails_at_creation_with_both_numbers(path, kit, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**6, 10**6 - 1234, 1234))
    with pytest.raises(DiskFullError, match=r"\d+ bytes are needed .* 1234 bytes are free") as caught:
        Ensemble.create(path, **kit.settings())
    assert (caught.value.free, caught.value.exit_code) == (1234, 74)
    assert caught.value.needed > 2 * 20 * 256
    assert list(path.parent.iterdir()) == []


def test_a_disk_that_fills_up_during_creation_leaves_nothing(path, kit, monkeypatch):
    def no_space(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    with pytest.raises(DiskFullError, match="are needed"):
        Ensemble.create(path, **kit.settings())
    assert list(path.parent.iterdir()) == []


def test_a_death_during_creation_does_not_stand_in_the_way(path, kit):
    path.with_name(path.name + ".partial").write_bytes(b"half a file")
    with Ensemble.create(path, **kit.settings()) as ensemble:
        kit.fill(ensemble)
    assert not list(path.parent.glob("*.partial"))


def test_a_block_beyond_the_limit_of_a_chunk_is_refused(path, kit):
    huge = kit.settings(fields={"links": ((2, 2**15, 2**15), float)})
    with pytest.raises(ValueError, match="reduce block"):
        Ensemble.create(path, **huge)


def test_chunks_hold_one_block_of_one_chain(full):
    with h5py.File(full) as file:
        assert file["fields/links"].chunks == (1, 8, 2, 4, 4)
        assert file["history/action"].chunks == (1, 8)
        assert file["fields/links"].id.get_create_plist().get_alloc_time() == h5py.h5d.ALLOC_TIME_EARLY
