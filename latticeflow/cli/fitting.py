"""The training of pieces that are clusters of samples: cut once, then fitted piece by piece, a checkpoint after each.

A checkpoint holds the labels of the samples with a checksum of these, the silhouette scores, and the weights and
records of the pieces that are finished; its step is their number. A piece that was not finished is fitted again.
"""

import math
import zlib
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latticeflow.cli import metrics
from latticeflow.cli.folder import TRAINING, RunFolder, UsageError
from latticeflow.cli.metrics import Record
from latticeflow.cli.progress import ticker
from latticeflow.cli.stopping import finishing
from latticeflow.config.building import build_bare_action
from latticeflow.config.clusters import build_piece, build_pieces, cut, fit_settings, order_parameters
from latticeflow.config.samples import source_of, training_fields
from latticeflow.samplers import Sampler
from latticeflow.storage import DataError
from latticeflow.training import FitRecord, Fitted, TrainingError, fit_pieces

SHOWN = 2000
"""The most samples that are kept for a figure."""

State = dict[str, Any]


def fit_clusters(folder: RunFolder) -> Sampler:
    """Cut the samples into pieces and fit them, or take this up behind the last finished piece; return the sampler.

    Raises DataError for samples that cannot be cut or fitted, or that are not those of the checkpoint; TrainingError
    for a fit that fails. Both keep the pieces that are finished.
    """
    checkpoint = folder.load_checkpoint(TRAINING)
    if checkpoint is not None and checkpoint.step == len(sizes_of(checkpoint.state)):
        return _sampler(folder, checkpoint.state)
    fields = training_fields(folder.config, build_bare_action(folder.config))
    state = _begin(folder, fields) if checkpoint is None else checkpoint.state
    if state["checksum"] != _checksum(fields):
        raise DataError(f"{source_of(folder.config)}: not the samples that the pieces of {folder.path} were cut from")
    try:
        _fit(folder, fields, state)
    except ValueError as error:
        raise DataError(f"{source_of(folder.config)}: {error}") from error
    return _sampler(folder, state)


def fitted_pieces(folder: RunFolder) -> dict[str, Any]:
    """Return what `build_pieces` makes the fitted pieces from again. Raises UsageError where they are not finished."""
    return _pieces(_finished(folder))


def fit_records(folder: RunFolder) -> list[Record]:
    """Return the records of all evaluations, piece by piece. Raises UsageError where they are not finished."""
    return _records(_finished(folder))


def piece_columns(folder: RunFolder) -> dict[str, np.ndarray]:
    """Return what the report and the figures say of the pieces, as arrays.

    By piece: `samples`, `weight`, `held_out` (the smallest held-out loss). By number of clusters tried, if any was:
    `clusters`, `silhouette`. Of some samples: `feature`, `(n, ...)`, what they were clustered by, and `label`.
    """
    state = _finished(folder)
    sizes = np.array(sizes_of(state))
    held_out = [_best(_restored(piece).records).held_out for piece in state["pieces"]]
    columns = {"samples": sizes, "weight": sizes / sizes.sum(), "held_out": np.array(held_out)}
    if state["silhouettes"]:
        clusters = sorted(state["silhouettes"])
        scores = np.array([state["silhouettes"][k] for k in clusters])
        columns |= {"clusters": np.array(clusters), "silhouette": scores}
    labels = state["labels"].cpu()
    return columns | {"feature": state["shown"].cpu().numpy(), "label": labels[_some(labels)].numpy()}


def sizes_of(state: State) -> list[int]:
    """Return the number of samples of each piece."""
    return torch.bincount(state["labels"]).tolist()


