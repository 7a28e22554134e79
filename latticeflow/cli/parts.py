"""What a run says of a flow that is trained by parts."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from latticeflow.config import Config
from latticeflow.storage import Ensemble

COLUMN, OF_PART = "part", "ess_of_part_{}"


@dataclass(frozen=True)
class Learning:
    """What `layers` layers learned: their steps, and the last running ESS/N, None where it was not looked at."""

    layers: int
    steps: int
    ess: float | None


@dataclass(frozen=True)
class PartsReport:
    """The parts of a flow, the first next to the prior: each by itself, then the whole end to end."""

    schedule: str
    parts: list[Learning]
    end_to_end: Learning


def stored_parts(config: Config, ensemble: Ensemble) -> PartsReport | None:
    """Return what an ensemble says of the parts of its sampler, None where it was not trained by parts."""
    training, settings = ensemble.training(), config.training
    if COLUMN not in training or settings is None or settings.parts is None:
        return None
    number = training[COLUMN]

    def learning(k: int, layers: int) -> Learning:
        together = training.get(OF_PART.format(k))
        own = training["ess"][number == k] if together is None else together[number > 0]
        return Learning(layers, own.size, float(own[-1]) if own.size else None)

    parts = [learning(k, layers) for k, layers in enumerate(settings.parts, 1)]
    return PartsReport(settings.schedule, parts, learning(0, sum(settings.parts)))


def part_columns(records: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Return the running ESS/N of each part by name, where all learned at once, NaN in steps where none did."""
    count = max((len(record.get("part_ess", ())) for record in records), default=0)
    rows = [record["part_ess"] or [math.nan] * count for record in records] if count else []
    return {OF_PART.format(k): np.array(column) for k, column in enumerate(zip(*rows, strict=True), 1)}


def part_lines(report: PartsReport) -> list[list[str]]:
    """Return a table of the parts and of the end, its header first."""
    named = [*((str(k), part) for k, part in enumerate(report.parts, 1)), ("end to end", report.end_to_end)]
    rows = [[name, str(own.layers), str(own.steps), _ess(own.ess)] for name, own in named]
    return [["part", "layers", "steps", "running ESS/N"], *rows]


def learner(config: Config, part: int) -> str:
    """Return who learned in a step that is recorded as one of a part, with two blanks; nothing without parts."""
    if config.training.parts is None:
        return ""
    if part == 0:
        return "end to end  "
    return "all parts  " if config.training.schedule == "simultaneous" else f"part {part}  "


def _ess(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
