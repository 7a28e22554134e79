"""The numbers of an ensemble in the files that other packages read: NumPy's npz, ArviZ's netCDF, pyerrors' JSON.

npz        observables/<name>, history/<name>, proposals/<name>, analysis/<name>/<number>, on request fields/<name>,
           and theory, lattice_shape, config, n_committed; no pickles
arviz      the groups posterior (observables) and sample_stats (history, and lp = -action), both (chain, draw, ...);
           the root has the attributes theory, lattice_shape and config
pyerrors   one Obs per observable, an array of them for a vector, each chain a replica `<theory>|r<chain>`;
           `load_json_dict` gives them by name, `load_json` in alphabetical order
"""

import errno
import importlib
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from latticeflow.storage.atomic import disk_full_named, partial_name, publish, refuse_existing
from latticeflow.storage.ensemble import Ensemble
from latticeflow.storage.errors import DataError, StorageError

Target = Literal["arviz", "pyerrors", "npz"]
Arrays = Mapping[str, np.ndarray]

SUFFIXES: Mapping[str, str] = {"arviz": ".nc", "npz": ".npz", "pyerrors": ".json.gz"}
_GROUPS = {
    "arviz": ("observables", "history"),
    "npz": ("observables", "history", "proposals", "analysis"),
    "pyerrors": ("observables",),
}
_FEWEST_DRAWS = 5  # that pyerrors takes


class ExportError(StorageError):
    """What was asked for cannot be exported; the file is sound."""

    exit_code = 2


class MissingLibraryError(ExportError, ImportError):
    """The format needs a library that is not installed."""


def export(ensemble: Ensemble, path: str | os.PathLike[str], *, to: Target, fields: bool = False) -> Path:
    """Write the measured observables, and what else the format holds, to a new file and return its path.

    Values are those of the ensemble bit for bit, `(chain, draw, ...)`; pyerrors keeps a mean and deviations from it.
    `fields` adds the configurations, for "npz" alone. The file appears under its name when it is complete.
    Raises `FileExistsError`; `ExportError` when nothing is measured or the format cannot hold a value, naming the
    observable; `MissingLibraryError` with the command that installs it; `DataError` for observables that "arviz"
    cannot put side by side; `DiskFullError`; and `ValueError` for a name of a file or a format that does not fit.
    """
    path = Path(path)
    _check_request(path, to=to, fields=fields)
    if not ensemble.observable_names:
        raise ExportError(f"{ensemble.path} has no observables; measure it first")
    arrays = _arrays(ensemble, (*_GROUPS[to], *(("fields",) if fields else ())))
    with (
        disk_full_named(path, needed=sum(values.nbytes for values in arrays.values())),
        tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{partial_name(path).name}-") as folder,
    ):
        temporary = Path(folder) / path.name
        _WRITERS[to](ensemble, arrays, temporary)
        _fsync(temporary)
        publish(temporary, path)
    return path


def default_export_path(ensemble_path: str | os.PathLike[str], to: Target) -> Path:
    """The name beside the ensemble: `ensemble.nc`, `ensemble.json.gz` or `ensemble.npz` for `ensemble.h5`.

    Raises `ValueError` naming the formats that there are.
    """
    path = Path(ensemble_path)
    return path.with_name(path.stem + _suffix(to))


def _suffix(to: str) -> str:
    if to not in SUFFIXES:
        raise ValueError(f"to is {to!r}, expected one of {', '.join(SUFFIXES)}")
    return SUFFIXES[to]


def _check_request(path: Path, *, to: str, fields: bool) -> None:
    if not path.name.endswith(_suffix(to)):
        raise ValueError(f"{path} is no name for {to}, expected one that ends in {SUFFIXES[to]}")
    if fields and to != "npz":
        raise ValueError(f"fields is true and to is {to!r}; only npz holds fields")
    refuse_existing(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(path.parent))


