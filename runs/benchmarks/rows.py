"""Where the rows of a benchmark are kept, as they come and by several runs at a time."""

import fcntl
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latticeflow.stats import ess, ess_error, log_z, pareto_k
from latticeflow.storage import atomic_write_text

Row = dict[str, Any]
Tables = dict[str, Any]
"""Rows by part of the benchmark, and what they were measured on."""
RESULTS = Path(__file__).parent / "results"


def worth(log_weight: NDArray[np.float64]) -> Row:
    """Return what proposals with these log weights are worth: ESS/N, the spread of log w, log Z and Pareto k."""
    value, error = log_z(log_weight)
    return {
        "ess": ess(log_weight),
        "ess_error": ess_error(log_weight),
        "std_log_weight": float(log_weight.std()),
        "log_z": value,
        "log_z_error": error,
        "pareto_k": pareto_k(log_weight),
    }


@dataclass(frozen=True)
class Results:
    """`<name>.json` and `<name>.md` in a folder: rows by part, told apart by the keys of the part.

    `markdown` makes the text of all rows; `machine` describes what they are measured on.
    """

    name: str
    keys: Mapping[str, tuple[str, ...]]
    markdown: Callable[[Tables], str]
    machine: Mapping[str, Any] = field(default_factory=dict)
    folder: Path = RESULTS

    def tables(self) -> Tables:
        file = self.folder / f"{self.name}.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def has(self, part: str, **keys: Any) -> bool:
        """Return whether there is a row with these keys."""
        wanted = self._place(part, keys)
        return any(self._place(part, row) == wanted for row in self.tables().get(part, []))

    def keep(self, part: str, row: Row) -> None:
        """Print a row and put it in the place of an older one of the same keys, else behind the others."""
        print(json.dumps(row), flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{self.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            tables = self.tables()
            rows = {self._place(part, each): each for each in [*tables.get(part, []), row]}
            tables[part] = list(rows.values())
            tables["provenance"] = dict(self.machine)
            atomic_write_text(self.folder / f"{self.name}.json", json.dumps(tables, indent=1) + "\n")
            atomic_write_text(self.folder / f"{self.name}.md", self.markdown(tables))

    def _place(self, part: str, row: Row) -> tuple[Any, ...]:
        return tuple(row[key] for key in self.keys[part])


def aligned(head: str, rows: Iterable[Iterable[object]]) -> list[str]:
    """Return the lines of a table; `head` names the columns, separated by bars."""
    columns = head.split("|")
    lines = [columns, ["---"] * len(columns), *([str(cell) for cell in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def measured_on(tables: Tables) -> str:
    """Return what the rows were measured on, for the last line of the text."""
    own = tables["provenance"]
    where = [own.get("gpu"), own.get("cpu"), f"{own['cpu_count']} cores, {own['threads']} thread(s)"]
    return f"{', '.join(filter(None, where))}; torch {own['torch']}, Python {own['python']}."
