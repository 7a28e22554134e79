"""What an ensemble file says about itself: its root attributes and its marker."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np

import latticeflow
from latticeflow.storage.errors import DataError

FORMAT = "latticeflow-ensemble"
FORMAT_VERSION = 2
MARKER = "state/n_committed"
COMPLEMENT = "state/complement"


@dataclass(frozen=True)
class Header:
    """The root attributes of an ensemble file; the extents count chains, draws per chain and draws per block.

    `first_draw` is where the file's draws begin in their chains; a file that continues another names the config_sha256
    of the first one in `continues`.
    """

    theory: str
    lattice_shape: tuple[int, ...]
    config: str
    chains: int
    draws: int
    block: int
    first_draw: int = 0
    continues: str = ""
    package_version: str = latticeflow.__version__

    @property
    def config_sha256(self) -> str:
        return hashlib.sha256(self.config.encode("utf-8")).hexdigest()

    def checked(self) -> "Header":
        """The header with a block no longer than the chain; raises `ValueError` naming an extent below one."""
        extents = {"chains": self.chains, "draws": self.draws, "block": self.block}
        extents |= {f"lattice_shape[{axis}]": extent for axis, extent in enumerate(self.lattice_shape)}
        wrong = [f"{name} is {value!r}" for name, value in extents.items() if not is_count(value)]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}; expected integers of at least 1")
        return replace(self, block=min(self.block, self.draws))


def write_header(file: h5py.File, header: Header) -> None:
    """Write the root attributes."""
    file.attrs.update(
        format=_text(FORMAT),
        format_version=FORMAT_VERSION,
        theory=_text(header.theory),
        lattice_shape=np.array(header.lattice_shape, dtype=np.int64),
        config=_text(header.config),
        config_sha256=_text(header.config_sha256),
        package_version=_text(header.package_version),
        chains=header.chains,
        draws=header.draws,
        block=header.block,
        first_draw=header.first_draw,
        continues=_text(header.continues),
    )


def read_header(file: h5py.File, *, path: Path) -> Header:
    """Read and check the root attributes; raises `DataError` naming what was found and what was expected."""
    attrs = {name: _plain(value) for name, value in file.attrs.items()}
    check_equal(path, "format", attrs.get("format"), FORMAT)
    check_equal(path, "format_version", attrs["format_version"], FORMAT_VERSION)
    header = Header(
        theory=attrs["theory"],
        lattice_shape=tuple(attrs["lattice_shape"]),
        config=attrs["config"],
        chains=attrs["chains"],
        draws=attrs["draws"],
        block=attrs["block"],
        first_draw=attrs["first_draw"],
        continues=attrs["continues"],
        package_version=attrs["package_version"],
    ).checked()
    check_equal(path, "config_sha256", attrs["config_sha256"], header.config_sha256)
    return header


def read_marker(file: h5py.File, header: Header, *, path: Path) -> int:
    """The number of draws that every chain has.

    Where the marker and its complement are one block apart, only one of them reached the disk; the rows of that block
    had done so before. Raises `DataError` when the two contradict each other otherwise, or the number cannot be the end
    of a block.
    """
    marker, complement = int(file[MARKER][()]), ~int(file[COMPLEMENT][()])
    for count in (marker, complement):
        if not 0 <= count <= header.draws or (count % header.block and count != header.draws):
            expected = f"{header.draws} or a smaller multiple of {header.block}"
            raise DataError(f"{path}: {MARKER} is {count}, expected {expected}")
    fewer, more = sorted((marker, complement))
    if more > fewer + header.block:
        raise DataError(f"{path}: {MARKER} is {marker}, by its complement {complement}")
    return more


def check_equal(path: Path, what: str, found: object, expected: object) -> None:
    """Raise `DataError` naming both values unless they are equal."""
    if found != expected:
        raise DataError(f"{path}: {what} is {found!r}, expected {expected!r}")


def is_count(value: object) -> bool:
    """Whether a value is an integer of at least 1."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= 1


def _text(text: str) -> np.ndarray:
    """Text of fixed length: HDF5 keeps text of variable length where no checksum protects it."""
    data = text.encode("utf-8")
    return np.array(data, dtype=h5py.string_dtype("utf-8", max(1, len(data))))


def _plain(value: np.generic | np.ndarray | str) -> str | int | list[int]:
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return value if isinstance(value, str) else value.tolist()
