"""An open ensemble file: HDF5 reads it, a descriptor writes blocks to it, the journal changes its structure."""

import io
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import h5py

from latticeflow.storage.errors import DataError, LockedError
from latticeflow.storage.integrity import check_signature, damage_named
from latticeflow.storage.journal import Overlay, edited, journal_of, lock_of, read_journal, recover, stamp
from latticeflow.storage.lock import RunLock

Result = TypeVar("Result")
PATIENCE = 10.0  # seconds; a change takes a few milliseconds
PAUSE = 0.001


class Handle:
    """A file that is open to read ("r") or to append ("a").

    HDF5 only ever reads here, so its own file locks keep nobody from reading while a run writes; a `RunLock` on
    `<file>.lock` keeps a second process from writing. Raises `FileNotFoundError`, `DataError` for a file that HDF5
    cannot open, and `LockedError`.
    """

    def __init__(self, path: Path, mode: str) -> None:
        if mode not in ("r", "a"):
            raise ValueError(f"mode is {mode!r}, expected 'r' to read or 'a' to append")
        self.path = path
        self._reading = ExitStack()
        self._writing = ExitStack()
        self._descriptor: int | None = None
        self._file: h5py.File | None = None
        try:
            check_signature(path)
            if mode == "a":
                self._open_to_append()
            self.look_again()
        except BaseException:
            self.close()
            raise

    @property
    def file(self) -> h5py.File:
        """The file to read; raises `ValueError` when it was closed."""
        if self._file is None:
            raise ValueError(f"{self.path} was closed")
        return self._file

    @property
    def descriptor(self) -> int:
        """Where blocks are written; raises `io.UnsupportedOperation` when the file is not open to append."""
        if self._descriptor is None:
            raise io.UnsupportedOperation(f"{self.path} is not open to append; open it with mode 'a'")
        return self._descriptor

    @property
    def outdated(self) -> bool:
        """Whether anything was written to the file since HDF5 began to read it."""
        return self._restructured or self._written != self.path.stat().st_mtime_ns

    @property
    def _restructured(self) -> bool:
        """Whether more was written than further blocks, which do not touch what is there."""
        return self._seen != stamp(self.path)

    def look_again(self) -> None:
        """Forget what was read of the file, which may have changed since."""
        start = time.monotonic()
        while True:
            self._reading.close()
            self._seen, self._written = stamp(self.path), self.path.stat().st_mtime_ns
            try:
                return self._open_to_read()
            except DataError:
                if not self.outdated or time.monotonic() > start + PATIENCE:
                    raise
            time.sleep(PAUSE)

    def read(self, what: str, function: Callable[[h5py.File], Result]) -> Result:
        """Read what a run may be changing, again and again until the structure stayed as it was; raises `DataError`."""
        start = time.monotonic()
        problem = DataError(
            f"{self.path}: {what} changed all the time for {PATIENCE:g} s; read it when the run is done"
        )
        while time.monotonic() < start + PATIENCE:
            file = self.file  # closed is not damaged
            try:
                with damage_named(self.path, what):
                    found = function(file)
                if not self._restructured:
                    return found
            except DataError as error:
                if not self.outdated:
                    raise
                problem = error
            time.sleep(PAUSE)
            self.look_again()
        raise problem

    def edit(self, change: Callable[..., None], *arguments: object) -> None:
        """Run `change(file, *arguments)` whole or not at all.

        Raises `io.UnsupportedOperation` when the file is not open to append, `LockedError` when something else in this
        process has it open.
        """
        _ = self.descriptor
        _refuse_shared(self.path)
        self._reading.close()
        try:
            with edited(self.path) as file, damage_named(self.path, "what is there"):
                change(file, *arguments)
        finally:
            if journal_of(self.path).exists():  # copying failed half-way: the next one to open the file will finish it
                self._stop_writing()
            self.look_again()

    def close(self) -> None:
        self._reading.close()
        self._file = None
        self._stop_writing()

    def _open_to_read(self) -> None:
        with damage_named(self.path, "the file"):
            pages = read_journal(self.path)
            source = self.path if pages is None else self._reading.enter_context(Overlay(self.path, pages=pages))
            self._file = self._reading.enter_context(h5py.File(source, "r"))

    def _open_to_append(self) -> None:
        self._writing.enter_context(RunLock(lock_of(self.path)))
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        self._writing.callback(os.close, self._descriptor)
        recover(self.path)

    def _stop_writing(self) -> None:
        self._descriptor = None
        self._writing.close()


def _refuse_shared(path: Path) -> None:
    """Raise `LockedError` when this process has a second handle on a file.

    HDF5 serves all handles from one memory of the file, and a change behind its back makes that stale.
    """
    opened = (os.fsdecode(h5py.h5f.get_name(file)) for file in h5py.h5f.get_obj_ids(types=h5py.h5f.OBJ_FILE))
    if sum(os.path.realpath(name) == os.path.realpath(path) for name in opened) > 1:
        raise LockedError(f"{path} is open elsewhere in this process; close it there before changing its structure")