def _begin(folder: RunFolder, fields: Tensor) -> State:
    """Cut the samples and store how."""
    action = build_bare_action(folder.config)
    with ticker("clustering", 1) as counter:
        try:
            found = cut(folder.config, action, fields)
        except ValueError as error:
            raise DataError(f"{source_of(folder.config)}: {error}") from error
        counter.advance(1, f"{found.pieces} pieces of {', '.join(map(str, found.sizes))} samples")
    state: State = {"labels": found.labels.int(), "silhouettes": found.silhouettes, "checksum": _checksum(fields)}
    state |= {"shown": order_parameters(action, fields)[_some(fields)].clone(), "pieces": []}
    folder.save_checkpoint(TRAINING, state, 0)
    folder.status(TRAINING, 0, found.pieces)
    return state


def _fit(folder: RunFolder, fields: Tensor, state: State) -> None:
    """Fit the pieces that are not in the state yet, adding each to it."""
    config, done, total = folder.config, len(state["pieces"]), len(sizes_of(state))
    taken = {_place(record): record for record in metrics.written(folder) if record.get("piece", -1) >= done}
    metrics.rewrite(folder, map(metrics.without_nan, _records(state)))
    processes = config.training.processes
    with ticker(TRAINING, total, done=done) as counter, finishing("piece") as stop:

        def on_piece(k: int, fitted: Fitted) -> None:
            piece = {"weights": fitted.weights, "records": [asdict(record) for record in fitted.records]}
            for record in map(metrics.without_nan, _numbered(k, piece["records"])):
                metrics.check_again(folder, taken.get(_place(record)), record)
                metrics.append(folder, record)
            state["pieces"].append(piece)
            folder.save_checkpoint(TRAINING, state, k + 1)
            folder.status(TRAINING, k + 1, total, elsewhere=fitted.cpu_seconds if processes > 1 else 0.0)
            counter.advance(1, f"piece {k}: {_note(fitted.records)}")
            stop.here()

        try:
            fit_pieces(
                lambda _, data: build_piece(config, data),
                fields,
                state["labels"],
                settings=fit_settings(config),
                minimum=1,
                processes=processes,
                finished=[_restored(piece) for piece in state["pieces"]],
                on_piece=on_piece,
            )
        except TrainingError:
            stop.here()  # a process that a signal ended is no failure
            raise


def _finished(folder: RunFolder) -> State:
    checkpoint = folder.load_checkpoint(TRAINING)
    done, total = (0, None) if checkpoint is None else (checkpoint.step, len(sizes_of(checkpoint.state)))
    if done != total:
        of = f" of {total}" if total else ""
        raise UsageError(
            f"{folder.path} has {done}{of} pieces fitted; "
            "finish it with `latticeflow run --resume` or `latticeflow train --resume`"
        )
    return checkpoint.state


def _sampler(folder: RunFolder, state: State) -> Sampler:
    return build_pieces(folder.config, **_pieces(state))


def _pieces(state: State) -> dict[str, Any]:
    return {"states": [piece["weights"] for piece in state["pieces"]], "sizes": sizes_of(state)}


def _restored(piece: State) -> Fitted:
    return Fitted(piece["weights"], [FitRecord(**record) for record in piece["records"]], 0.0)


def _records(state: State) -> list[Record]:
    return [record for k, piece in enumerate(state["pieces"]) for record in _numbered(k, piece["records"])]


def _numbered(k: int, records: list[Record]) -> list[Record]:
    return [{"piece": k, **record} for record in records]


def _place(record: Record) -> tuple[int, int]:
    return record.get("piece", 0), record["step"]


def _best(records: list[FitRecord]) -> FitRecord:
    return min((record for record in records if math.isfinite(record.held_out)), key=lambda record: record.held_out)


def _note(records: list[FitRecord]) -> str:
    best = _best(records)
    return f"held-out NLL {best.held_out:.3f} at step {best.step} of {records[-1].step}"


def _some(samples: Tensor) -> slice:
    """Return evenly spaced samples: those of an ensemble come chain by chain."""
    return slice(None, None, -(-len(samples) // SHOWN))


def _checksum(fields: Tensor) -> int:
    return zlib.crc32(fields.contiguous().numpy())
