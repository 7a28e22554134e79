"""The file metrics.jsonl: a line for each record of a training, written as it comes, read again after a stop."""

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

from latticeflow.cli.folder import RunFolder
from latticeflow.storage import DataError, append_line, atomic_write_text

Record = dict[str, Any]


def append(folder: RunFolder, record: Record) -> None:
    """Add a record."""
    append_line(folder.metrics_file, json.dumps(record))


def written(folder: RunFolder) -> Iterator[Record]:
    """Yield what the metrics say of each step, up to a line that a death cut short."""
    if not folder.metrics_file.exists():
        return
    for line in folder.metrics_file.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            return
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record


def rewrite(folder: RunFolder, records: Iterable[Record]) -> None:
    """Leave in the metrics only these records, those that the checkpoint has."""
    lines = [json.dumps(record) + "\n" for record in records]
    if lines:
        atomic_write_text(folder.metrics_file, "".join(lines))
    else:
        folder.metrics_file.unlink(missing_ok=True)


def check_again(folder: RunFolder, before: Record | None, again: Record) -> None:
    """Compare a record with what an earlier life wrote of it; all but the seconds must agree bit for bit."""
    if before is None:
        return
    names = [name for name in again if name != "seconds" and repr(again[name]) != repr(before.get(name))]
    if names:
        place = f"piece {again['piece']}, step {again['step']}" if "piece" in again else f"step {again['step']}"
        raise DataError(
            f"{folder.metrics_file}: {place} computed again differs in {', '.join(names)}; {folder.same_machine()}"
        )


def without_nan(record: Record) -> Record:
    """Return a record with None in place of NaN, which JSON does not have."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in record.items()}
