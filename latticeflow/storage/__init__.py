"""Ensembles, checkpoints, locks and provenance on disk; this package knows arrays, not physics."""

from latticeflow.storage.atomic import atomic_write_text
from latticeflow.storage.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from latticeflow.storage.ensemble import Ensemble
from latticeflow.storage.errors import DataError, DiskFullError, LockedError, StorageError
from latticeflow.storage.export import ExportError, MissingLibraryError, default_export_path, export
from latticeflow.storage.lock import RunLock
from latticeflow.storage.provenance import provenance

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
    "atomic_write_text",
    "default_export_path",
    "export",
    "load_checkpoint",
    "provenance",
    "save_checkpoint",
]
