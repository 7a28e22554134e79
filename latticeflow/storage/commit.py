"""How a block of a chain reaches the disk, and when it counts.

The places of all rows are fixed at creation, so a block is bytes at known places. They are written by the operating
system's own calls and not by HDF5, which keeps writes back, loses their errors when a data set is closed, and can crash
at exit after one. The order is the promise: rows, fsync, marker, fsync. The marker is written twice, its complement
first, because no checksum of HDF5 covers it.
"""

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import h5py
import numpy as np

from latticeflow.storage.header import COMPLEMENT, MARKER
from latticeflow.storage.integrity import damage_named

_PIECE = 1 << 16  # bytes; every sum over one is below 2**53 and therefore exact in float64


class BlockWriter:
    """Writes the blocks of an ensemble file, once HDF5 has said where its chunks are."""

    def __init__(self, file: h5py.File, columns: Iterable[str], *, block: int, path: Path) -> None:
        self._block = block
        with damage_named(path, "the places of the blocks"):
            self._marker = marker_places(file)
            self._places = {name: _places(file[name]) for name in columns}
            self._sizes = {name: math.prod(file[name].chunks) * file[name].dtype.itemsize for name in columns}

    def commit(self, descriptor: int, rows: Mapping[str, np.ndarray], count: int) -> None:
        """Write the block that ends at draw `count`, `rows` `(chain, ...)` by their column, and then count it."""
        number = math.ceil(count / self._block) - 1
        for name, values in rows.items():
            self._write_chunks(descriptor, name, values, number)
        os.fsync(descriptor)
        write_marker(descriptor, self._marker, count)

    def _write_chunks(self, descriptor: int, name: str, values: np.ndarray, number: int) -> None:
        """Write one chunk per chain; what the last rows leave of it is zeros."""
        for rows, place in zip(values, self._places[name][:, number], strict=True):
            content = rows.tobytes().ljust(self._sizes[name], b"\0")
            _write_at(descriptor, content + fletcher32(content).to_bytes(4, "little"), int(place))


def marker_places(file: h5py.File) -> tuple[int, int]:
    """Where the marker and its complement are in the file."""
    return file[MARKER].id.get_offset(), file[COMPLEMENT].id.get_offset()


def write_marker(descriptor: int, places: tuple[int, int], count: int) -> None:
    """Say that the first `count` draws exist."""
    marker, complement = places
    _write_at(descriptor, (~count).to_bytes(8, "little", signed=True), complement)
    _write_at(descriptor, count.to_bytes(8, "little"), marker)
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


def _places(dataset: h5py.Dataset) -> np.ndarray:
    """Where the chunks of a column are in the file, `(chain, block)`."""
    length = dataset.chunks[1]
    places = np.zeros((dataset.shape[0], math.ceil(dataset.shape[1] / length)), dtype=np.int64)

    def note(chunk: h5py.h5d.StoreInfo) -> None:
        places[chunk.chunk_offset[0], chunk.chunk_offset[1] // length] = chunk.byte_offset

    dataset.id.chunk_iter(note)
    if not places.all():
        raise ValueError(f"{dataset.name} lacks {np.count_nonzero(places == 0)} of its {places.size} chunks")
    return places


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
