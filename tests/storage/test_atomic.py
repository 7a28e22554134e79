import os

import pytest

from latticeflow.storage import DiskFullError, atomic, atomic_write_text


def test_text_is_written_and_replaced(tmp_path):
    path = tmp_path / "status.json"
    for text in ('{"step": 1}', "x" * 10_000, "\u03b2 = 2\n", ""):
        atomic_write_text(path, text)
        assert path.read_bytes() == text.encode("utf-8")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [28, 122])
def test_a_full_disk_leaves_the_old_text(tmp_path, monkeypatch, number):
    def no_space(descriptor):
        raise OSError(number, os.strerror(number))

    path = tmp_path / "status.json"
    atomic_write_text(path, "old")
    monkeypatch.setattr(atomic.os, "fsync", no_space)
    with pytest.raises(DiskFullError, match=r"3 bytes are needed for .*status\.json") as caught:
        atomic_write_text(path, "new")
    assert (caught.value.needed, caught.value.errno) == (3, 28)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_other_errors_of_the_system_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError):
        atomic_write_text(tmp_path / "none" / "status.json", "text")


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_publishing_never_takes_a_name_that_is_taken(tmp_path, monkeypatch, links):
    def unsupported(*_):
        raise OSError(95, os.strerror(95))

    if not links:
        monkeypatch.setattr(atomic.os, "link", unsupported)
    target, temporary = tmp_path / "target", tmp_path / "temporary"
    temporary.write_text("first")
    atomic.publish(temporary, target)
    temporary.write_text("second")
    with pytest.raises(FileExistsError, match="not overwritten"):
        atomic.publish(temporary, target)
    assert (target.read_text(), temporary.read_text()) == ("first", "second")
