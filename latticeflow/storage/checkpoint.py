"""Checkpoints: the newest two states of a run, each replaced whole, and none able to run code when it is read.

A checkpoint is `step-000000000012.pt`, a `torch.save` file that `torch.load(..., weights_only=True)` opens, with
`step-000000000012.pt.sha256` beside it in the form that `sha256sum --check` reads. The sum is written first, so the
moment when the `.pt` file takes its name is the moment when the checkpoint exists.
"""

import hashlib
import io
import os
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from latticeflow.storage.atomic import atomic_write_bytes, atomic_write_text, fsync_folder
from latticeflow.storage.errors import DataError

FORMAT_VERSION = 1
_KEPT = 2
_UNREADABLE = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError)
_PLAIN = (bool, int, float, str, type(None))
_NAME = re.compile(r"step-(\d{12,})\.pt")


class Checkpoint(NamedTuple):
    """A state that was read back, its step, and remarks about newer checkpoints that had to be passed over."""

    state: dict[str, Any]
    step: int
    notes: list[str]


def save_checkpoint(folder: str | os.PathLike[str], state: dict[str, Any], step: int) -> Path:
    """Write the state of a step, keep it and the newest valid one before it, and return the new file.

    `state` holds tensors, numbers, strings and None, in lists, tuples and dicts with string or integer keys; tensors
    are stored on the CPU. Raises `TypeError` naming whatever else is in it, `ValueError` when a valid checkpoint of a
    later step exists, and `DiskFullError` when there is no room; what was there before then stays as it was.
    """
    import torch  # here and not above: reading an ensemble must not wait for torch

    folder, step = Path(folder), _checked_step(step)
    payload = {"format_version": FORMAT_VERSION, "step": step, "state": _plain(state, "state")}
    folder.mkdir(parents=True, exist_ok=True)
    valid = [path for path in _newest_first(folder) if _damage(path) is None]
    if valid and _step_of(valid[0]) > step:
        raise ValueError(f"step {step} is behind {valid[0]}, the newest checkpoint; nothing was written")
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    path = folder / f"step-{step:012d}.pt"
    if not (path in valid and path.read_bytes() == buffer.getvalue()):
        path.unlink(missing_ok=True)  # a death between sum and state must not leave a new sum beside an old state
        _write(path, buffer.getvalue())
    _prune(folder, keep=[path, *(old for old in valid if old != path)][:_KEPT])
    return path


def load_checkpoint(
    folder: str | os.PathLike[str], *, map_location: str = "cpu", before: int | None = None
) -> Checkpoint:
    """Read the newest valid checkpoint as `(state, step, notes)`; each damaged one that was passed over has a note.

    `before` asks for one of an earlier step. Only tensors and plain values are ever built (`weights_only=True`).
    Raises `FileNotFoundError` when the folder has no such checkpoint, `DataError` when it has some and none is valid.
    """
    folder, notes = Path(folder), []
    for path in _newest_first(folder):
        try:
            _check_sum(path)
            if before is not None and _step_of(path) >= before:
                continue
            state = _read(path, map_location)
        except DataError as error:
            notes.append(str(error))
        else:
            return Checkpoint(state, _step_of(path), [f"{note}; passed over for {path.name}" for note in notes])
    if not notes:
        raise FileNotFoundError(f"{folder}: there is no checkpoint here")
    raise DataError(f"{folder}: no valid checkpoint; " + "; ".join(notes))


def checkpoint_steps(folder: str | os.PathLike[str]) -> list[int]:
    """The steps that a folder has checkpoints of, valid or not, in ascending order; empty where there is no folder."""
    return sorted(map(_step_of, _newest_first(Path(folder))))


def damaged_checkpoints(folder: str | os.PathLike[str]) -> list[str]:
    """One sentence for each checkpoint of a folder whose bytes are not what was written."""
    return [f"{path}: {damage}" for path in _newest_first(Path(folder)) if (damage := _damage(path)) is not None]


def drop_checkpoints(folder: str | os.PathLike[str], *, after: int) -> list[int]:
    """Remove the checkpoints of later steps and return those steps."""
    folder = Path(folder)
    kept = [path for path in _newest_first(folder) if _step_of(path) <= after]
    dropped = [step for step in checkpoint_steps(folder) if step > after]
    if dropped:
        _prune(folder, keep=kept)
    return dropped


def _write(path: Path, data: bytes) -> None:
    atomic_write_text(_sum_file(path), f"{hashlib.sha256(data).hexdigest()}  {path.name}\n")
    atomic_write_bytes(path, data)


def _read(path: Path, map_location: str) -> dict[str, Any]:
    import pickle

    import torch

    if not zipfile.is_zipfile(path):
        raise DataError(f"{path}: refused, not a file that torch.save writes")
    try:
        payload = torch.load(path, map_location=map_location, weights_only=True)
        version, step, state = payload["format_version"], payload["step"], payload["state"]
    except (pickle.UnpicklingError, *_UNREADABLE) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: refused, not a checkpoint of tensors and plain values ({reason})") from error
    if (version, step) != (FORMAT_VERSION, _step_of(path)):
        raise DataError(
            f"{path}: format version {version} and step {step}, "
            f"expected format version {FORMAT_VERSION} and step {_step_of(path)}"
        )
    return state


def _check_sum(path: Path) -> None:
    damage = _damage(path)
    if damage is not None:
        raise DataError(f"{path}: {damage}")


def _damage(path: Path) -> str | None:
    """What is wrong with the bytes of a checkpoint, or None."""
    try:
        expected = _sum_file(path).read_text("ascii").partition(" ")[0]
    except FileNotFoundError:
        return "damaged: its .sha256 file is missing"
    except UnicodeDecodeError:
        return "damaged: its .sha256 file is not text"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return None if found == expected else f"damaged: sha256 {found[:16]}..., expected {expected[:16]}..."


def _prune(folder: Path, *, keep: list[Path]) -> None:
    for path in _newest_first(folder):
        if path not in keep:
            path.unlink()
            _sum_file(path).unlink(missing_ok=True)
    fsync_folder(folder)


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path}: not the name of a checkpoint")
    return int(match.group(1))


def _sum_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _checked_step(step: int) -> int:
    if type(step) is not int or step < 0:
        raise ValueError(f"step is {step!r}, expected an integer that is not negative")
    return step


def _plain(value: Any, where: str) -> Any:
    """A copy of a state that shares nothing with it, or `TypeError` naming the first thing that does not belong."""
    import torch

    if type(value) in _PLAIN:
        return value
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        return value.detach().to("cpu", copy=True).contiguous()
    if type(value) in (list, tuple):
        return type(value)(_plain(item, f"{where}[{index}]") for index, item in enumerate(value))
    if isinstance(value, dict):
        return {_key(key, where): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    raise TypeError(f"{where} is a {_full_name(value)}; a checkpoint holds tensors, numbers, strings, lists and dicts")


def _key(key: Any, where: str) -> str | int:
    if type(key) not in (str, int):
        raise TypeError(f"{where} has the key {key!r}, a {_full_name(key)}; keys are strings or ints")
    return key


def _full_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
