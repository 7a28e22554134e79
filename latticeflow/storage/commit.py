"""How a block of a chain reaches the disk, and when it counts.

The places of all rows are fixed at creation, so a block is bytes at known places. They are written by the operating
system's own calls and not by HDF5, which keeps writes back, loses their errors when a data set is closed, and can crash
at exit after one. The order is the promise: rows, fsync, marker, fsync.
"""

import math
import os
from collections.abc import Mapping

import h5py
import numpy as np

from latticeflow.storage.columns import Column
from latticeflow.storage.header import MARKER

_PIECE = 1 << 16  # bytes; every sum over one is below 2**53 and therefore exact in float64


def commit_block(
    descriptor: int, file: h5py.File, columns: Mapping[str, Column], rows: Mapping[str, np.ndarray], count: int
) -> None:
    """Write the last block of `count` draws, `rows` `(chain, ...)` by the path of their column, and count it."""
    for path, values in rows.items():
        last = columns[path].rows(0, count).stop
        _write_chunks(descriptor, file[path], values, last - values.shape[1])
    os.fsync(descriptor)
    _write_at(descriptor, np.int64(count).astype("<i8").tobytes(), file[MARKER].id.get_offset())
    os.fsync(descriptor)


def fletcher32(data: bytes) -> int:
    """The checksum of HDF5's filter of that name, over the n big-endian 16-bit words of the data.

    Its halves are sum_i w_i (low) and sum_i (n + 1 - i) w_i (high) modulo 65535, or 65535 for a multiple of it above 0.
    """
    low = high = 0
    for start in range(0, len(data), _PIECE):
        piece = data[start : start + _PIECE]
        words = np.frombuffer(piece + b"\0" * (len(piece) % 2), dtype=">u2").astype(np.float64)
        high += words.size * low + int(np.arange(words.size, 0, -1.0) @ words)
        low += int(words.sum())
    return (_folded(high) << 16) + _folded(low)


def _folded(total: int) -> int:
    return (total - 1) % 65535 + 1 if total else 0


def _write_chunks(descriptor: int, dataset: h5py.Dataset, values: np.ndarray, first_row: int) -> None:
    """Write one chunk per chain; what the last rows leave of it is zeros."""
    for chain, rows in enumerate(values):
        content = rows.tobytes().ljust(math.prod(dataset.chunks) * values.itemsize, b"\0")
        place = dataset.id.get_chunk_info_by_coord((chain, first_row, *(0,) * (dataset.ndim - 2)))
        _write_at(descriptor, content + fletcher32(content).to_bytes(4, "little"), place.byte_offset)


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
