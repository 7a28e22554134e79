"""The data sets of an ensemble that grow with the chain: their paths, shapes, types and axes."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from latticeflow.storage.header import Header, check_equal, is_count

CHECKSUM = "checksum/crc32"
GROUPS = ("fields", "history", "proposals", "observables", "analysis", "training", "checksum", "state")
_DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_DTYPES += ("float32", "float64", "complex64", "complex128")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_AXIS_NAME = re.compile(r".*_dim_\d+|chain|draw")


@dataclass(frozen=True)
class Column:
    """A data set of shape `(chains, draws * rows_per_draw, *row_shape)` that is filled block by block."""

    path: str
    row_shape: tuple[int, ...]
    dtype: np.dtype
    rows_per_draw: int = 1

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the axes, as xarray shows them."""
        name = self.path.rpartition("/")[2]
        second = f"{name}_proposal" if self.path.startswith("proposals/") else "draw"
        return ("chain", second, *(f"{name}_dim_{axis}" for axis in range(len(self.row_shape))))

    def shape(self, header: Header) -> tuple[int, ...]:
        return (header.chains, header.draws * self.rows_per_draw, *self.row_shape)

    def chunk(self, header: Header) -> tuple[int, ...]:
        return (1, header.block * self.rows_per_draw, *self.row_shape)

    def rows(self, first: int, stop: int) -> slice:
        """The rows of the draws from `first` to `stop`."""
        return slice(first * self.rows_per_draw, stop * self.rows_per_draw)

    def conform(self, values: ArrayLike, *, chains: int, draws: int) -> np.ndarray:
        """The values of some draws as they are stored; raises `ValueError` for a wrong shape or a lossy type."""
        values, shape = np.asarray(values), (chains, draws * self.rows_per_draw, *self.row_shape)
        if values.shape != shape:
            raise ValueError(f"{self.path} has shape {values.shape}, expected {shape}")
        if not np.can_cast(values.dtype, self.dtype, casting="safe"):
            raise ValueError(f"{self.path} has dtype {values.dtype}, expected {self.dtype}")
        return np.ascontiguousarray(values, dtype=self.dtype)


def columns_for(
    fields: Mapping[str, tuple[Sequence[int], DTypeLike]],
    history: Mapping[str, DTypeLike],
    proposals: Mapping[str, int],
) -> dict[str, Column]:
    """The columns of a new file by their path; raises `ValueError` for a name, shape or type that cannot be stored."""
    if not fields:
        raise ValueError("fields is empty; an ensemble has at least one field, such as links or phi")
    columns = [
        *(_field(name, shape, dtype) for name, (shape, dtype) in fields.items()),
        *(Column(f"history/{checked_name(name)}", (), stored_dtype(dtype)) for name, dtype in history.items()),
        *(_proposal(name, per_draw) for name, per_draw in proposals.items()),
        Column(CHECKSUM, (), np.dtype("<u4")),
    ]
    return {column.path: column for column in columns}


def columns_of(file: h5py.File, header: Header, *, path: Path) -> dict[str, Column]:
    """The columns of an open file; raises `DataError` when an extent contradicts the header."""
    found = {}
    for group in ("fields", "history", "proposals", "checksum"):
        for name in members(file[group]):
            dataset = file[group][name]
            if group == "proposals" and not dataset.attrs.get("per_draw"):
                continue  # stored whole, not grown
            per_draw = int(dataset.attrs.get("per_draw", 1))
            column = Column(f"{group}/{name}", dataset.shape[2:], dataset.dtype, per_draw)
            check_equal(path, f"shape of {column.path}", dataset.shape, column.shape(header))
            found[column.path] = column
    return found


def checked_name(name: str) -> str:
    """The name, or `ValueError` when it cannot be the last part of an HDF5 path."""
    if not _NAME.fullmatch(name) or _AXIS_NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot name a data set; expected letters, digits and _ . + -, no axis name")
    return name


def stored_dtype(dtype: DTypeLike) -> np.dtype:
    """The little-endian type that is stored; raises `ValueError` for one that is not a plain number."""
    dtype = np.dtype(dtype)
    if dtype.name not in _DTYPES:
        raise ValueError(f"dtype {dtype} cannot be stored; expected one of {', '.join(_DTYPES)}")
    return dtype.newbyteorder("<")


def members(group: h5py.Group) -> list[str]:
    """The names in a group, without the dimension scales."""
    return [name for name, item in group.items() if not (isinstance(item, h5py.Dataset) and item.is_scale)]


def named(path: Path, names: Iterable[str], name: str, what: str) -> str:
    """The name, or `KeyError` naming the ones that there are."""
    known = sorted(names)
    if name not in known:
        raise KeyError(f"{path} has no {what} {name!r}; it has {', '.join(known) or 'none'}")
    return name


def _field(name: str, shape: Sequence[int], dtype: DTypeLike) -> Column:
    shape = tuple(shape)
    if not all(is_count(extent) for extent in shape):
        raise ValueError(f"field {name!r} has shape {shape}; expected extents of at least 1")
    return Column(f"fields/{checked_name(name)}", shape, stored_dtype(dtype))


def _proposal(name: str, per_draw: int) -> Column:
    if not is_count(per_draw):
        raise ValueError(f"proposals {name!r} has {per_draw!r} per draw; expected an integer of at least 1")
    return Column(f"proposals/{checked_name(name)}", (), np.dtype("<f8"), per_draw)
