"""Ensembles, checkpoints, locks and provenance on disk; this package knows arrays, not physics."""

from latticeflow.storage.atomic import append_line, atomic_write_bytes, atomic_write_text
from latticeflow.storage.checkpoint import (
    Checkpoint,
    checkpoint_steps,
    damaged_checkpoints,
    drop_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from latticeflow.storage.ensemble import Ensemble
from latticeflow.storage.errors import DataError, DiskFullError, LockedError, StorageError
from latticeflow.storage.export import ExportError, MissingLibraryError, default_export_path, export
from latticeflow.storage.lock import RunLock, lock_holder
from latticeflow.storage.provenance import provenance
from latticeflow.storage.repair import Survey, repair, survey

__all__ = [
    "Checkpoint",
    "DataError",
    "DiskFullError",
    "Ensemble",
    "ExportError",
    "LockedError",
    "MissingLibraryError",
    "RunLock",
    "StorageError",
    "Survey",
    "append_line",
    "atomic_write_bytes",
    "atomic_write_text",
    "checkpoint_steps",
    "damaged_checkpoints",
    "default_export_path",
    "drop_checkpoints",
    "export",
    "load_checkpoint",
    "lock_holder",
    "provenance",
    "repair",
    "save_checkpoint",
    "survey",
]
