"""What is left of a damaged ensemble, and how it is cut after its last good block."""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import h5py

from latticeflow.storage import integrity
from latticeflow.storage.allocation import create_file
from latticeflow.storage.atomic import fsync_folder, reserve
from latticeflow.storage.columns import columns_of
from latticeflow.storage.commit import BlockWriter, marker_places, write_marker
from latticeflow.storage.errors import DataError
from latticeflow.storage.handle import PATIENCE, PAUSE
from latticeflow.storage.header import Header, read_header, read_marker
from latticeflow.storage.journal import Overlay, Pages, journal_of, lock_of, read_journal, recover, stamp
from latticeflow.storage.lock import RunLock
from latticeflow.storage.part import Columns, check_follows, files_of

_END_OF_FILE = slice(28, 36)  # where version 2 and 3 of HDF5's superblock keep the address of the file's end


@dataclass(frozen=True)
class Survey:
    """What was found of an ensemble.

    `claimed` counts the draws per chain that it says it has, those that look sound where that cannot be told; `sound`
    those before the first block with a damaged one; `damaged` is their `(chain, draw)`; `problems` says what is wrong
    with the files as such.
    """

    claimed: int
    sound: int
    damaged: list[tuple[int, int]]
    problems: list[str]

    @property
    def places(self) -> str:
        """Where the damaged configurations are, as in "chain 1 draws 16 to 19"."""
        return integrity.places(self.damaged)

    @property
    def intact(self) -> bool:
        return not self.damaged and not self.problems


def survey(path: str | os.PathLike[str]) -> Survey:
    """Check every committed configuration and every result of an ensemble, of a truncated file what is left.

    A file that a run changes meanwhile is looked at again before it is said to be damaged. Raises `FileNotFoundError`,
    and `DataError` for a file that cannot be read at all or continues another one.
    """
    end = time.monotonic() + PATIENCE
    while True:
        before = _stamps(Path(path))
        try:
            found = _survey(Path(path))
            if found.intact or before == _stamps(Path(path)) or time.monotonic() > end:
                return found
        except DataError:
            if before == _stamps(Path(path)) or time.monotonic() > end:
                raise
        time.sleep(PAUSE)


def repair(path: str | os.PathLike[str]) -> Survey:
    """Cut an ensemble after its last good block, and return what was found before.

    The draws from the first damaged block on, in all chains and files, no longer exist. A file whose results cannot be
    read is written anew without them. Raises what `survey` does, `LockedError` when a run is writing, and
    `DiskFullError` when bytes that were cut off cannot be given back.
    """
    files = files_of(Path(path))
    with ExitStack() as locks:
        for file in files:
            locks.enter_context(RunLock(lock_of(file)))
        undone = [file for file in files if not _journal_done(file)]
        found = survey(path)
        for file in files:
            if file in undone or _damage_of_results(file) is not None:
                _write_anew(file, found.sound)
            elif not found.intact:
                _cut(file, found.sound)
    problems = [f"{file}: the journal of an interrupted change was damaged" for file in undone] + found.problems
    return replace(found, problems=problems)


def _stamps(path: Path) -> list[tuple[int, ...]]:
    return [(*stamp(file), file.stat().st_mtime_ns) for file in files_of(path)]


def _survey(path: Path) -> Survey:
    found, before = Survey(0, 0, [], []), []
    for file in files_of(path):
        header, columns, part = _survey_file(file)
        check_follows(file, header, columns, before)
        before.append((header, columns))
        found = _joined(found, header, part)
    return found


def _survey_file(path: Path) -> tuple[Header, Columns, Survey]:
    """What was found of one file, its draws counted from its own first one."""
    integrity.check_signature(path)
    missing = _missing_bytes(path)
    problems = [f"{path}: truncated, the last {missing} bytes are missing"] if missing else []
    with _opened(path) as file, integrity.damage_named(path, "the file"):
        header = read_header(file, path=path)
        columns = columns_of(file, header, path=path)
        try:
            claimed = read_marker(file, header, path=path)
            damaged = integrity.verify(file, header, columns, claimed)
            sound = _sound(damaged, header, claimed)
        except DataError as error:
            problems.append(str(error))
            claimed = sound = _sound(integrity.verify(file, header, columns, header.draws), header, header.draws)
            damaged = []
    problems += [damage] if (damage := _damage_of_results(path)) is not None else []
    return header, columns, Survey(claimed, sound, damaged, problems)


