"""Whether stored bytes are still what was written.

Every chunk carries HDF5's fletcher32, which a read checks; it misses about one flipped bit in 400. Every configuration
therefore has a crc32 as well, over the bytes of its fields in alphabetical order, which `verify` checks.
"""

import errno
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from latticeflow.storage.columns import CHECKSUM, Column
from latticeflow.storage.errors import DataError
from latticeflow.storage.header import Header

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_UNREADABLE = (OSError, RuntimeError)  # what h5py raises for a failing checksum, depending on what it covers
_REFUSALS = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.EISDIR, errno.EMFILE, errno.ENFILE, errno.EROFS)
_REFUSALS += (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EAGAIN)


def checksums(fields: Sequence[np.ndarray]) -> np.ndarray:
    """The crc32 of each configuration, `(chain, draw)`, over fields `(chain, draw, ...)` in alphabetical order."""
    sums = np.zeros(fields[0].shape[:2], dtype=np.uint32)
    for field in fields:
        rows = np.ascontiguousarray(field).view(np.uint8).reshape(*sums.shape, -1)
        for place in np.ndindex(sums.shape):
            sums[place] = zlib.crc32(rows[place], int(sums[place]))
    return sums


@contextmanager
def damage_named(path: Path, what: str) -> Iterator[None]:
    """Turn whatever HDF5 says about unreadable bytes into a `DataError`; a refusal by the system stays what it is."""
    try:
        yield
    except (*_UNREADABLE, LookupError, ValueError, TypeError, AttributeError) as error:
        if _is_refusal(error):
            raise
        raise DataError(f"{path}: {what} cannot be read ({error})") from error


def check_signature(path: Path) -> None:
    """Raise `DataError` when a file does not begin as HDF5 files do."""
    if path.is_dir():
        raise DataError(f"{path} is a folder, expected an HDF5 file")
    with path.open("rb") as file:
        found = file.read(len(_SIGNATURE))
    if found != _SIGNATURE:
        raise DataError(f"{path} begins with {found!r}, expected {_SIGNATURE!r}: it is not an HDF5 file")


def read_rows(
    dataset: h5py.Dataset, chains: slice, draws: slice, column: Column, *, path: Path, first_draw: int = 0
) -> np.ndarray:
    """Rows of a column; raises `DataError` naming the chains and draws of every chunk that is damaged.

    The draws it names count from `first_draw`.
    """
    rows = column.rows(draws.start, draws.stop)
    try:
        return dataset[chains, rows]
    except _UNREADABLE as error:
        if _is_refusal(error):
            raise
        chosen = range(*chains.indices(dataset.shape[0]))
        damaged = [(chain, draw + first_draw) for chain, draw in _damaged_draws(dataset, chosen, rows, column)]
        raise DataError(f"{path}: {column.path} is damaged at {places(damaged)} ({error})") from error


def verify(file: h5py.File, header: Header, columns: Mapping[str, Column], n_committed: int) -> list[tuple[int, int]]:
    """The `(chain, draw)` of every committed configuration whose fields, history or checksum are damaged."""
    datasets, damaged = {path: file[path] for path in columns}, []
    for chain in range(header.chains):
        for first in range(0, n_committed, header.block):
            stop = min(first + header.block, n_committed)
            damaged += [(chain, first + int(row)) for row in _damaged_rows(datasets, columns, chain, first, stop)]
    return damaged


def places(damaged: Sequence[tuple[int, int]]) -> str:
    """Say where damaged configurations `(chain, draw)` are, in runs: "chain 1 draws 16 to 19, chain 3 draw 5"."""
    runs: list[list[int]] = []
    for chain, draw in sorted(damaged):
        if runs and (runs[-1][0], runs[-1][2] + 1) == (chain, draw):
            runs[-1][2] = draw
        else:
            runs.append([chain, draw, draw])
    return ", ".join(_run(*run) for run in runs) or "an unknown place"


def _run(chain: int, first: int, last: int) -> str:
    return f"chain {chain} draw {first}" if first == last else f"chain {chain} draws {first} to {last}"


def _damaged_rows(
    datasets: Mapping[str, h5py.Dataset], columns: Mapping[str, Column], chain: int, first: int, stop: int
) -> np.ndarray:
    try:
        rows = {path: datasets[path][chain, column.rows(first, stop)] for path, column in columns.items()}
    except _UNREADABLE as error:
        if _is_refusal(error):
            raise
        return np.arange(stop - first)
    fields = [rows[path][None] for path in sorted(rows) if path.startswith("fields/")]
    return np.flatnonzero(checksums(fields)[0] != rows[CHECKSUM])


def _damaged_draws(dataset: h5py.Dataset, chains: range, rows: slice, column: Column) -> Iterator[tuple[int, int]]:
    length = dataset.chunks[1]
    for chain in chains:
        for first in range(rows.start - rows.start % length, rows.stop, length):
            stop = min(first + length, dataset.shape[1])
            try:
                dataset[chain, first:stop]
            except _UNREADABLE:
                draws = range(first // column.rows_per_draw, stop // column.rows_per_draw)
                yield from ((chain, draw) for draw in draws)


def _is_refusal(error: Exception) -> bool:
    """Whether the system refused, which says nothing about the bytes."""
    return isinstance(error, OSError) and error.errno in _REFUSALS
