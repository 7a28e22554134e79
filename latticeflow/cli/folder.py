"""A run's folder: its files, its lock, and what it takes to open one that is there already."""

import json
import time
from pathlib import Path

from latticeflow.config import Config, ConfigError, load_config
from latticeflow.config.problems import Problem
from latticeflow.storage import Ensemble, RunLock, atomic_write_text, provenance

RUN_CONTROL = ("run.threads", "run.device", "analysis")
"""Keys and sections that may change between a run and its continuation."""


class UsageError(Exception):
    """The command was used in a way that it does not allow; the message says what to do."""


class RunFolder:
    """The files of one run.

    config.toml (resolved), provenance.json, run.lock, status.json, ensemble.h5, checkpoint/, metrics.jsonl, figures/.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self.config = config
        self._clock = time.process_time()

    @classmethod
    def create(cls, path: Path, config: Config, *, resume: bool) -> "RunFolder":
        """Make the folder, or go back into it with `resume`.

        Raises UsageError for a folder that exists, without `resume`; ConfigError, naming the keys, for one that was
        made from another configuration.
        """
        folder = cls(path, config)
        if path.exists() and any(path.iterdir() if path.is_dir() else [path]):
            folder._check_resumable(resume)
        path.mkdir(parents=True, exist_ok=True)
        if not folder.config_file.exists():
            atomic_write_text(path / "provenance.json", json.dumps(provenance(), indent=2) + "\n")
            folder.keep_config()
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Open the folder of an earlier run. Raises UsageError where there is none."""
        if not (path / "config.toml").is_file():
            raise UsageError(f"{path} is not a run folder: it has no config.toml (`latticeflow run` makes one)")
        return cls(path, load_config(path / "config.toml"))

    def keep_config(self) -> None:
        """Make the configuration at hand the stored one, which `create` has found to differ in RUN_CONTROL at most."""
        atomic_write_text(self.config_file, self.config.to_toml())

    @property
    def config_file(self) -> Path:
        return self.path / "config.toml"

    @property
    def ensemble_file(self) -> Path:
        return self.path / "ensemble.h5"

    @property
    def status_file(self) -> Path:
        return self.path / "status.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    def checkpoints(self, stage: str) -> Path:
        """Return the folder of the checkpoints of a stage, "training" or "chain"."""
        return self.path / "checkpoint" / stage

    def figure(self, name: str) -> Path:
        """Return the path of a figure, its folder made."""
        folder = self.path / "figures"
        folder.mkdir(exist_ok=True)
        return folder / f"{name}.png"

    def lock(self) -> RunLock:
        """Return the lock that a writer holds."""
        return RunLock(self.path / "run.lock")

    def ensemble(self, mode: str = "r") -> Ensemble:
        """Open the ensemble. Raises UsageError where nothing was sampled, DataError for a damaged or foreign file."""
        if not self.ensemble_file.exists():
            raise UsageError(f"{self.path} has no ensemble yet; run `latticeflow sample {self.path}` first")
        return Ensemble.open(
            self.ensemble_file, mode, theory=self.config.action.kind, lattice_shape=self.config.lattice.shape
        )

    @property
    def cpu_seconds(self) -> dict[str, float]:
        """Return the CPU seconds that each stage has taken, up to its last `status`; all threads, all resumptions."""
        if not self.status_file.exists():
            return {}
        return json.loads(self.status_file.read_text()).get("cpu_seconds", {})

    def status(self, stage: str, done: int, total: int) -> None:
        """Replace status.json: the stage, how far it is, and the CPU seconds of all stages.

        What was spent since the last call counts for this stage.
        """
        now, spent = time.process_time(), self.cpu_seconds
        spent[stage] = spent.get(stage, 0.0) + now - self._clock
        self._clock = now
        text = json.dumps({"stage": stage, "done": done, "total": total, "cpu_seconds": spent})
        atomic_write_text(self.status_file, text + "\n")

    def _check_resumable(self, resume: bool) -> None:
        if not resume:
            raise UsageError(f"{self.path} exists; go on with it by --resume, or choose another folder by --out")
        if not self.config_file.is_file():
            raise UsageError(f"{self.path} exists and is not a run folder (no config.toml); choose another by --out")
        before = load_config(self.config_file)
        changed = [key for key in self.config.differences(before) if not _may_change(key)]
        if changed:
            problems = [Problem(key, f"{_value(before, key)} as before", _value(self.config, key)) for key in changed]
            raise ConfigError(problems, f"{self.path} was made with another configuration")


def ensemble_path(path: Path) -> Path:
    """Return the ensemble file of a run folder, or the file itself. Raises UsageError where there is none."""
    found = path / "ensemble.h5" if path.is_dir() else path
    if not found.is_file():
        raise UsageError(f"{path} is neither a run folder with an ensemble nor an ensemble file")
    return found


def _may_change(key: str) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in RUN_CONTROL)


def _value(config: Config, key: str) -> str:
    found: object = config
    for part in key.split("."):
        found = getattr(found, part, None)
    return "nothing" if found is None else repr(found)
