"""Files that appear whole or not at all.

New bytes go to a temporary file beside their target, reach the disk, and take the target's name in one step. A process
that dies on the way leaves the old file as it was, and at most a `*.partial` file that the next attempt overwrites.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from latticeflow.storage.errors import DiskFullError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NOT_OFFERED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)  # by file systems that cannot reserve


def partial_name(path: Path) -> Path:
    """The temporary file beside a target."""
    return path.with_name(path.name + ".partial")


def fsync_folder(folder: Path) -> None:
    """Bring new, renamed and removed names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write or replace a UTF-8 text file; a reader sees the old text or the new one, never a mixture.

    Raises `DiskFullError` when there is no room; the old file is then untouched.
    """
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write or replace a file; a reader sees the old bytes or the new ones, never a mixture.

    Raises `DiskFullError` when there is no room; the old file is then untouched.
    """
    path = Path(path)
    temporary = partial_name(path)
    with disk_full_named(path, needed=len(data)), removed_on_failure(temporary):
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Append a line to a text file; where a full disk or a death cuts it short, it is the last one.

    Raises `DiskFullError` when there is no room.
    """
    path, data = Path(path), f"{line}\n".encode()
    with disk_full_named(path, needed=len(data)), path.open("ab") as file:
        file.write(data)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished temporary file its name, never one that is taken.

    Raises `FileExistsError` when another file has the name.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, "exists already and is not overwritten", str(path)) from None
    except OSError:  # a file system without hard links
        refuse_existing(path)
        temporary.rename(path)
    else:
        temporary.unlink()
    fsync_folder(path.parent)


def refuse_existing(path: Path) -> None:
    """Raise `FileExistsError` when there is a file of this name."""
    if path.exists():
        raise FileExistsError(errno.EEXIST, "exists already and is not overwritten", str(path))


def require_free(path: Path, *, needed: int) -> None:
    """Raise `DiskFullError` unless `needed` bytes are free where `path` is to be."""
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise DiskFullError(path, needed=needed, free=free)


def reserve(path: Path, *, size: int) -> None:
    """Make a file so long that writing within it needs no further space.

    Raises `DiskFullError` with the file as it was.
    """
    old = path.stat().st_size
    if size <= old:
        return
    with path.open("r+b") as file, disk_full_named(path, needed=size - old):
        try:
            os.posix_fallocate(file.fileno(), old, size - old)
        except OSError as error:
            file.truncate(old)
            if error.errno not in _NOT_OFFERED:
                raise


@contextmanager
def disk_full_named(path: Path, *, needed: int) -> Iterator[None]:
    """Turn the operating system's "no space" and "quota exceeded" into a `DiskFullError` with numbers."""
    try:
        yield
    except DiskFullError:
        raise
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise DiskFullError(path, needed=needed, free=shutil.disk_usage(path.parent).free) from error


@contextmanager
def removed_on_failure(temporary: Path) -> Iterator[None]:
    """Remove a temporary file when the work on it fails."""
    try:
        yield
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
