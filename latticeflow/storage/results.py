"""What is computed from a chain and stored beside it: observables, analysis, the training record, whole proposal sets.

These functions change or read an open HDF5 file; `Ensemble` runs the changing ones inside a journal.
"""

import re
from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np
from numpy.typing import ArrayLike

from latticeflow.storage.allocation import attach_axes, fill_value
from latticeflow.storage.columns import checked_name, members, stored_dtype
from latticeflow.storage.header import Header

Scalar = bool | int | float | np.generic


def put_observable(file: h5py.File, header: Header, name: str, values: np.ndarray) -> None:
    """Store an observable in a data set as long as the chain; `measured` says how many draws it has."""
    shape = (header.chains, header.draws, *values.shape[2:])
    _discard(file["observables"], name)
    dataset = file["observables"].create_dataset(
        name,
        shape=shape,
        dtype=values.dtype,
        chunks=(1, header.block, *shape[2:]),
        fletcher32=True,
        fillvalue=fill_value(values.dtype),
    )
    dataset[:, : values.shape[1]] = values
    dataset.attrs["measured"] = values.shape[1]
    attach_axes(dataset, ("chain", "draw", *_own_axes(name, values.ndim - 2)))


def get_observable(file: h5py.File, name: str) -> np.ndarray | None:
    """The measured draws of an observable, None where it is not there."""
    if name not in file["observables"]:
        return None
    dataset = file["observables"][name]
    return dataset[:, : int(dataset.attrs["measured"])]


def checked_observable(header: Header, name: str, values: ArrayLike, n_committed: int) -> np.ndarray:
    """The values as they are stored; raises `ValueError` unless they are `(chain, measured draw, ...)`."""
    checked_name(name)
    values = np.asarray(values)
    if values.ndim < 2 or values.shape[0] != header.chains or not 1 <= values.shape[1] <= n_committed:
        raise ValueError(
            f"observable {name!r} has shape {values.shape}, expected ({header.chains}, 1 to {n_committed}, ...)"
        )
    return values.astype(stored_dtype(values.dtype))


def spread(values: np.ndarray, draws: np.ndarray, total: int) -> np.ndarray:
    """The values of some draws in their places among `total`, NaN elsewhere."""
    dtype = np.result_type(values.dtype, np.float32)
    spread_out = np.full((values.shape[0], total, *values.shape[2:]), np.nan, dtype=dtype)
    spread_out[:, draws] = values
    return spread_out


def put_analysis(file: h5py.File, name: str, numbers: Mapping[str, Scalar], arrays: Mapping[str, np.ndarray]) -> None:
    """Store numbers as the attributes of a group and arrays as its data sets, in place of what was there."""
    _discard(file["analysis"], name)
    group = file["analysis"].create_group(name)
    group.attrs.update(numbers)
    for key, values in arrays.items():
        _put_whole(group, key, values)


def get_analysis(file: h5py.File) -> dict[str, dict[str, Any]]:
    return {name: _numbers_and_arrays(group) for name, group in file["analysis"].items()}


def checked_analysis(
    name: str, numbers: Mapping[str, Scalar], arrays: Mapping[str, ArrayLike]
) -> tuple[dict[str, Scalar], dict[str, np.ndarray]]:
    """The contents as they are stored; raises `TypeError` or `ValueError` naming what is no number or no array."""
    checked_name(name)
    for key, value in numbers.items():
        checked_name(key)
        if not isinstance(value, bool | int | float | np.bool_ | np.integer | np.floating):
            raise TypeError(f"analysis {name!r}: {key} is {value!r}, expected a number")
    both = sorted(set(numbers) & set(arrays))
    if both:
        raise ValueError(f"analysis {name!r}: {', '.join(both)} is given as a number and as an array")
    return dict(numbers), {checked_name(key): _checked_array(f"{name}/{key}", item) for key, item in arrays.items()}


def put_training(file: h5py.File, record: Mapping[str, np.ndarray]) -> None:
    """Store the training record in place of what was there; `step` is the scale of the other arrays."""
    group = file["training"]
    for name in list(group):
        del group[name]
    for name in sorted(record, key=lambda name: (name != "step", name)):
        dataset = group.create_dataset(name, data=record[name], chunks=True, fletcher32=True)
        if name == "step":
            dataset.make_scale("step")
        else:
            dataset.dims[0].attach_scale(group["step"])


def get_training(file: h5py.File) -> dict[str, np.ndarray]:
    return {name: dataset[...] for name, dataset in file["training"].items()}


def checked_training(record: Mapping[str, ArrayLike]) -> dict[str, np.ndarray]:
    """The record as it is stored; raises `ValueError` unless it has `step` and all arrays are of one length."""
    arrays = {checked_name(name): _checked_array(name, values) for name, values in record.items()}
    shapes = {name: values.shape for name, values in arrays.items()}
    if "step" not in arrays or arrays["step"].ndim != 1 or len(set(shapes.values())) != 1 or not arrays["step"].size:
        raise ValueError(f"training record has the shapes {shapes}, expected step and others, all (steps,)")
    return arrays


def put_proposals(file: h5py.File, name: str, values: np.ndarray) -> None:
    """Store a whole set of proposals in place of one that was stored whole."""
    _discard(file["proposals"], name)
    _put_whole(file["proposals"], name, values)


def checked_proposals(name: str, values: ArrayLike) -> np.ndarray:
    """The values as they are stored; raises `ValueError` for a wrong shape."""
    checked_name(name)
    values = np.asarray(values, dtype="<f8")
    if values.ndim not in (1, 2) or not values.size:
        raise ValueError(f"proposals {name!r} have shape {values.shape}, expected (n,) or (chain, n)")
    return values


def _put_whole(group: h5py.Group, name: str, values: np.ndarray) -> None:
    dataset = group.create_dataset(name, data=values, chunks=True, fletcher32=True)
    attach_axes(dataset, _own_axes(name, values.ndim))


def _checked_array(name: str, values: ArrayLike) -> np.ndarray:
    values = np.asarray(values)
    if not values.ndim or not values.size:
        raise ValueError(f"{name} has shape {values.shape}, expected an array with at least one element")
    return values.astype(stored_dtype(values.dtype))


def _numbers_and_arrays(group: h5py.Group) -> dict[str, Any]:
    numbers = {key: value.item() for key, value in group.attrs.items()}
    return numbers | {name: group[name][...] for name in members(group)}


def _own_axes(name: str, count: int) -> tuple[str, ...]:
    return tuple(f"{name}_dim_{axis}" for axis in range(count))


def _discard(group: h5py.Group, name: str) -> None:
    """Remove a member with the axes of its own, if it is there, and let the shared axes forget it."""
    if isinstance(group.get(name), h5py.Dataset):
        for axis in group[name].dims:
            for scale in axis.values():
                axis.detach_scale(scale)
    for member in list(group):
        if member == name or re.fullmatch(rf"{re.escape(name)}_dim_\d+", member):
            del group[member]
