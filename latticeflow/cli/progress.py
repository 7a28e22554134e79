"""Progress: a bar on standard error when that is a terminal, one line now and then when it is not."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class Ticker:
    """Counts what a stage has done; `note` is the running figure to show, such as the ESS."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.done = name, total, 0
        self.started = self.last_line = time.perf_counter()
        self.bar: Progress | None = None

    def advance(self, steps: int, note: str) -> None:
        """Say that `steps` more are done."""
        self.done += steps
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.done, note=f"{self.rate:.3g}/s  {note}")
        elif time.perf_counter() - self.last_line > SECONDS_BETWEEN_LINES or self.done == self.total:
            self.last_line = time.perf_counter()
            elapsed = self.last_line - self.started
            print(f"{self.name} {self.done}/{self.total}  {elapsed:.0f} s  {note}", file=sys.stderr, flush=True)

    @property
    def rate(self) -> float:
        return self.done / max(time.perf_counter() - self.started, 1e-9)


@contextmanager
def ticker(name: str, total: int, *, done: int = 0) -> Iterator[Ticker]:
    """Show the progress of a stage of `total` steps, of which `done` were done before."""
    counter = Ticker(name, total)
    counter.done = done
    if not sys.stderr.isatty():
        yield counter
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as counter.bar:
        counter.bar.add_task(name, total=total, completed=done, note="")
        yield counter
