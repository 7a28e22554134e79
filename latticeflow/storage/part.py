"""One file of an ensemble, open: the draws that it has, and how they are read, written and judged."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import h5py
import numpy as np

from latticeflow.storage import integrity
from latticeflow.storage.atomic import disk_full_named
from latticeflow.storage.columns import CHECKSUM, Column, columns_of
from latticeflow.storage.commit import BlockWriter, marker_places, write_marker
from latticeflow.storage.errors import DataError
from latticeflow.storage.handle import Handle, Result
from latticeflow.storage.header import COMPLEMENT, MARKER, Header, check_equal, read_header, read_marker

Columns = Mapping[str, Column]


class Part:
    """A file that is open to read ("r") or to append ("a"); draws count from its own first one.

    Raises what `Ensemble.open` does.
    """

    def __init__(self, path: Path, mode: str) -> None:
        self.path = path
        self._handle = Handle(path, mode)
        try:
            self._handle.read("the file", self._look)
            if mode == "a":
                self._complete_marker()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._handle.close()

    @property
    def complete(self) -> bool:
        return self.n_committed == self.header.draws

    def check_follows(self, before: Sequence[Self]) -> None:
        """Raise `DataError`, naming both values, unless this file continues those before it."""
        check_follows(self.path, self.header, self.columns, [(part.header, part.columns) for part in before])

    def runs(self, draws: np.ndarray) -> Iterator[slice]:
        """The contiguous runs, counted from this file's first draw, of those draws of the chains that it has."""
        own = draws - self.header.first_draw
        own = own[(own >= 0) & (own < self.header.draws)]
        for run in np.split(own, np.flatnonzero(np.diff(own) != 1) + 1):
            if run.size:
                yield slice(int(run[0]), int(run[-1]) + 1)

    @property
    def descriptor(self) -> int:
        return self._handle.descriptor

    def read(self, column: str, draws: slice, chains: slice) -> np.ndarray:
        """Rows `(chain, row, ...)` of a column; raises `DataError` naming the chains and draws that are damaged."""
        first = self.header.first_draw
        dataset = self._handle.file[column]
        return integrity.read_rows(dataset, chains, draws, self.columns[column], path=self.path, first_draw=first)

    def read_field(self, column: str, draws: slice, chains: slice) -> np.ndarray:
        """Rows of a field, after their crc32; raises as `read` does."""
        fields = {name: self.read(name, draws, chains) for name in self.columns if name.startswith("fields/")}
        found = integrity.checksums([fields[name] for name in sorted(fields)])
        wrong = np.argwhere(found != self.read(CHECKSUM, draws, chains))
        if len(wrong):
            origin = (chains.start or 0, draws.start + self.header.first_draw)
            places = integrity.places([(int(chain) + origin[0], int(draw) + origin[1]) for chain, draw in wrong])
            raise DataError(f"{self.path}: fields are damaged at {places} (crc32)")
        return fields[column]

    def share(self, values: np.ndarray) -> np.ndarray:
        """Those of the values `(chain, draw, ...)` that are of this file's draws."""
        return values[:, self.header.first_draw : self.header.first_draw + self.header.draws]

    def write(self, rows: Mapping[str, np.ndarray], stop: int) -> None:
        """Commit the block that ends at draw `stop`, `rows` `(chain, row, ...)` by their column."""
        with disk_full_named(self.path, needed=sum(values.nbytes for values in rows.values())):
            self._writer.commit(self._handle.descriptor, rows, stop)
        self.n_committed = stop

    def damaged(self) -> list[tuple[int, int]]:
        """The `(chain, draw)` of every committed configuration whose bytes are not what was written."""
        return integrity.verify(self._handle.file, self.header, self.columns, self.n_committed)

    def edit(self, change: Callable[..., None], *arguments: object) -> None:
        """Change the file's structure, whole or not at all (`Handle.edit`)."""
        self._handle.edit(change, *arguments)

    def result(self, what: str, read: Callable[[h5py.File], Result]) -> Result:
        """Read what is not part of the chain (`Handle.read`)."""
        return self._handle.read(what, read)

    def _look(self, file: h5py.File) -> None:
        self.header = read_header(file, path=self.path)
        self.columns = columns_of(file, self.header, path=self.path)
        self.n_committed = read_marker(file, self.header, path=self.path)

    def _complete_marker(self) -> None:
        """Write what a process left undone of the marker and its complement."""
        stored = {int(self._handle.file[MARKER][()]), ~int(self._handle.file[COMPLEMENT][()])}
        if stored != {self.n_committed}:
            write_marker(self.descriptor, marker_places(self._handle.file), self.n_committed)

    @cached_property
    def _writer(self) -> BlockWriter:
        return BlockWriter(self._handle.file, self.columns, block=self.header.block, path=self.path)


def check_follows(path: Path, header: Header, columns: Columns, before: Sequence[tuple[Header, Columns]]) -> None:
    """Raise `DataError`, naming both values, unless a file continues those before it."""
    expected: dict[str, object] = {"first_draw": sum(earlier.draws for earlier, _ in before)}
    if before:
        first, first_columns = before[0]
        expected |= {name: getattr(first, name) for name in ("theory", "lattice_shape", "chains")}
        expected |= {"continues": first.config_sha256}
        check_equal(path, "columns", sorted(map(repr, columns.values())), sorted(map(repr, first_columns.values())))
    for name, value in expected.items():
        check_equal(path, name, getattr(header, name), value)


def further_file(path: Path, number: int) -> Path:
    """The name of an ensemble's second, third, ... file."""
    return path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")


def files_of(path: Path) -> list[Path]:
    """The first file of an ensemble, there or not, and the further ones; raises `DataError` where one is missing."""
    pattern = re.compile(rf"{re.escape(path.stem)}-([1-9]\d*){re.escape(path.suffix)}")
    found = [pattern.fullmatch(file.name) for file in (path.parent.iterdir() if path.parent.is_dir() else ())]
    numbers = sorted(int(match[1]) for match in found if match)
    missing = [number for number in range(2, max(numbers, default=1)) if number not in numbers]
    if missing:
        raise DataError(f"{further_file(path, missing[0])} is missing, {further_file(path, numbers[-1]).name} is there")
    return [further_file(path, number) for number in (1, *(number for number in numbers if number > 1))]
