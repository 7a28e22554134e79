"""Every prefix of what is written to an ensemble is readable, and its marker is never ahead of the data.

The operating system's calls that change files are recorded during the life of an ensemble: its creation, blocks of
several columns and chains with a short last one, observables and analyses, a further file and its blocks. A death is
then every prefix of that record, each write also cut at every sector, and any choice of the sectors that were written
since the last fsync. One call of at most 8 bytes reaches the disk whole; the calls on names keep their order.
"""

import importlib
import io
import itertools
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest

from latticeflow.storage import DataError, Ensemble, allocation, survey
from latticeflow.storage.columns import columns_for
from latticeflow.storage.header import Header, write_header
from latticeflow.storage.journal import LIBVER

SECTOR, ATOMIC = 512, 8
CHAINS, DRAWS, BLOCK, FURTHER = 2, 20, 8, 12
SHAPE = (2, 4, 4)
FILES = ("ensemble.h5", "ensemble-2.h5")
HISTORY = {"action": "float64", "accepted": "bool"}
FIELDS = {"links": (SHAPE, "float64"), "phase": ((3,), "complex64")}
ROWS = ("fields/links", "fields/phase", "history/action", "history/accepted", "proposals/log_weight", "checksum/crc32")


def block(first: int, count: int) -> dict[str, dict[str, np.ndarray]]:
    """Rows whose numbers depend on their place alone."""
    chain, draw = np.meshgrid(np.arange(CHAINS), np.arange(first, first + count), indexing="ij")
    action = 1000.0 * chain + draw
    links = np.sin(action[..., None, None, None] + 0.1 * np.arange(32).reshape(SHAPE))
    phase = np.exp(1j * (action[..., None] + np.arange(3))).astype(np.complex64)
    history = {"action": action, "accepted": (chain + draw) % 3 == 0}
    return {"fields": {"links": links, "phase": phase}, "history": history, "proposals": {"log_weight": action / 7}}


def plaquette(version: int, draws: int) -> np.ndarray:
    return np.cos(block(0, draws)["history"]["action"] + version)


@dataclass(frozen=True)
class Event:
    """A call that changed a file: a write, its end, a name, or an fsync; `count` draws had been promised by then."""

    call: str
    name: str
    place: int = 0
    data: bytes = b""
    other: str = ""
    count: int = 0

    def pieces(self) -> list["Event"]:
        """The sectors of a write, which may reach the disk one by one; of a long one, groups of them."""
        if self.call != "write" or len(self.data) <= ATOMIC:
            return [self]
        size = SECTOR if len(self.data) < 32 * SECTOR else 32 * SECTOR
        cuts = [0, *range(size - self.place % size, len(self.data), size), len(self.data)]
        pairs = itertools.pairwise(cuts)
        return [Event("write", self.name, self.place + a, self.data[a:b], count=self.count) for a, b in pairs]


class Images(dict[str, bytearray]):
    """The files of a folder, as they are on the disk."""

    def apply(self, event: Event) -> None:
        if event.call == "write":
            file = self.setdefault(event.name, bytearray())
            file.extend(bytes(max(0, event.place + len(event.data) - len(file))))
            file[event.place : event.place + len(event.data)] = event.data
        elif event.call == "size":
            file = self[event.name]
            file.extend(bytes(max(0, event.place - len(file))))
            del file[event.place :]
        elif event.call == "new":
            self[event.name] = bytearray(event.data)
        elif event.call == "rename":
            self[event.other] = self.pop(event.name)
        elif event.call == "unlink":
            self.pop(event.name, None)

    def copy(self) -> "Images":
        return Images({name: bytearray(data) for name, data in self.items()})

    def store(self, folder: Path) -> Path:
        """Write what a program would see that looks at the ensemble now."""
        for path in folder.iterdir():
            path.unlink()
        for name, data in self.items():
            (folder / name).write_bytes(data)
        return folder / FILES[0]

    def overwrite(self, folder: Path) -> None:
        """The same for a program that has the files open."""
        for name, data in self.items():
            with (folder / name).open("r+b" if (folder / name).exists() else "wb") as file:
                file.write(data)
                file.truncate(len(data))


