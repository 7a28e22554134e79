"""One writer per run: a lock that the kernel frees when its holder dies, however it dies."""

import datetime
import errno
import fcntl
import json
import os
import platform
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from latticeflow.storage.atomic import disk_full_named
from latticeflow.storage.errors import LockedError

_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_PATIENCE = 200
_PAUSE = 0.005  # seconds; a look at the holder takes far less


def lock_holder(path: str | os.PathLike[str]) -> str | None:
    """Who holds a lock file, as in "process 12 on host, started ...", or None; to look does not stand in the way."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return None if _locked(descriptor, fcntl.LOCK_SH) else _read_holder(descriptor)
    finally:
        os.close(descriptor)


class RunLock:
    """Hold a run's lock file (`run.lock`) for as long as the `with` block lasts.

    The file names its holder (process, host, start time), and stays after the release: only the kernel's lock counts,
    so nothing has to be cleaned up after a kill. Readers never need it. Raises `LockedError` naming the holder when
    another process, or another lock object of this one, has it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._descriptor: int | None = None

    def acquire(self) -> Self:
        """Take the lock, or raise `LockedError` at once."""
        if self._descriptor is not None:
            raise LockedError(f"{self.path}: this lock is held already")
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._lock(descriptor)
            self._write_holder(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return self

    def release(self) -> None:
        """Free the lock; nothing happens when it is not held."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _lock(self, descriptor: int) -> None:
        """Take the lock; whoever only looks (`lock_holder`) shares it for a moment and is waited for."""
        for _ in range(_PATIENCE):
            if _locked(descriptor, fcntl.LOCK_EX):
                return
            if not _locked(descriptor, fcntl.LOCK_SH):
                break
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            time.sleep(_PAUSE)
        raise LockedError(f"{self.path}: another run is writing here: {_read_holder(descriptor)}")

    def _write_holder(self, descriptor: int) -> None:
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        holder = json.dumps({"pid": os.getpid(), "host": platform.node(), "started": started}).encode("ascii")
        with disk_full_named(self.path, needed=len(holder)):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, holder, 0)


def _locked(descriptor: int, kind: int) -> bool:
    """Try to take the kernel's lock, and say whether it could be had."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _HELD:
            raise
        return False
    return True


def _read_holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {holder['pid']} on {holder['host']}, started {holder['started']}"
    except (ValueError, KeyError, TypeError):  # the holder is about to write its name, or has just cleared it
        return "a process that has not written its name"
