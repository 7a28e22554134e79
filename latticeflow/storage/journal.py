"""Changes to the structure of an HDF5 file that happen whole or not at all.

Blocks of a chain go into space that was allocated at creation, so writing them never touches HDF5's own structures.
Adding a group or a dataset later does: HDF5 spreads it over many writes, and a process that dies between two of them
leaves a file that no program can read. Such a change is therefore made in memory (`Overlay`), saved beside the file as
a journal of the changed pages, and only then copied into the file. Whoever opens the file for writing next finishes
what a dead process began; a reader lays the journal over the file in memory. HDF5
itself never opens the file for writing: that leaves a mark in it which, after a death, keeps every program out.
"""

import io
import os
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from latticeflow.storage.atomic import atomic_write_bytes, disk_full_named, fsync_folder, reserve
from latticeflow.storage.errors import DataError

LIBVER = ("v110", "v110")  # readable since 2016, and every structure of its files carries a checksum
_PAGE = 1 << 16


@dataclass(frozen=True)
class Pages:
    """What a change makes of a file: its new size and its changed pages by number, each of 65536 bytes."""

    size: int
    content: dict[int, bytes | bytearray]


class Overlay(io.RawIOBase):
    """A file whose changes stay in memory: it reads them back, the file underneath keeps its bytes."""

    def __init__(self, path: Path, *, pages: Pages | None = None) -> None:
        self._base = path.open("rb")
        self._base_size = path.stat().st_size
        self._size = pages.size if pages else self._base_size
        self._content = {number: bytearray(page) for number, page in pages.content.items()} if pages else {}
        self._position = 0

    @property
    def pages(self) -> Pages:
        return Pages(self._size, self._content)

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: bytearray | memoryview, /) -> int:
        target = memoryview(buffer).cast("B")
        count = min(len(target), max(0, self._size - self._position))
        for number, inside, done in _pieces(self._position, count):
            length = inside.stop - inside.start
            target[done : done + length] = self._page(number)[inside]
        self._position += count
        return count

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        source = memoryview(data).cast("B")
        for number, inside, done in _pieces(self._position, len(source)):
            page = self._content.setdefault(number, bytearray(self._page(number)))
            page[inside] = source[done : done + inside.stop - inside.start]
        self._position += len(source)
        self._size = max(self._size, self._position)
        return len(source)

    def truncate(self, size: int | None = None, /) -> int:
        self._size = self._position if size is None else size
        return self._size

    def close(self) -> None:
        self._base.close()
        super().close()

    def _page(self, number: int) -> bytes | bytearray:
        if number in self._content:
            return self._content[number]
        start = number * _PAGE
        found = os.pread(self._base.fileno(), max(0, min(_PAGE, self._base_size - start)), start)
        return found.ljust(_PAGE, b"\0")


def _pieces(start: int, count: int) -> Iterator[tuple[int, slice, int]]:
    """Cut a range of bytes at page ends: the page, the slice within it, and the bytes that came before."""
    done = 0
    while done < count:
        number, first = divmod(start + done, _PAGE)
        length = min(_PAGE - first, count - done)
        yield number, slice(first, first + length), done
        done += length


@contextmanager
def edited(path: Path) -> Iterator[h5py.File]:
    """Open a file for a change of its structure, which takes effect when the block ends, and not when it raises.

    No other handle of this process may have the file open. Raises `DiskFullError` with the file unchanged.
    """
    with Overlay(path) as overlay:
        with h5py.File(overlay, "r+", libver=LIBVER) as file:
            yield file
        _commit(path, overlay.pages)


def journal_of(path: Path) -> Path:
    """The journal beside a file; it exists only while a change is being copied, or after a death during that."""
    return path.with_name(path.name + ".journal")


def recover(path: Path) -> bool:
    """Finish the change that a dead process left in a journal, and say whether there was one.

    Raises `DataError` when the journal is damaged.
    """
    pages = read_journal(path)
    if pages is None:
        return False
    _replay(path, pages)
    return True


def lock_of(path: Path) -> Path:
    """The lock beside a file; its time of change is that of the last change of the file's structure."""
    return path.with_name(path.name + ".lock")


def stamp(path: Path) -> tuple[int, ...]:
    """What the system notes of a change of a file's structure, and only of that: another stamp, another structure."""
    noted = []
    for file in (lock_of(path), journal_of(path)):
        with suppress(FileNotFoundError):
            found = file.stat()
            noted += [found.st_ino, found.st_mtime_ns]
    return tuple(noted)


def read_journal(path: Path) -> Pages | None:
    """The pages in a file's journal, if it has one; raises `DataError` when it is damaged."""
    try:
        with journal_of(path).open("rb") as file, np.load(file, allow_pickle=False) as saved:
            numbers, content = saved["numbers"].tolist(), saved["content"]
            return Pages(int(saved["size"]), {n: page.tobytes() for n, page in zip(numbers, content, strict=True)})
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{journal_of(path)}: damaged journal of an interrupted change ({error})") from error


def _commit(path: Path, pages: Pages) -> None:
    reserve(path, size=pages.size)  # once there is a journal, copying it must not run out of space
    atomic_write_bytes(journal_of(path), _packed(pages))
    _replay(path, pages)


def _packed(pages: Pages) -> bytes:
    numbers = sorted(pages.content)
    content = np.frombuffer(b"".join(pages.content[number] for number in numbers), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, size=pages.size, numbers=np.array(numbers, dtype=np.int64), content=content.reshape(-1, _PAGE))
    return buffer.getvalue()


def _replay(path: Path, pages: Pages) -> None:
    needed = _PAGE * len(pages.content)  # by file systems that copy on writing
    with disk_full_named(path, needed=needed), path.open("r+b") as file:
        for number, page in sorted(pages.content.items()):
            start = number * _PAGE
            file.seek(start)
            file.write(page[: max(0, pages.size - start)])
        file.truncate(pages.size)
        file.flush()
        os.fsync(file.fileno())
    with suppress(FileNotFoundError):  # noted by the system, two changes within 4 ms may have one time
        os.utime(lock_of(path), ns=(now := time.time_ns(), now))
    journal_of(path).unlink()
    fsync_folder(path.parent)