class Recorder:
    """Notes the calls that change the ensemble's files in a folder; they are done as well."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.events, self.count = folder, [], 0

    def note(self, call: str, path: str | os.PathLike[str], place: int = 0, data: bytes = b"", other: str = "") -> None:
        path = Path(os.path.abspath(path))
        if path.parent == self.folder and path.suffix != ".lock":
            self.events.append(Event(call, path.name, place, data, other, self.count))

    @contextmanager
    def recording(self) -> Iterator["Recorder"]:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("pwrite", "fsync", "posix_fallocate", "link", "replace", "unlink"):
                patch.setattr(os, name, getattr(self, name)(getattr(os, name)))
            patch.setattr(io, "open", self.open(io.open))
            yield self

    def pwrite(self, original: Callable[..., int]) -> Callable[..., int]:
        def call(descriptor: int, data: bytes, offset: int) -> int:
            self.note("write", name_of(descriptor), offset, bytes(data))
            return original(descriptor, data, offset)

        return call

    def fsync(self, original: Callable[..., None]) -> Callable[..., None]:
        def call(descriptor: int) -> None:
            original(descriptor)
            self.note("fsync", name_of(descriptor))

        return call

    def posix_fallocate(self, original: Callable[..., None]) -> Callable[..., None]:
        def call(descriptor: int, offset: int, length: int) -> None:
            original(descriptor, offset, length)
            if not name_of(descriptor).endswith(".h5.partial"):
                self.note("size", name_of(descriptor), offset + length)

        return call

    def link(self, original: Callable[..., None]) -> Callable[..., None]:
        """A new file: HDF5 itself wrote it, under another name."""

        def call(source: Path, target: Path) -> None:
            self.note("new", target, data=Path(source).read_bytes())
            original(source, target)

        return call

    def replace(self, original: Callable[..., None]) -> Callable[..., None]:
        def call(source: Path, target: Path) -> None:
            original(source, target)
            self.note("rename", source, other=Path(target).name)

        return call

    def unlink(self, original: Callable[..., None]) -> Callable[..., None]:
        def call(path: Path, **options: int) -> None:
            original(path, **options)
            self.note("unlink", path)

        return call

    def open(self, original: Callable[..., io.IOBase]) -> Callable[..., io.IOBase]:
        def call(file: object, mode: str = "r", *arguments: object, **options: object) -> io.IOBase:
            if mode not in ("wb", "r+b"):
                return original(file, mode, *arguments, **options)
            noted = NotedFile(file, mode.replace("b", ""))
            noted.recorder = self
            return io.BufferedRandom(noted) if "+" in mode else io.BufferedWriter(noted)

        return call


class NotedFile(io.FileIO):
    """The unbuffered end of a file that Python has opened to write."""

    recorder: Recorder

    def write(self, data: bytes, /) -> int:
        self.recorder.note("write", os.fsdecode(self.name), self.tell(), bytes(data))
        return super().write(data)

    def truncate(self, size: int | None = None, /) -> int:
        self.recorder.note("size", os.fsdecode(self.name), self.tell() if size is None else size)
        return super().truncate(size)


def name_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def fill(ensemble: Ensemble, recorder: Recorder) -> None:
    while (first := ensemble.n_committed) < ensemble.draws:
        recorder.count = ensemble.append(**block(first, ensemble.block_at(first)))


@pytest.fixture(scope="module")
def life(tmp_path_factory) -> list[Event]:
    """The record of a whole life."""
    folder = tmp_path_factory.mktemp("life")
    settings = {"theory": "u1", "lattice_shape": (4, 4), "config": "", "chains": CHAINS, "draws": DRAWS, "block": BLOCK}
    columns = {"fields": FIELDS, "history": HISTORY, "proposals": {"log_weight": 1}}
    with (
        Recorder(folder).recording() as recorder,
        Ensemble.create(folder / FILES[0], **settings, **columns) as ensemble,
    ):
        fill(ensemble, recorder)
        ensemble.write_observable("plaquette", plaquette(1, DRAWS))
        ensemble.write_analysis("plaquette", {"mean": 1.0}, {"rho": np.ones(5)})
        ensemble.write_proposals("whole", np.arange(500.0))
        ensemble.extend(FURTHER)
        fill(ensemble, recorder)
        ensemble.write_observable("plaquette", plaquette(2, DRAWS + FURTHER))
        ensemble.write_analysis("plaquette", {"mean": 2.0}, {"rho": np.ones(7)})
    images = Images()
    for event in recorder.events:
        images.apply(event)
    for name in FILES:
        assert bytes(images[name]) == (folder / name).read_bytes(), "the record is complete"
    return recorder.events


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch) -> None:
    """Whatever a reader waits for is over when it looks again."""
    for module in ("handle", "repair"):
        monkeypatch.setattr(importlib.import_module(f"latticeflow.storage.{module}"), "PAUSE", 0.0)


def check(images: Images, folder: Path, *, least: int) -> int:
    """Look at an image as the package does, and as HDF5 alone does; return the draws that it has."""
    path = images.store(folder)
    if FILES[0] not in images:
        return 0
    with Ensemble.open(path) as ensemble:
        found = ensemble.n_committed
        check_ensemble(ensemble)
    if any(name.endswith(".journal") for name in images):
        with Ensemble.open(path, "a") as ensemble:
            assert ensemble.n_committed == found
            check_ensemble(ensemble)
    assert not list(folder.glob("*.journal"))
    plain = [check_plain(folder / name, index) for index, name in enumerate(FILES) if name in images]
    assert least <= found
    assert sum(plain) in (found, previous(found)), "at most the block whose complement is there"
    return found


def previous(count: int) -> int:
    ends = [0, 8, 16, 20, 28, 32]
    return ends[max(0, ends.index(count) - 1)]


def check_ensemble(ensemble: Ensemble) -> None:
    expected = block(0, ensemble.n_committed)
    for group, read in (("fields", ensemble.field), ("history", ensemble.history), ("proposals", ensemble.proposals)):
        for name, values in expected[group].items():
            np.testing.assert_array_equal(read(name), values)
    assert ensemble.verify() == []
    for name in ensemble.observable_names:
        check_observable(ensemble.observable(name))
    for numbers in ensemble.analysis().values():
        assert (numbers["mean"], len(numbers["rho"])) in ((1.0, 5), (2.0, 7))


def check_observable(values: np.ndarray) -> None:
    """The old one or the new one, in each file."""
    draws = values.shape[1]
    assert draws in (DRAWS, DRAWS + FURTHER)
    versions = [1, 2] if draws == DRAWS else [2]
    assert any(np.array_equal(values, plaquette(version, draws)) for version in versions)


def check_plain(path: Path, index: int) -> int:
    """Read a file by HDF5 alone, and compare its committed rows with what was written and with their crc32."""
    first = index * DRAWS
    with h5py.File(path, "r") as file:
        count = int(file["state/n_committed"][()])
        rows = {name: file[name][:, :count] for name in ROWS}
        for name in file["observables"]:
            _ = file["observables"][name][()]
    expected = block(first, count)
    for name in ROWS[:-1]:
        group, _, key = name.partition("/")
        np.testing.assert_array_equal(rows[name], expected[group][key])
    for chain, draw in np.ndindex(CHAINS, count):
        data = rows["fields/links"][chain, draw].tobytes() + rows["fields/phase"][chain, draw].tobytes()
        assert zlib.crc32(data) == rows["checksum/crc32"][chain, draw]
    return count


def test_every_prefix_of_a_life_is_readable_and_its_marker_never_ahead(life, tmp_path):
    images, seen = Images(), []
    for event in life:
        shown = {*FILES, *(f"{name}.journal" for name in FILES)}
        for piece in event.pieces():
            images.apply(piece)
            if piece.call != "fsync" and shown & {event.name, event.other}:
                seen.append(check(images, tmp_path, least=event.count))
    assert seen == sorted(seen)
    assert set(seen) == {0, 8, 16, 20, 28, 32}
    assert len(seen) > 100


def epochs(events: list[Event]) -> Iterator[tuple[Images, list[Event], int]]:
    """Yield what was on the disk for certain, the pieces of the writes up to the next fsync, and the promised draws."""
    images, pending = Images(), []
    for event in events:
        if event.call == "write":
            pending += event.pieces()
            continue
        if pending and event.call == "fsync" and event.name == pending[0].name:
            yield images.copy(), pending, pending[-1].count
            for piece in pending:
                images.apply(piece)
            pending = []
        elif pending:
            pending.append(event)
        if event.call != "write" and event not in pending:
            images.apply(event)


def test_what_an_fsync_has_not_covered_may_reach_the_disk_in_any_order(life, tmp_path):
    rng, looked = np.random.default_rng(8), 0
    for images, pieces, least in epochs(life):
        if not pieces[0].name.endswith(".h5") or len(pieces[0].data) == ATOMIC:
            continue  # a temporary file, which nobody reads, or the marker, which has a test of its own
        for _ in range(8):
            image, chosen = images.copy(), rng.permutation(len(pieces))[: rng.integers(len(pieces) + 1)]
            for number in chosen:
                image.apply(pieces[number])
            check(image, tmp_path, least=least)
            looked += 1
    assert looked >= 80


def test_a_death_between_complement_and_marker_counts_the_block_in_either_order(life, tmp_path):
    """Both are between the same two fsyncs, so either may be there without the other; the rows are."""
    commits = [(images, pieces, least) for images, pieces, least in epochs(life) if len(pieces[0].data) == ATOMIC]
    assert len(commits) == 5
    for images, pieces, least in commits:
        for piece in pieces:
            image = images.copy()
            image.apply(piece)
            check(image, tmp_path, least=least)


LOOKS = {
    "open": ("latticeflow.storage.handle", "latticeflow.storage.part"),
    "survey": ("latticeflow.storage.repair",) * 2,
}


@pytest.mark.parametrize("moment", ["read_journal", "read_header"])
@pytest.mark.parametrize("look", LOOKS)
def test_a_reader_that_misses_the_journal_by_a_moment_looks_again(life, tmp_path, monkeypatch, look, moment):
    """It finds no journal; then one comes and is being copied; then it opens the file, or goes on to read it."""
    images, calm, looked = Images(), Images(), 0
    module = importlib.import_module(LOOKS[look][moment == "read_header"])
    original = getattr(module, moment)
    for event in life:
        for piece in event.pieces():
            images.apply(piece)
            if not any(name.endswith(".journal") for name in images):
                calm = images.copy() if event.call in ("unlink", "fsync") else calm
            elif piece.call == "write":
                path, late = calm.store(tmp_path), iter([images])

                def read(*arguments: object, late: Iterator[Images] = late, **options: object) -> object:
                    found = original(*arguments, **options) if moment == "read_journal" else None
                    for image in late:
                        image.overwrite(tmp_path)
                    return found if moment == "read_journal" else original(*arguments, **options)

                monkeypatch.setattr(module, moment, read)
                check_look(path, look)
                looked += 1
    assert looked > 10


def check_look(path: Path, look: str) -> None:
    if look == "survey":
        assert survey(path).intact
        return
    with Ensemble.open(path) as ensemble:
        check_ensemble(ensemble)


def test_a_file_has_its_name_when_it_is_complete_and_not_before(tmp_path, monkeypatch):
    """Every call on the way is looked at: nothing has the final name, and the link comes after the fsync."""
    path, calls = tmp_path / "ensemble.h5", []

    def noted(name: str, module: object) -> None:
        original = getattr(module, name)

        def call(*arguments: object, **options: object) -> object:
            calls.append((name, path.exists()))
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    for name in ("write_header", "reserve", "_allocate", "_allocate_column", "publish"):
        noted(name, allocation)
    for name in ("fsync", "link", "posix_fallocate"):
        noted(name, os)
    images = []
    link = os.link
    monkeypatch.setattr(os, "link", lambda a, b: (images.append(Path(a).read_bytes()), link(a, b)))
    header, columns = description()
    allocation.create_file(path, header, columns)
    monkeypatch.undo()
    names = [name for name, _ in calls]
    assert not any(there for _, there in calls[: names.index("link") + 1])
    assert names.index("_allocate") < names.index("fsync") < names.index("publish") < names.index("link")
    assert path.read_bytes() == images[0]
    assert [child.name for child in tmp_path.iterdir()] == ["ensemble.h5"]
    with Ensemble.open(path) as ensemble:
        assert ensemble.n_committed == 0
    assert check_plain(path, 0) == 0


def description() -> tuple[Header, list[object]]:
    header = Header("u1", (4, 4), "", CHAINS, DRAWS, BLOCK).checked()
    return header, list(columns_for(FIELDS, HISTORY, {"log_weight": 1}).values())


class Memory(io.BytesIO):
    """A file in memory that keeps its image after every write of HDF5."""

    images: tuple[bytes, ...] = ()

    def write(self, data: bytes, /) -> int:
        written = super().write(data)
        self.images += (self.getvalue(),)
        return written


def test_no_prefix_of_a_creation_has_draws(tmp_path):
    """It never has the final name, so it need not open; where it opens, it says that nothing is committed."""
    memory, path, outcomes = Memory(), tmp_path / "ensemble.h5", []
    header, columns = description()
    with h5py.File(memory, "w", libver=LIBVER) as file:
        write_header(file, header)
    with h5py.File(memory, "r+", libver=LIBVER) as file:
        allocation._allocate(file, header, columns)
        file.flush()
    for image in memory.images:
        path.write_bytes(image)
        try:
            with Ensemble.open(path) as ensemble:
                outcomes.append(ensemble.n_committed)
        except DataError:
            outcomes.append(None)
        try:
            with h5py.File(path, "r") as file:
                assert not file["state/n_committed"][()]
        except (OSError, KeyError):
            pass
    assert set(outcomes) <= {None, 0}
    assert outcomes[-1] == 0, "the last image is complete"
    assert len(outcomes) > 20
