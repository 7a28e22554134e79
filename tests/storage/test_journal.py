import io
import shutil

import h5py
import numpy as np
import pytest

from latticeflow.storage import DataError, DiskFullError, Ensemble, LockedError, journal, results


def test_an_overlay_behaves_as_a_file_and_leaves_the_one_below(tmp_path):
    """300 random reads, writes, seeks and truncations, beside the same ones in an `io.BytesIO`."""
    rng = np.random.default_rng(3)
    path, start = tmp_path / "base", rng.bytes(150_000)
    path.write_bytes(start)
    reference = io.BytesIO(start)
    with journal.Overlay(path) as overlay:
        for _ in range(300):
            place, data = int(rng.integers(0, 200_000)), rng.bytes(int(rng.integers(1, 100_000)))
            for file in (overlay, reference):
                file.seek(min(place, len(reference.getbuffer())))
            if rng.random() < 0.3:
                assert overlay.write(data) == reference.write(data)
            else:
                assert overlay.read(len(data)) == reference.read(len(data))
            assert overlay.tell() == reference.tell()
        overlay.seek(0)
        assert overlay.read() == reference.getvalue()
        assert overlay.truncate(70_000) == 70_000
        assert overlay.seek(0, io.SEEK_END) == 70_000
    assert path.read_bytes() == start


def change(ensemble):
    ensemble.write_observable("plaquette", np.arange(40.0).reshape(2, 20))
    ensemble.write_analysis("plaquette", {"mean": 1.5, "n": 20}, {"rho": np.ones(10)})
    ensemble.write_training({"step": [1, 2, 3], "loss": [3.0, 2.0, 1.0]})


def test_every_prefix_of_a_change_is_readable_and_all_or_nothing(full, kit, tmp_path, monkeypatch):
    """Images of the folder: before the journal, and after each page that is copied, the last one cut in half."""
    images = []

    def recorded(path, pages):
        for count in range(len(pages.content) + 1):
            images.append((path.read_bytes(), journal.journal_of(path).read_bytes()))
            with path.open("r+b") as file:
                for number, page in sorted(pages.content.items())[:count]:
                    file.seek(number * len(page))
                    file.write(page[: len(page) // (2 if len(images) % 2 else 1)])
        replay(path, pages)

    replay = journal._replay
    monkeypatch.setattr(journal, "_replay", recorded)
    with Ensemble.open(full, "a") as ensemble:
        change(ensemble)
    monkeypatch.undo()
    copy = tmp_path / "copy.h5"
    for image, pages in images:
        for mode in ("r", "a"):
            copy.write_bytes(image)
            journal.journal_of(copy).write_bytes(pages)
            with Ensemble.open(copy, mode) as ensemble:
                kit.check(ensemble)
                assert ensemble.observable_names == ["plaquette"]
            assert journal.journal_of(copy).exists() == (mode == "r")
    assert len(images) >= 6


def test_without_a_journal_a_death_can_spoil_the_file(full, kit):
    """What the journal is for: the same kind of change by HDF5 alone, its writes recorded, every fourth prefix read."""

    class Recorder(io.BytesIO):
        images = ()

        def write(self, data):
            written = super().write(data)
            self.images += (self.getvalue(),)
            return written

    recorder = Recorder(full.read_bytes())
    with h5py.File(recorder, "r+", libver=journal.LIBVER) as file, Ensemble.open(full) as ensemble:
        results.put_observable(file, ensemble.header, "plaquette", np.ones((2, 20)))
        results.put_analysis(file, "plaquette", {"mean": 1.0}, {"rho": np.ones(10)})
    outcomes = [readable(full, image, kit) for image in recorder.images[::-4]]
    assert outcomes[0], "the change is complete"
    assert outcomes.count(False) > len(outcomes) // 4


def readable(path, image, kit):
    path.write_bytes(image)
    try:
        with Ensemble.open(path) as ensemble:
            kit.check(ensemble)
            ensemble.analysis()
            for name in ensemble.observable_names:
                ensemble.observable(name)
            return True
    except DataError:
        return False


def test_a_failing_change_changes_nothing(full, kit):
    before = full.read_bytes()
    with Ensemble.open(full, "a") as ensemble:
        with pytest.raises(ZeroDivisionError):
            ensemble._parts[0].edit(fails)
        kit.check(ensemble)
        change(ensemble)
        kit.check(ensemble)
    assert before != full.read_bytes()


def fails(file):
    del file["fields"]
    raise ZeroDivisionError


@pytest.mark.parametrize("step", ["reserve", "atomic_write_bytes"])
def test_a_full_disk_leaves_the_file_as_it_was(full, kit, monkeypatch, step):
    def no_room(path, *_, **__):
        raise DiskFullError(path, needed=10, free=1)

    before = full.read_bytes()
    with Ensemble.open(full, "a") as ensemble:
        with monkeypatch.context() as patched:
            patched.setattr(journal, step, no_room)
            with pytest.raises(DiskFullError):
                change(ensemble)
        assert full.read_bytes()[: len(before)] == before
        kit.check(ensemble)
        assert ensemble.observable_names == []
        change(ensemble)
        assert ensemble.observable_names == ["plaquette"]


def test_a_damaged_journal_is_bad_data(full):
    journal.journal_of(full).write_bytes(b"PK\x03\x04 no pages")
    for mode in ("r", "a"):
        with pytest.raises(DataError, match="damaged journal"):
            Ensemble.open(full, mode)


def test_a_copy_that_fails_half_way_stops_the_writing_and_is_finished_by_the_next_one(path, kit, monkeypatch):
    def fails_half_way(path, pages):
        with path.open("r+b") as file:
            file.seek(64)
            file.write(b"half of what was to be written")
        raise OSError(5, "Input/output error")

    with kit.fill(Ensemble.create(path, **kit.settings()), 16) as ensemble:
        with monkeypatch.context() as patched:
            patched.setattr(journal, "_replay", fails_half_way)
            with pytest.raises(OSError, match="Input/output error"):
                ensemble.write_observable("plaquette", np.ones((2, 16)))
        kit.check(ensemble)
        assert ensemble.observable_names == ["plaquette"]
        with pytest.raises(io.UnsupportedOperation, match="not open to append"):
            ensemble.write_analysis("plaquette", {"mean": 1.0})
        with pytest.raises(io.UnsupportedOperation, match="not open to append"):
            ensemble.append(**kit.block(16, 4))
    with Ensemble.open(path, "a") as ensemble:
        kit.check(ensemble)
        assert ensemble.observable_names == ["plaquette"]
        ensemble.write_analysis("plaquette", {"mean": 1.0})


def test_a_second_handle_in_the_process_stops_a_change_but_not_a_block(path, kit):
    with Ensemble.create(path, **kit.settings()) as ensemble:
        with h5py.File(path), Ensemble.open(path):
            kit.fill(ensemble)
            with pytest.raises(LockedError, match="elsewhere in this process"):
                change(ensemble)
        change(ensemble)
        kit.check(ensemble)


def test_a_change_leaves_no_mark_of_an_open_file(full, tmp_path):
    with Ensemble.open(full, "a") as ensemble:
        change(ensemble)
        shutil.copy(full, tmp_path / "copy.h5")
    with h5py.File(tmp_path / "copy.h5", "r+") as file:
        assert file["state/n_committed"][()] == 20
