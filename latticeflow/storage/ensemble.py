"""An ensemble: the configurations of many Markov chains in one HDF5 file that a crash cannot spoil.

The leading axes are always `(chain, draw, ...)`, as in ArviZ and xarray; every axis has a netCDF dimension name.

    /fields/<name>         (chain, draw, *field_shape)   links, phi, ...
    /history/<name>        (chain, draw)                 action, log_q, log_weight, accepted, delta_h, ...
    /proposals/<name>      (chain, proposal)             every proposal, per_draw (an attribute) of them per draw;
                                                         or a set stored whole, (n,) or (chain, n), without per_draw
    /checksum/crc32        (chain, draw)                 uint32, of the configuration's fields in alphabetical order
    /state/n_committed     scalar int64                  draws that every chain has
    /observables/<name>    (chain, draw, ...)            attribute measured: the draws that it has
    /analysis/<name>       group                         attributes mean, error, tau_int, ...; data sets such as rho
    /training/<name>       (step,)                       step, loss, ess, seconds

The root has the attributes format ("latticeflow-ensemble"), format_version (1), theory, lattice_shape, config (TOML),
config_sha256, package_version, chains, draws and block.

Rows at or beyond n_committed do not exist, whatever is there (NaN at first, where the type has it). All rows are
allocated at creation in chunks of one chain and one block, with fletcher32 and without compression; a block is on the
disk before n_committed counts it. Texts have a fixed length.
A later change of the file's structure goes through a journal (`<file>.journal`), gone when the change is complete.
One process may write at a time (`<file>.lock`); readers need no lock and see the draws that were there on opening.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import h5py
import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from latticeflow.storage import integrity, results
from latticeflow.storage.allocation import create_file
from latticeflow.storage.atomic import disk_full_named
from latticeflow.storage.columns import CHECKSUM, columns_for, columns_of, members, named
from latticeflow.storage.commit import BlockWriter
from latticeflow.storage.errors import DataError
from latticeflow.storage.handle import Handle
from latticeflow.storage.header import Header, check_equal, read_header, read_marker

ALL = slice(None)
Result = TypeVar("Result")
_LOOKS = 4
_PAUSE = 0.05  # seconds; a change takes a few milliseconds


class Ensemble:
    """An open ensemble file; make one with `create` or `open`, use it in a `with` block.

    Shapes are `(chain, draw, ...)` throughout; the module documents the file.
    """

    def __init__(self, handle: Handle) -> None:
        self.path = handle.path
        self._handle = handle
        with integrity.damage_named(self.path, "the file"):
            self.header = read_header(handle.file, path=self.path)
            self._columns = columns_of(handle.file, self.header, path=self.path)
            self._n_committed = read_marker(handle.file, self.header, path=self.path)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        theory: str,
        lattice_shape: Sequence[int],
        config: str,
        fields: Mapping[str, tuple[Sequence[int], DTypeLike]],
        history: Mapping[str, DTypeLike] | None = None,
        proposals: Mapping[str, int] | None = None,
        chains: int,
        draws: int,
        block: int,
    ) -> Self:
        """Allocate a file for `chains` chains of `draws` draws, written `block` draws at a time, and open it to append.

        `fields` maps a name to the shape and type of one configuration, `history` a name to a type, `proposals` a name
        to the number of proposals per draw. The file appears under its name when it is complete. Raises
        `FileExistsError`, `DiskFullError` naming the needed and free bytes, and `ValueError` naming a bad argument.
        """
        path = Path(path)
        header = Header(theory, tuple(lattice_shape), config, chains, draws, block).checked()
        columns = columns_for(fields, history or {}, proposals or {})
        create_file(path, header, columns.values())
        return cls.open(path, "a")

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        mode: str = "r",
        *,
        theory: str | None = None,
        lattice_shape: Sequence[int] | None = None,
        fields: Mapping[str, tuple[Sequence[int], DTypeLike]] | None = None,
    ) -> Self:
        """Open a file to read ("r") or to append ("a"), and check what it holds against what is expected, if given.

        Raises `FileNotFoundError`; `DataError` for a file that is damaged, of another format or a newer version, or
        not as expected, naming both values; `LockedError` naming the process that has the file open to append.
        """
        handle = Handle(Path(path), mode)
        try:
            ensemble = cls(handle)
            ensemble._check_expected(theory, lattice_shape, fields or {})
        except BaseException:
            handle.close()
            raise
        return ensemble

    def close(self) -> None:
        """Close the file; nothing happens when it is closed."""
        self._handle.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Ensemble {self.path} {self.theory} {self.chains} chains, {self.n_committed} of {self.draws} draws>"

    @property
    def theory(self) -> str:
        return self.header.theory

    @property
    def lattice_shape(self) -> tuple[int, ...]:
        return self.header.lattice_shape

    @property
    def config(self) -> str:
        """The resolved configuration of the run, TOML."""
        return self.header.config

    @property
    def chains(self) -> int:
        return self.header.chains

    @property
    def draws(self) -> int:
        """The draws per chain that there is room for."""
        return self.header.draws

    @property
    def block(self) -> int:
        """The draws per chain that are committed at a time."""
        return self.header.block

    @property
    def n_committed(self) -> int:
        """The draws per chain that exist."""
        return self._n_committed

    @property
    def field_names(self) -> list[str]:
        return self._names("fields")

    @property
    def history_names(self) -> list[str]:
        return self._names("history")

    @property
    def proposal_names(self) -> list[str]:
        return self._result("proposals", lambda file: members(file["proposals"]))

    @property
    def observable_names(self) -> list[str]:
        return self._result("observables", lambda file: members(file["observables"]))

    def append(
        self,
        *,
        fields: Mapping[str, ArrayLike],
        history: Mapping[str, ArrayLike] | None = None,
        proposals: Mapping[str, ArrayLike] | None = None,
    ) -> int:
        """Commit one block of every column and return the new `n_committed`.

        Arrays are `(chain, b, ...)`, and `(chain, b * per_draw)` for proposals; `b` is the block, or what is left at
        the end of the chain. The rows are on the disk before they count. Raises `ValueError` naming a missing or
        unknown column, a shape or a type that does not fit; then nothing is written.
        """
        descriptor = self._handle.descriptor
        if self._n_committed == self.draws:
            raise ValueError(f"{self.path} has all of its {self.draws} draws; further ones need a further file")
        stop = min(self._n_committed + self.block, self.draws)
        rows = self._rows({"fields": fields, "history": history or {}, "proposals": proposals or {}}, stop)
        with disk_full_named(self.path, needed=sum(values.nbytes for values in rows.values())):
            self._writer.commit(descriptor, rows, stop)
        self._n_committed = stop
        return stop

    def field(self, name: str, draws: slice = ALL, *, chains: slice = ALL) -> np.ndarray:
        """Committed configurations `(chain, draw, *field_shape)`.

        Raises `DataError` naming the chains and draws that are damaged, `KeyError` naming the fields that there are.
        """
        return self._read(f"fields/{named(self.path, self.field_names, name, 'field')}", draws, chains)

    def history(self, name: str, draws: slice = ALL, *, chains: slice = ALL) -> np.ndarray:
        """Committed values `(chain, draw)` of a history; raises as `field` does."""
        return self._read(f"history/{named(self.path, self.history_names, name, 'history')}", draws, chains)

    def proposals(self, name: str) -> np.ndarray:
        """Committed proposals `(chain, draw * per_draw)`, or a set that was stored whole; raises as `field` does."""
        path = f"proposals/{named(self.path, self.proposal_names, name, 'proposals')}"
        if path in self._columns:
            return self._read(path, ALL, ALL)
        return self._result(path, lambda file: file[path][...])

    def iter_blocks(self, name: str, *, size: int | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        """Go through a field by `size` draws (one block if not given), as pairs of the draws and `(chain, b, ...)`."""
        size = self.block if size is None else size
        for first in range(0, self.n_committed, size):
            draws = slice(first, min(first + size, self.n_committed))
            yield draws, self.field(name, draws)

    def verify(self) -> list[tuple[int, int]]:
        """The `(chain, draw)` of every committed configuration whose bytes are not what was written."""
        return integrity.verify(self._handle.file, self.header, self._columns, self.n_committed)

    def write_observable(self, name: str, values: ArrayLike) -> None:
        """Store an observable `(chain, draw, ...)` of the first draws, whole, in place of an older one."""
        checked = results.checked_observable(self.header, name, values, self.n_committed)
        self._handle.edit(results.put_observable, self.header, name, checked)

    def observable(self, name: str) -> np.ndarray:
        """An observable `(chain, measured draw, ...)`; raises as `field` does."""
        named(self.path, self.observable_names, name, "observable")
        return self._result(f"observables/{name}", lambda file: results.get_observable(file, name))

    def write_analysis(
        self, name: str, numbers: Mapping[str, results.Scalar], arrays: Mapping[str, ArrayLike] | None = None
    ) -> None:
        """Store an observable's mean, error, tau_int, ... and arrays such as rho, whole, in place of older ones."""
        self._handle.edit(results.put_analysis, name, *results.checked_analysis(name, numbers, arrays or {}))

    def analysis(self) -> dict[str, dict[str, Any]]:
        """The numbers and arrays of every analysed observable, by its name; raises `DataError`."""
        return self._result("analysis", results.get_analysis)

    def write_training(self, record: Mapping[str, ArrayLike]) -> None:
        """Store the training record, whole, in place of an older one: `step` and other arrays, all `(steps,)`."""
        self._handle.edit(results.put_training, results.checked_training(record))

    def training(self) -> dict[str, np.ndarray]:
        """The training record, arrays `(steps,)` by name, empty when there is none; raises `DataError`."""
        return self._result("training", results.get_training)

    def write_proposals(self, name: str, values: ArrayLike) -> None:
        """Store a set of proposals that no chain consumed, `(n,)` or `(chain, n)` float64, in place of an older one."""
        self._handle.edit(results.put_proposals, name, results.checked_proposals(self._handle.file, name, values))

    @cached_property
    def _writer(self) -> BlockWriter:
        return BlockWriter(self._handle.file, self._columns, block=self.block, path=self.path)

    def _names(self, group: str) -> list[str]:
        return [path.partition("/")[2] for path in self._columns if path.startswith(f"{group}/")]

    def _result(self, what: str, read: Callable[[h5py.File], Result]) -> Result:
        """Read what is not part of the chain, and look again when a run may have been changing it meanwhile."""
        for _ in range(_LOOKS - 1):
            file = self._handle.file
            try:
                with integrity.damage_named(self.path, what):
                    found = read(file)
                if not self._handle.outdated:
                    return found
            except DataError:
                time.sleep(_PAUSE)
            self._handle.look_again()
        with integrity.damage_named(self.path, what):
            return read(self._handle.file)

    def _read(self, path: str, draws: slice, chains: slice) -> np.ndarray:
        if draws.step is not None and draws.step < 1:
            raise ValueError(f"draws is {draws}, expected a positive step")
        first, stop, step = draws.indices(self.n_committed)
        draws = slice(first, max(first, stop), step)
        return integrity.read_rows(self._handle.file[path], chains, draws, self._columns[path], path=self.path)

    def _rows(self, given: Mapping[str, Mapping[str, ArrayLike]], stop: int) -> dict[str, np.ndarray]:
        """One block of every column, by its path, the checksums included."""
        values = {f"{group}/{name}": array for group, arrays in given.items() for name, array in arrays.items()}
        expected = set(self._columns) - {CHECKSUM}
        if set(values) != expected:
            missing, unknown = sorted(expected - set(values)), sorted(set(values) - expected)
            raise ValueError(f"{self.path}: append is missing {missing or 'nothing'}, knows no {unknown or 'other'}")
        extents = {"chains": self.chains, "draws": stop - self.n_committed}
        rows = {path: self._columns[path].conform(array, **extents) for path, array in values.items()}
        sums = integrity.checksums([rows[path] for path in sorted(rows) if path.startswith("fields/")])
        return rows | {CHECKSUM: sums}

    def _check_expected(
        self,
        theory: str | None,
        lattice_shape: Sequence[int] | None,
        fields: Mapping[str, tuple[Sequence[int], DTypeLike]],
    ) -> None:
        if theory is not None:
            check_equal(self.path, "theory", self.theory, theory)
        if lattice_shape is not None:
            check_equal(self.path, "lattice_shape", self.lattice_shape, tuple(lattice_shape))
        for name, (shape, dtype) in fields.items():
            column = self._columns.get(f"fields/{name}")
            found = column and (column.row_shape, column.dtype.name)
            check_equal(self.path, f"field {name}", found, (tuple(shape), np.dtype(dtype).name))