def _arrays(ensemble: Ensemble, groups: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays of some groups by their paths in the ensemble."""
    return {f"{group}/{name}": values for group in groups for name, values in _READERS[group](ensemble).items()}


def _analysis(ensemble: Ensemble) -> dict[str, np.ndarray]:
    results = ensemble.analysis().items()
    return {f"{name}/{key}": np.asarray(value) for name, numbers in results for key, value in numbers.items()}


_READERS: Mapping[str, Callable[[Ensemble], Arrays]] = {
    "observables": lambda ensemble: {name: ensemble.observable(name) for name in ensemble.observable_names},
    "history": lambda ensemble: {name: ensemble.history(name) for name in ensemble.history_names},
    "proposals": lambda ensemble: {name: ensemble.proposals(name) for name in ensemble.proposal_names},
    "fields": lambda ensemble: {name: ensemble.field(name) for name in ensemble.field_names},
    "analysis": _analysis,
}


def _group(arrays: Arrays, group: str) -> dict[str, np.ndarray]:
    """The arrays of one group by their names."""
    return {path.partition("/")[2]: values for path, values in arrays.items() if path.startswith(f"{group}/")}


def _metadata(ensemble: Ensemble) -> dict[str, Any]:
    return {"theory": ensemble.theory, "lattice_shape": list(ensemble.lattice_shape), "config": ensemble.config}


def _write_npz(ensemble: Ensemble, arrays: Arrays, path: Path) -> None:
    metadata = _metadata(ensemble) | {"n_committed": ensemble.n_committed}
    np.savez(path, **{name: np.asarray(value) for name, value in metadata.items()}, **arrays)


def _write_arviz(ensemble: Ensemble, arrays: Arrays, path: Path) -> None:
    """Write what ArviZ reads; xarray does it alone, in the same way for ArviZ below 1.0 and above."""
    xarray, _ = _library("xarray"), _library("h5netcdf")
    draws = _common_draws(ensemble, arrays)
    observables, history = (
        {name: values[:, :draws] for name, values in _group(arrays, group).items()} for group in _GROUPS["arviz"]
    )
    if "action" in history:
        history.setdefault("lp", -history["action"])
    groups = {"/": xarray.Dataset(attrs=_metadata(ensemble)), "/posterior": _dataset(xarray, observables)}
    if history:
        groups["/sample_stats"] = _dataset(xarray, history)
    xarray.DataTree.from_dict(groups).to_netcdf(path, engine="h5netcdf")


def _common_draws(ensemble: Ensemble, arrays: Arrays) -> int:
    """The draws that all observables have; a chain may be ahead of them, but they agree among themselves."""
    measured = {name: values.shape[1] for name, values in _group(arrays, "observables").items()}
    most = max(measured.values())
    short = [f"{name} has {count}" for name, count in measured.items() if count < most]
    if short:
        raise DataError(f"{ensemble.path}: of {most} measured draws {', '.join(short)}; measure it again")
    return min(most, ensemble.n_committed)


def _dataset(xarray: ModuleType, arrays: Arrays) -> Any:
    _refuse_complex(arrays, "netCDF")
    variables = {name: xarray.Variable(_axes(name, values.ndim), values) for name, values in arrays.items()}
    extents = {axis: extent for variable in variables.values() for axis, extent in variable.sizes.items()}
    return xarray.Dataset(variables, coords={axis: np.arange(extent) for axis, extent in extents.items()})


def _axes(name: str, count: int) -> tuple[str, ...]:
    return ("chain", "draw", *(f"{name}_dim_{axis}" for axis in range(count - 2)))


def _write_pyerrors(ensemble: Ensemble, arrays: Arrays, path: Path) -> None:
    pyerrors = _library("pyerrors")
    observables = _group(arrays, "observables")
    _refuse_complex(observables, "pyerrors' JSON")
    obs = {name: _obs(pyerrors.Obs, ensemble.theory, name, values) for name, values in sorted(observables.items())}
    pyerrors.input.json.dump_dict_to_json(obs, str(path), description=_metadata(ensemble))


def _obs(make: Callable[..., Any], theory: str, name: str, values: np.ndarray) -> Any:
    """An `Obs` of a series `(chain, draw)`, or an array `(...)` of them for `(chain, draw, ...)`."""
    chains, draws, *own = values.shape
    if draws < _FEWEST_DRAWS:
        raise ExportError(f"observable {name!r} has {draws} draws per chain, pyerrors needs at least {_FEWEST_DRAWS}")
    if not np.isfinite(values).all():
        chain, draw = np.argwhere(~np.isfinite(values))[0][:2]
        raise ExportError(
            f"observable {name!r} is not finite at chain {chain}, draw {draw}; pyerrors needs finite values"
        )
    replica = [f"{theory}|r{chain}" for chain in range(chains)]
    found = np.empty(own, dtype=object)
    for index in np.ndindex(*own):
        found[index] = _series(make, values[(..., *index)].astype(np.float64), replica)
        found[index].tag = name + "".join(f"[{component}]" for component in index)
    return found if own else found[()]


def _series(make: Callable[..., Any], values: np.ndarray, replica: list[str]) -> Any:
    """The `Obs` of a series `(chain, draw)`; a constant is added last, lest its mean's rounding pass for an error."""
    first = float(values[0, 0])
    return make(list(values - first), replica) + first if (values == first).all() else make(list(values), replica)


def _refuse_complex(arrays: Arrays, what: str) -> None:
    found = [name for name, values in arrays.items() if np.iscomplexobj(values)]
    if found:
        raise ExportError(f"{', '.join(found)} is complex, which {what} does not hold; npz does")


def _library(name: str) -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # pyerrors imports scipy.odr
            return importlib.import_module(name)
    except ImportError as error:
        message = f'this export needs {name}, which cannot be imported ({error}); pip install "latticeflow[export]"'
        raise MissingLibraryError(message, name=name) from error


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


_WRITERS: Mapping[str, Callable[[Ensemble, Arrays, Path], None]] = {
    "arviz": _write_arviz,
    "npz": _write_npz,
    "pyerrors": _write_pyerrors,
}
