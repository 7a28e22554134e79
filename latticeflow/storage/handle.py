"""An open ensemble file: HDF5 reads it, a descriptor writes blocks to it, the journal changes its structure."""

import io
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import h5py

from latticeflow.storage.errors import LockedError
from latticeflow.storage.integrity import check_signature, damage_named
from latticeflow.storage.journal import Overlay, edited, read_journal, recover


class Handle:
    """A file that is open to read ("r") or to append ("a").

    HDF5 only ever reads here, so its own file locks keep nobody from reading while a run writes. Raises
    `FileNotFoundError`, and `DataError` for a file that HDF5 cannot open.
    """

    def __init__(self, path: Path, mode: str) -> None:
        if mode not in ("r", "a"):
            raise ValueError(f"mode is {mode!r}, expected 'r' to read or 'a' to append")
        self.path = path
        self._reading = ExitStack()
        self._writing = ExitStack()
        self._descriptor: int | None = None
        try:
            if mode == "a":
                self._open_to_append()
            self.file = self._open_to_read()
        except BaseException:
            self.close()
            raise

    @property
    def descriptor(self) -> int:
        """Where blocks are written; raises `io.UnsupportedOperation` when the file was opened to read."""
        if self._descriptor is None:
            raise io.UnsupportedOperation(f"{self.path} is open to read; open it with mode 'a' to write")
        return self._descriptor

    def edit(self, change: Callable[..., None], *arguments: object) -> None:
        """Run `change(file, *arguments)` whole or not at all.

        Raises `io.UnsupportedOperation` when the file was opened to read, `LockedError` when something else in this
        process has it open.
        """
        _ = self.descriptor
        _refuse_shared(self.path)
        self._reading.close()
        try:
            with edited(self.path) as file:
                change(file, *arguments)
        finally:
            self.look_again()

    def look_again(self) -> None:
        """Forget what was read of the file, which another process may have changed since."""
        self._reading.close()
        self.file = self._open_to_read()

    def close(self) -> None:
        self._reading.close()
        self._writing.close()
        self._descriptor = None

    def _open_to_append(self) -> None:
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        self._writing.callback(os.close, self._descriptor)
        recover(self.path)

    def _open_to_read(self) -> h5py.File:
        check_signature(self.path)
        with damage_named(self.path, "the file"):
            pages = read_journal(self.path)
            if pages is None:
                return self._reading.enter_context(h5py.File(self.path, "r"))
            overlay = self._reading.enter_context(Overlay(self.path, pages=pages))
            return self._reading.enter_context(h5py.File(overlay, "r"))


def _refuse_shared(path: Path) -> None:
    """Raise `LockedError` when this process has a second handle on a file.

    HDF5 serves all handles from one memory of the file, and a change behind its back makes that stale.
    """
    opened = (os.fsdecode(h5py.h5f.get_name(file)) for file in h5py.h5f.get_obj_ids(types=h5py.h5f.OBJ_FILE))
    if sum(os.path.realpath(name) == os.path.realpath(path) for name in opened) > 1:
        raise LockedError(f"{path} is open elsewhere in this process; close it there before changing its structure")
