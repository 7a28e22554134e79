"""The space of a whole chain, taken when its file is created: a full disk fails then, and not after a day.

What describes the file comes first, then the marker, then the columns, the smallest first: a file that is cut short
still says what it has lost.
"""

import math
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import h5py
import numpy as np

from latticeflow.storage.atomic import (
    disk_full_named,
    partial_name,
    publish,
    refuse_existing,
    removed_on_failure,
    require_free,
    reserve,
)
from latticeflow.storage.columns import GROUPS, Column
from latticeflow.storage.header import COMPLEMENT, MARKER, Header, write_header
from latticeflow.storage.journal import LIBVER

_FILTER_BYTES = 4  # fletcher32
_LARGEST_CHUNK = 2**32 - 1  # HDF5's limit
_ALIGNED = 8
_BEGINNING_BYTES = 1 << 14
_FIXED_BYTES = 1 << 14
_DESCRIPTION_BYTES = 1 << 11  # of a column: its header, its axes
_INDEX_BYTES = 24  # of a chunk: where it is, its length, its filters
_PAGE = 1 << 12
_NOT_A_VARIABLE = "This is a netCDF dimension but not a netCDF variable."


def create_file(path: Path, header: Header, columns: Collection[Column]) -> None:
    """Allocate a new file, which takes its name when it is complete.

    Raises `FileExistsError`, and `DiskFullError` naming the needed and free bytes; no part of the file is then left.
    """
    needed, temporary = needed_bytes(header, columns), partial_name(path)
    refuse_existing(path)
    require_free(path, needed=needed)
    with disk_full_named(path, needed=needed), removed_on_failure(temporary):
        with h5py.File(temporary, "w", libver=LIBVER) as file:
            write_header(file, header)
        reserve(temporary, size=needed)  # HDF5 itself does not end in order when it meets a full disk
        places = {"meta_block_size": _description_bytes(header, columns)}
        places |= {"alignment_threshold": _ALIGNED, "alignment_interval": _ALIGNED}  # no marker in two sectors
        with h5py.File(temporary, "r+", libver=LIBVER, **places) as file:
            _allocate(file, header, columns)
            file.flush()
            os.fsync(file.id.get_vfd_handle())  # h5py leaves the bytes with the operating system
        publish(temporary, path)


def needed_bytes(header: Header, columns: Collection[Column]) -> int:
    """An upper estimate of the size of a file; raises `ValueError` when a block is too large for one HDF5 chunk."""
    columns_bytes = sum(_column_bytes(header, column) for column in columns)
    return _BEGINNING_BYTES + _description_bytes(header, columns) + columns_bytes


def fill_value(dtype: np.dtype) -> np.ndarray | None:
    """What rows hold before they are written: NaN, where the type has one, so that no reader takes them for data."""
    return np.array(np.nan, dtype) if dtype.kind in "fc" else None


def attach_axes(dataset: h5py.Dataset, axes: Sequence[str]) -> None:
    """Name the axes of a data set by scales of its own group, or by "chain" and "draw" of the root."""
    for number, (name, extent) in enumerate(zip(axes, dataset.shape, strict=True)):
        group = dataset.file if name in ("chain", "draw") else dataset.parent
        if name not in group:
            make_axis(group, name, extent)
        dataset.dims[number].attach_scale(group[name])
        dataset.dims[number].label = name


def make_axis(group: h5py.Group, name: str, extent: int) -> None:
    """A dimension in the sense of netCDF that takes no space, so that xarray shows its name."""
    scale = group.create_dataset(name, shape=(extent,), dtype=">f4")
    scale.make_scale(f"{_NOT_A_VARIABLE}{extent:10d}")


def _allocate(file: h5py.File, header: Header, columns: Iterable[Column]) -> None:
    for group in GROUPS:
        file.create_group(group)
    make_axis(file, "chain", header.chains)
    make_axis(file, "draw", header.draws)
    for name, count in ((MARKER, 0), (COMPLEMENT, ~0)):
        file.create_dataset(name, shape=(), dtype="<i8", data=count, dcpl=_early())
    for column in sorted(columns, key=lambda column: math.prod(column.chunk(header)) * column.dtype.itemsize):
        _allocate_column(file, header, column)


def _allocate_column(file: h5py.File, header: Header, column: Column) -> None:
    dataset = file.create_dataset(
        column.path,
        shape=column.shape(header),
        dtype=column.dtype,
        chunks=column.chunk(header),
        fletcher32=True,
        fillvalue=fill_value(column.dtype),
        dcpl=_early(),
    )
    attach_axes(dataset, column.axes)
    if column.path.startswith("proposals/"):
        dataset.attrs["per_draw"] = column.rows_per_draw


def _early() -> h5py.h5p.PropDCID:
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    return settings


def _column_bytes(header: Header, column: Column) -> int:
    chunk = math.prod(column.chunk(header)) * column.dtype.itemsize + _FILTER_BYTES
    if chunk > _LARGEST_CHUNK:
        raise ValueError(f"a block of {column.path} has {chunk} bytes, at most {_LARGEST_CHUNK} fit: reduce block")
    return _chunks(header) * (chunk + _ALIGNED)


def _description_bytes(header: Header, columns: Collection[Column]) -> int:
    """An upper estimate of the space of all that is neither rows nor header, in whole pages."""
    size = _FIXED_BYTES + len(columns) * (_DESCRIPTION_BYTES + _INDEX_BYTES * _chunks(header))
    return -(-size // _PAGE) * _PAGE


def _chunks(header: Header) -> int:
    return header.chains * math.ceil(header.draws / header.block)
