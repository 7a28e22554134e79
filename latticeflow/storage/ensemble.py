"""An ensemble: the configurations of many Markov chains in HDF5 files that a crash cannot spoil.

The leading axes are always `(chain, draw, ...)`, as in ArviZ and xarray; every axis has a netCDF dimension name.

    /fields/<name>         (chain, draw, *field_shape)   links, phi, ...
    /history/<name>        (chain, draw)                 action, log_q, log_weight, accepted, delta_h, ...
    /proposals/<name>      (chain, proposal)             every proposal, per_draw (an attribute) of them per draw;
                                                         or a set stored whole, (n,) or (chain, n), without per_draw
    /checksum/crc32        (chain, draw)                 uint32, of the configuration's fields in alphabetical order
    /state/n_committed     scalar int64                  draws that every chain has; its complement in /state/complement
    /observables/<name>    (chain, draw, ...)            attribute measured: the draws that it has
    /analysis/<name>       group                         attributes mean, error, tau_int, ...; data sets such as rho
    /training/<name>       (step,)                       step, loss, ess, seconds, skipped

The root has the attributes format ("latticeflow-ensemble"), format_version (2), theory, lattice_shape, config (TOML),
config_sha256, package_version, chains, draws, block, first_draw and continues (new in version 2, as is complement).

Rows at or beyond n_committed do not exist, whatever is there (NaN at first, where the type has it). All rows are
allocated at creation in chunks of one chain and one block, with fletcher32 and without compression; a block is on the
disk before n_committed counts it. Texts have a fixed length.
No file is ever made longer: more draws go to a further file, `ensemble-2.h5` beside `ensemble.h5`, of the same form.
Its first_draw says where it begins in the chains, `continues` is the config_sha256 of the first file. Its draws exist
once the files before it are full. /analysis, /training and proposals stored whole are in the first file.
A later change of a file's structure goes through a journal (`<file>.journal`), gone when the change is complete.
One process may write at a time (`<file>.lock`); readers need no lock and see the draws that were there on opening.
"""

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from latticeflow.storage import integrity, results
from latticeflow.storage.allocation import create_file
from latticeflow.storage.columns import CHECKSUM, columns_for, members, named
from latticeflow.storage.header import Header, check_equal
from latticeflow.storage.part import Part, files_of, further_file

ALL = slice(None)


