"""What can go wrong with stored data, each error with the exit code that the command line returns for it."""

import errno
from pathlib import Path


class StorageError(Exception):
    """Anything that storage refuses or cannot do."""

    exit_code = 74


class DataError(StorageError):
    """Bad data: damaged, truncated, of another format, or not what was expected."""

    exit_code = 65


class LockedError(StorageError):
    """Another process is writing to this run."""

    exit_code = 75


class DiskFullError(StorageError, OSError):
    """There is no room; `needed` and `free` are in bytes."""

    exit_code = 74

    def __init__(self, path: Path, *, needed: int, free: int) -> None:
        message = f"disk full: {needed} bytes are needed for {path}, {free} bytes are free in {path.parent}"
        super().__init__(errno.ENOSPC, message)
        self.needed = needed
        self.free = free

    def __str__(self) -> str:
        return self.strerror
