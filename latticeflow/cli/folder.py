"""A run's folder: its files, its lock, and what it takes to open one that is there already."""

import hashlib
import json
import shlex
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from latticeflow.config import Config, ConfigError, load_config
from latticeflow.config.building import build_bare_action
from latticeflow.config.loading import parse_config
from latticeflow.config.problems import Problem
from latticeflow.storage import (
    Checkpoint,
    DataError,
    Ensemble,
    RunLock,
    atomic_write_text,
    checkpoint_steps,
    load_checkpoint,
    provenance,
    save_checkpoint,
)

TRAINING, CHAIN = "training", "chain"
"""The stages that have checkpoints."""
RUN_CONTROL = ("run.threads", "run.device", "training.processes", "chain.draws", "analysis")
"""Keys and sections that may change between a run and its continuation; the number of draws may only grow."""
AT_BIRTH = ("run.lock", "provenance.json", "provenance.json.partial", "config.toml.partial")
"""What a folder may hold before it has a configuration."""


class UsageError(Exception):
    """The command was used in a way that it does not allow; the message says what to do."""


class RunFolder:
    """The files of one run.

    config.toml (resolved), provenance.json, run.lock, status.json, ensemble.h5, checkpoint/, metrics.jsonl, figures/.
    `draws` is what every chain is to have at least: `chain.draws` and those that it is extended by.
    """

    def __init__(self, path: Path, config: Config, *, extend: int = 0) -> None:
        self.path = path
        self.config = config
        self.draws = config.chain.draws + extend
        self._clock = time.process_time()

    @classmethod
    def create(cls, path: Path, config: Config, *, resume: bool, extend: int = 0) -> "RunFolder":
        """Make the folder, or go back into it with `resume`.

        Raises UsageError for a folder that exists, without `resume`; ConfigError, naming the keys, for one that was
        made from another configuration.
        """
        folder = cls(path, config, extend=extend)
        if path.exists() and any(child.name not in AT_BIRTH for child in (path.iterdir() if path.is_dir() else [path])):
            folder._check_resumable(resume)
        path.mkdir(parents=True, exist_ok=True)
        return folder

    @classmethod
    def open(cls, path: Path, *, extend: int = 0) -> "RunFolder":
        """Open the folder of an earlier run. Raises UsageError where there is none."""
        if not (path / "config.toml").is_file():
            raise UsageError(f"{path} is not a run folder: it has no config.toml (`latticeflow run` makes one)")
        return cls(path, load_config(path / "config.toml"), extend=extend)

    def begin(self) -> None:
        """Note where the numbers of this life come from, then make the configuration at hand the stored one.

        `create` has found it to differ in RUN_CONTROL at most.
        """
        described, earlier = provenance(), _json(self.provenance_file) if self.config_file.exists() else {}
        if earlier:
            resumed = earlier.get("resumed")
            described = earlier | {"resumed": [*(resumed if isinstance(resumed, list) else []), described]}
        atomic_write_text(self.provenance_file, json.dumps(described, indent=2) + "\n")
        atomic_write_text(self.config_file, self.config.to_toml())

    @property
    def config_file(self) -> Path:
        return self.path / "config.toml"

    @property
    def provenance_file(self) -> Path:
        return self.path / "provenance.json"

    @property
    def ensemble_file(self) -> Path:
        return self.path / "ensemble.h5"

    @property
    def status_file(self) -> Path:
        return self.path / "status.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def lock_file(self) -> Path:
        return self.path / "run.lock"

    def checkpoints(self, stage: str) -> Path:
        """Return the folder of the checkpoints of a stage."""
        return self.path / "checkpoint" / stage

    def figure(self, name: str) -> Path:
        """Return the path of a figure, its folder made."""
        folder = self.path / "figures"
        folder.mkdir(exist_ok=True)
        return folder / f"{name}.png"

    def lock(self) -> RunLock:
        """Return the lock that a writer holds."""
        return RunLock(self.lock_file)

    @property
    def identity(self) -> str:
        """The sha256 of all keys that may not change between a run and its continuation."""
        fixed = {key: value for key, value in _leaves(self.config.model_dump()) if not _may_change(key)}
        return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()

    def save_checkpoint(self, stage: str, state: dict[str, Any], step: int) -> None:
        """Store the state of a stage, marked as one of this run."""
        save_checkpoint(self.checkpoints(stage), state | {"run": self.identity}, step)

    def load_checkpoint(self, stage: str, *, before: int | None = None) -> Checkpoint | None:
        """Return the newest valid checkpoint of a stage, None where there is none; damaged ones are reported.

        Raises DataError where none is valid, and for one of another run.
        """
        stored = self.checkpoints(stage)
        try:
            checkpoint = load_checkpoint(stored, map_location=self.config.run.device, before=before)
        except FileNotFoundError:
            return None
        except DataError as error:
            raise DataError(f"{error}; remove {stored} to compute all of it again from its start") from error
        for note in checkpoint.notes:
            print(f"note: {note}", file=sys.stderr)
        if checkpoint.state.get("run") != self.identity:
            raise DataError(f"{stored}: the checkpoint of step {checkpoint.step} is of another run or version")
        return checkpoint

    def ensemble(self, mode: str = "r", *, skip_damaged: bool = False) -> Ensemble:
        """Open the ensemble.

        Raises UsageError where nothing was sampled, DataError for a file that is damaged or not of this run.
        """
        if not self.ensemble_file.exists():
            raise UsageError(f"{self.path} has no ensemble yet; run `latticeflow sample {self.path}` first")
        action, shape = build_bare_action(self.config), self.config.lattice.shape
        expected = {action.field_name: (action.field_shape(shape), np.float64)}
        checkpointed = self.checkpointed_draws  # before the draws are counted: a run may be adding to both
        ensemble = Ensemble.open(
            self.ensemble_file,
            mode,
            theory=action.theory,
            lattice_shape=shape,
            fields=expected,
            skip_damaged=skip_damaged,
        )
        try:
            self._check_origin(ensemble)
            self.check_complete(ensemble.n_committed + ensemble.skipped, checkpointed)
        except BaseException:
            ensemble.close()
            raise
        return ensemble

    @property
    def checkpointed_draws(self) -> int:
        """The draws behind the newest checkpoint of the chain, 0 where there is none."""
        steps = checkpoint_steps(self.checkpoints(CHAIN))
        return max(0, steps[-1] - self.config.chain.thermalisation_steps) if steps else 0

    def check_complete(self, draws: int, checkpointed: int) -> None:
        """Raise DataError where the checkpoints are ahead of the draws that an ensemble has."""
        if checkpointed > draws:
            raise DataError(
                f"{self.ensemble_file} has {draws} draws, its checkpoint {checkpointed}: a file was lost, replaced or "
                f"cut; put it back, or remove {self.checkpoints(CHAIN)} to compute the chain again from its start"
            )

    def same_machine(self) -> str:
        """Return what to say when numbers computed again differ."""
        before = _json(self.provenance_file)
        used = ", ".join(f"{name} {before[name]}" for name in ("torch", "threads", "platform") if name in before)
        return f"resume with the same machine type, device, threads and torch version (before: {used or 'unknown'})"

    @property
    def stored_status(self) -> dict[str, Any]:
        """What status.json says, nothing where it is not there or damaged: no result depends on it."""
        return _json(self.status_file)

    @property
    def cpu_seconds(self) -> dict[str, float]:
        """Return the CPU seconds that each stage has taken, up to its last `status`; all threads, all resumptions."""
        spent = self.stored_status.get("cpu_seconds")
        sound = isinstance(spent, dict) and all(isinstance(seconds, int | float) for seconds in spent.values())
        return spent if sound else {}

    def status(self, stage: str, done: int, total: int, *, elsewhere: float = 0.0) -> None:
        """Replace status.json: the stage, how far it is, when that was, and the CPU seconds of all stages.

        What was spent since the last call counts for this stage, and what was spent `elsewhere`, by other processes.
        """
        now, spent = time.process_time(), self.cpu_seconds
        spent[stage] = spent.get(stage, 0.0) + now - self._clock + elsewhere
        self._clock = now
        updated = datetime.now(UTC).isoformat(timespec="seconds")
        status = {"stage": stage, "done": done, "total": total, "updated": updated, "cpu_seconds": spent}
        atomic_write_text(self.status_file, json.dumps(status) + "\n")

    @property
    def go_on(self) -> str:
        """Return the command that goes on with this run."""
        return shlex.join(["latticeflow", "run", str(self.config_file), "--out", str(self.path), "--resume"])

    def _check_resumable(self, resume: bool) -> None:
        if not resume:
            raise UsageError(f"{self.path} exists; go on with it by --resume, or choose another folder by --out")
        if not self.config_file.is_file():
            raise UsageError(f"{self.path} exists and is not a run folder (no config.toml); choose another by --out")
        before = load_config(self.config_file)
        changed = [key for key in self.config.differences(before) if not _may_change(key)]
        problems = [Problem(key, f"{_value(before, key)} as before", _value(self.config, key)) for key in changed]
        if self.config.chain.draws < before.chain.draws:
            least = f"at least {before.chain.draws} as before"
            problems.append(Problem("chain.draws", least, str(self.config.chain.draws)))
        if problems:
            raise ConfigError(problems, f"{self.path} was made with another configuration")

    def _check_origin(self, ensemble: Ensemble) -> None:
        """Raise DataError, naming the keys and both values, for an ensemble that this configuration did not make."""
        made_by = stored_config(ensemble)
        changed = [key for key in self.config.differences(made_by) if not _may_change(key)]
        if changed:
            values = (f"{key} is {_value(made_by, key)}, expected {_value(self.config, key)}" for key in changed)
            raise DataError(f"{ensemble.path} is of another run: {'; '.join(values)}")


def ensemble_path(path: Path) -> Path:
    """Return the ensemble file of a run folder, or the file itself. Raises UsageError where there is none."""
    found = path / "ensemble.h5" if path.is_dir() else path
    if not found.is_file():
        raise UsageError(f"{path} is neither a run folder with an ensemble nor an ensemble file")
    return found


def stored_config(ensemble: Ensemble) -> Config:
    """Return the configuration that an ensemble was made from; raises DataError where it is of another version."""
    try:
        return parse_config(ensemble.config, source=str(ensemble.path))
    except ConfigError as error:
        raise DataError(f"{ensemble.path}: its configuration is not of this version: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    """Return the table in a JSON file, an empty one where it is missing or damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _leaves(table: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key of nested tables by its dotted path."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _may_change(key: str) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in RUN_CONTROL)


def _value(config: Config, key: str) -> str:
    found: object = config
    for part in key.split("."):
        found = getattr(found, part, None)
    return "nothing" if found is None else repr(found)