class Ensemble:
    """An open ensemble, all of its files taken together; make one with `create` or `open`, use it in a `with` block."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = list(parts)
        self._kept: np.ndarray | None = None  # the sound draws, when damaged ones are left out

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
        skip_damaged: bool = False,
    ) -> Self:
        """Open an ensemble to read ("r") or to append ("a"), and check it against what is expected, if given.

        With `skip_damaged` every draw that is damaged in some chain is left out of all that is read; `skipped` counts
        them. Raises `FileNotFoundError`; `DataError` for a file that is damaged, of another format or version, or not
        as expected, naming both values; `LockedError` naming the process that has the file open to append.
        """
        ensemble = cls([])
        try:
            for file in files_of(Path(path)):
                ensemble._parts.append(Part(file, mode))
                ensemble._parts[-1].check_follows(ensemble._parts[:-1])
            ensemble._check_expected(theory, lattice_shape, fields or {})
            if skip_damaged:
                ensemble._skip_damaged()
        except BaseException:
            ensemble.close()
            raise
        return ensemble

    def close(self) -> None:
        """Close the files; nothing happens when they are closed."""
        for part in self._parts:
            part.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Ensemble {self.path} {self.theory} {self.chains} chains, {self.n_committed} of {self.draws} draws>"

    @property
    def path(self) -> Path:
        """The first file."""
        return self._parts[0].path

    @property
    def paths(self) -> list[Path]:
        return [part.path for part in self._parts]

    @property
    def header(self) -> Header:
        """What the first file says about itself."""
        return self._parts[0].header

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
        return sum(part.header.draws for part in self._parts)

    @property
    def block(self) -> int:
        """The draws per chain that are committed at a time."""
        return self.header.block

    @property
    def n_committed(self) -> int:
        """The draws per chain that exist, without those `skipped`."""
        return len(self._present())

    @property
    def skipped(self) -> int:
        """The draws per chain that exist and are left out because they are damaged."""
        return self._committed() - self.n_committed

    @property
    def field_names(self) -> list[str]:
        return self._names("fields")

    @property
    def history_names(self) -> list[str]:
        return self._names("history")

    @property
    def proposal_names(self) -> list[str]:
        return self._parts[0].result("proposals", lambda file: members(file["proposals"]))

    @property
    def observable_names(self) -> list[str]:
        return self._parts[0].result("observables", lambda file: members(file["observables"]))

    def block_at(self, draw: int) -> int:
        """The length of the block that begins at a draw: `block`, or what is left at the end of a file."""
        part = next(part for part in self._parts if draw < part.header.first_draw + part.header.draws)
        return min(part.header.block, part.header.first_draw + part.header.draws - draw)

    def append(
        self,
        *,
        fields: Mapping[str, ArrayLike],
        history: Mapping[str, ArrayLike] | None = None,
        proposals: Mapping[str, ArrayLike] | None = None,
    ) -> int:
        """Commit one block of every column and return the new `n_committed`.

        Arrays are `(chain, b, ...)`, and `(chain, b * per_draw)` for proposals; `b` is the block, or what is left at
        the end of a file. The rows are on the disk before they count. Raises `ValueError` naming a missing or unknown
        column, a shape or a type that does not fit; then nothing is written.
        """
        _ = self._parts[0].descriptor
        if self._kept is not None:
            raise io.UnsupportedOperation(f"{self.path} is open without its damaged draws; nothing can be appended")
        part = self._filled()[-1]
        if part.complete:
            raise ValueError(f"{self.path} has all of its {self.draws} draws; `extend` makes room for more")
        first = part.header.first_draw + part.n_committed
        rows = self._rows({"fields": fields, "history": history or {}, "proposals": proposals or {}}, first)
        part.write(rows, part.n_committed + self.block_at(first))
        return self.n_committed

    def extend(self, draws: int, *, config: str | None = None) -> None:
        """Make room for `draws` more draws per chain in a further file, which stores `config` if that is given.

        Raises what `create` does.
        """
        first, last = self._parts[0], self._parts[-1]
        _ = first.descriptor
        header = Header(
            theory=self.theory,
            lattice_shape=self.lattice_shape,
            config=self.config if config is None else config,
            chains=self.chains,
            draws=draws,
            block=last.header.block,
            first_draw=self.draws,
            continues=self.header.config_sha256,
        ).checked()
        path = further_file(self.path, len(self._parts) + 1)
        create_file(path, header, first.columns.values())
        self._parts.append(Part(path, "a"))

    def differences(
        self,
        first: int,
        *,
        fields: Mapping[str, ArrayLike],
        history: Mapping[str, ArrayLike] | None = None,
        proposals: Mapping[str, ArrayLike] | None = None,
    ) -> list[str]:
        """The columns in which a block computed again differs from the stored one that begins at draw `first`.

        Fields are compared by their checksums, the rest bit for bit. Raises as `append` and `field` do.
        """
        rows = self._rows({"fields": fields, "history": history or {}, "proposals": proposals or {}}, first)
        draws = slice(first, first + self.block_at(first))
        return [
            "fields" if column == CHECKSUM else column
            for column, again in rows.items()
            if not column.startswith("fields/") and self._read(column, draws, ALL).tobytes() != again.tobytes()
        ]

    def field(self, name: str, draws: slice = ALL, *, chains: slice = ALL) -> np.ndarray:
        """Committed configurations `(chain, draw, *field_shape)`, after their checksums.

        Raises `DataError` naming the chains and draws that are damaged, `KeyError` naming the fields that there are.
        """
        return self._read(f"fields/{named(self.path, self.field_names, name, 'field')}", draws, chains)

    def history(self, name: str, draws: slice = ALL, *, chains: slice = ALL) -> np.ndarray:
        """Committed values `(chain, draw)` of a history; raises as `field` does."""
        return self._read(f"history/{named(self.path, self.history_names, name, 'history')}", draws, chains)

    def proposals(self, name: str) -> np.ndarray:
        """Committed proposals `(chain, draw * per_draw)`, or a set that was stored whole; raises as `field` does."""
        path = f"proposals/{named(self.path, self.proposal_names, name, 'proposals')}"
        if path in self._parts[0].columns:
            return self._read(path, ALL, ALL)
        return self._parts[0].result(path, lambda file: file[path][...])

    def iter_blocks(self, name: str, *, size: int | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        """Go through a field by `size` draws (one block if not given), as pairs of the draws and `(chain, b, ...)`."""
        size = self.block if size is None else size
        for first in range(0, self.n_committed, size):
            draws = slice(first, min(first + size, self.n_committed))
            yield draws, self.field(name, draws)

    def verify(self) -> list[tuple[int, int]]:
        """The `(chain, draw)` of every committed configuration whose bytes are not what was written."""
        return [(chain, part.header.first_draw + draw) for part in self._filled() for chain, draw in part.damaged()]

    def write_observable(self, name: str, values: ArrayLike) -> None:
        """Store an observable `(chain, draw, ...)` of the first draws, whole, in place of an older one.

        Draws that are left out get NaN.
        """
        checked = results.checked_observable(self.header, name, values, self.n_committed)
        if self._kept is not None:
            checked = results.spread(checked, self._kept[: checked.shape[1]], self._committed())
        for part in self._parts:
            if (share := part.share(checked)).shape[1]:
                part.edit(results.put_observable, part.header, name, share)

    def observable(self, name: str) -> np.ndarray:
        """An observable `(chain, measured draw, ...)`; raises as `field` does."""
        named(self.path, self.observable_names, name, "observable")
        shares: list[np.ndarray] = []
        for part in self._filled():
            share = part.result(f"observables/{name}", lambda file: results.get_observable(file, name))
            shares += [] if share is None else [share[:, : part.n_committed]]
            if share is None or share.shape[1] < part.header.draws:
                break
        values = np.concatenate(shares, axis=1)
        return values if self._kept is None else values[:, self._kept[self._kept < values.shape[1]]]

    def write_analysis(
        self, name: str, numbers: Mapping[str, results.Scalar], arrays: Mapping[str, ArrayLike] | None = None
    ) -> None:
        """Store an observable's mean, error, tau_int, ... and arrays such as rho, whole, in place of older ones."""
        self._parts[0].edit(results.put_analysis, name, *results.checked_analysis(name, numbers, arrays or {}))

    def analysis(self) -> dict[str, dict[str, Any]]:
        """The numbers and arrays of every analysed observable, by its name; raises `DataError`."""
        return self._parts[0].result("analysis", results.get_analysis)

    def write_training(self, record: Mapping[str, ArrayLike]) -> None:
        """Store the training record, whole, in place of an older one: `step` and other arrays, all `(steps,)`."""
        self._parts[0].edit(results.put_training, results.checked_training(record))

    def training(self) -> dict[str, np.ndarray]:
        """The training record, arrays `(steps,)` by name, empty when there is none; raises `DataError`."""
        return self._parts[0].result("training", results.get_training)

    def write_proposals(self, name: str, values: ArrayLike) -> None:
        """Store a set of proposals that no chain consumed, `(n,)` or `(chain, n)` float64, in place of an older one.

        Raises `ValueError` for the name of proposals that grow with the chain, and for a wrong shape.
        """
        if f"proposals/{name}" in self._parts[0].columns:
            raise ValueError(f"proposals {name!r} grow with the chain; pass them to append")
        self._parts[0].edit(results.put_proposals, name, results.checked_proposals(name, values))

    def _names(self, group: str) -> list[str]:
        return [path.partition("/")[2] for path in self._parts[0].columns if path.startswith(f"{group}/")]

    def _filled(self) -> list[Part]:
        """The files whose draws exist: all that are full, and the one after them."""
        full = next((n for n, part in enumerate(self._parts) if not part.complete), len(self._parts))
        return self._parts[: full + 1]

    def _committed(self) -> int:
        return sum(part.n_committed for part in self._filled())

    def _present(self) -> np.ndarray:
        """The numbers of the draws that are read."""
        return np.arange(self._committed()) if self._kept is None else self._kept

    def _skip_damaged(self) -> None:
        damaged = {draw for _, draw in self.verify()}
        self._kept = np.array([draw for draw in range(self._committed()) if draw not in damaged], dtype=np.int64)

    def _read(self, path: str, draws: slice, chains: slice) -> np.ndarray:
        if draws.step is not None and draws.step < 1:
            raise ValueError(f"draws is {draws}, expected a positive step")
        first, stop, step = draws.indices(self.n_committed)
        chosen = self._present()[first : max(first, stop)]
        read = Part.read_field if path.startswith("fields/") else Part.read
        pieces = [read(part, path, run, chains) for part in self._filled() for run in part.runs(chosen)]
        values = np.concatenate(pieces, axis=1) if pieces else self._parts[0].read(path, slice(0, 0), chains)
        return values if step == 1 else values[:, ::step]

    def _rows(self, given: Mapping[str, Mapping[str, ArrayLike]], first: int) -> dict[str, np.ndarray]:
        """The block that begins at draw `first`, every column by its path, the checksums included."""
        columns = self._parts[0].columns
        values = {f"{group}/{name}": array for group, arrays in given.items() for name, array in arrays.items()}
        expected = set(columns) - {CHECKSUM}
        if set(values) != expected:
            missing, unknown = sorted(expected - set(values)), sorted(set(values) - expected)
            raise ValueError(f"{self.path}: append is missing {missing or 'nothing'}, knows no {unknown or 'other'}")
        size = self.block_at(first)
        rows = {path: columns[path].conform(array, chains=self.chains, draws=size) for path, array in values.items()}
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
            column = self._parts[0].columns.get(f"fields/{name}")
            found = column and (column.row_shape, column.dtype.name)
            check_equal(self.path, f"field {name}", found, (tuple(shape), np.dtype(dtype).name))