def _damage_of_results(path: Path) -> str | None:
    """What is wrong with all that is not rows of the chains, or None."""
    with _opened(path) as file:
        columns = columns_of(file, read_header(file, path=path), path=path)

        def read(name: str, item: h5py.Group | h5py.Dataset) -> None:
            dict(item.attrs)
            if isinstance(item, h5py.Dataset) and not item.is_scale and name not in columns:
                item[...]

        try:
            with integrity.damage_named(path, "the results"):
                file.visititems(read)
        except DataError as error:
            return str(error)
    return None


def _sound(damaged: list[tuple[int, int]], header: Header, claimed: int) -> int:
    """The draws before the first block that has a damaged one."""
    first = min((draw for _, draw in damaged), default=claimed)
    return claimed if first == claimed else first - first % header.block


def _joined(before: Survey, header: Header, found: Survey) -> Survey:
    """Two surveys as one; a file's draws exist once the files before it are full."""
    if before.claimed < header.first_draw:
        return replace(before, problems=before.problems + found.problems)
    unbroken = before.sound == header.first_draw
    return Survey(
        claimed=before.claimed + found.claimed,
        sound=before.sound + (found.sound if unbroken else 0),
        damaged=before.damaged + [(chain, draw + header.first_draw) for chain, draw in found.damaged],
        problems=before.problems + found.problems,
    )


def _journal_done(path: Path) -> bool:
    """Complete the change in a file's journal; a damaged journal is removed, and False returned."""
    try:
        recover(path)
    except DataError:
        journal_of(path).unlink()
        return False
    return True


def _cut(path: Path, sound: int) -> None:
    """Let a file have the draws before `sound`, counted along the chains, and its full length."""
    reserve(path, size=path.stat().st_size + _missing_bytes(path))
    with h5py.File(path, "r") as file, integrity.damage_named(path, "the marker"):
        header, places = read_header(file, path=path), marker_places(file)
    with _descriptor(path) as descriptor:
        write_marker(descriptor, places, _own(header, sound))


def _write_anew(path: Path, sound: int) -> None:
    """Put a file in place of one that has the draws before `sound`, counted along the chains, and no results."""
    fresh = path.with_name(path.name + ".repaired")
    fresh.unlink(missing_ok=True)
    with _opened(path) as file:
        header = read_header(file, path=path)
        columns = columns_of(file, header, path=path)
        create_file(fresh, header, columns.values())
        with h5py.File(fresh, "r") as empty, _descriptor(fresh) as descriptor:
            writer = BlockWriter(empty, columns, block=header.block, path=fresh)
            for first in range(0, _own(header, sound), header.block):
                draws = slice(first, min(first + header.block, header.draws))
                rows = {
                    name: integrity.read_rows(file[name], slice(None), draws, column, path=path)
                    for name, column in columns.items()
                }
                writer.commit(descriptor, rows, draws.stop)
    fresh.replace(path)
    fsync_folder(path.parent)


def _own(header: Header, sound: int) -> int:
    """How many of the draws before `sound` are a file's own."""
    return min(max(sound - header.first_draw, 0), header.draws)


@contextmanager
def _descriptor(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """Open a file as it will be once its journal is copied, zeros in place of bytes that are cut off at its end."""
    pages = read_journal(path) or Pages(path.stat().st_size + _missing_bytes(path), {})
    with Overlay(path, pages=pages) as overlay, ExitStack() as stack:
        with integrity.damage_named(path, "the file"):
            file = stack.enter_context(h5py.File(overlay, "r"))
        yield file


def _missing_bytes(path: Path) -> int:
    """How much shorter a file is than HDF5 says."""
    with path.open("rb") as file:
        stored = file.read(_END_OF_FILE.stop)[_END_OF_FILE]
    return max(0, int.from_bytes(stored, "little") - path.stat().st_size)
