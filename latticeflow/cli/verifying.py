"""Whether an ensemble still is what a run wrote: its bytes, and numbers computed again from its configurations."""

from pathlib import Path

import numpy as np
import torch

from latticeflow.cli.folder import CHAIN, TRAINING, RunFolder, ensemble_path, stored_config
from latticeflow.config import Config
from latticeflow.config.building import build_bare_action
from latticeflow.observables import measure, observables
from latticeflow.storage import (
    DataError,
    Ensemble,
    Survey,
    checkpoint_steps,
    damaged_checkpoints,
    drop_checkpoints,
    repair,
    survey,
)

SAMPLE, TOLERANCE = 16, 1e-6


def verify(run: Path) -> str:
    """Check the ensemble of a run folder, or a file, and return what is fine. Raises DataError naming what is not."""
    path = ensemble_path(run)
    found, damaged = survey(path), [note for folder in _checkpoints(path) for note in damaged_checkpoints(folder)]
    if not found.intact:
        raise DataError(_damage(path, found))
    with _opened(path) as ensemble:
        again, looked = check_sample(ensemble, stored_config(ensemble)), min(SAMPLE, _configurations(ensemble))
        lines = [
            *(f"{file}" for file in ensemble.paths),
            f"{ensemble.theory} {list(ensemble.lattice_shape)}, {ensemble.chains} chains, {ensemble.n_committed} of "
            f"{ensemble.draws} draws; all blocks and configurations have their checksums",
            *([f"computed again from {looked} configurations: {again}"] if again else []),
        ]
    if damaged:
        raise DataError("; ".join([*damaged, "the ensemble is intact"]))
    steps = sum(len(checkpoint_steps(folder)) for folder in _checkpoints(path))
    return "\n".join([*lines, *([f"{steps} checkpoints intact"] if steps else [])])


def cut(run: Path) -> str:
    """Cut the ensemble of a run folder, or a file, after its last good block, and return what was done."""
    path = ensemble_path(run)
    found = repair(path)
    if found.intact:
        return f"{path}: nothing to repair, {found.claimed} draws are intact"
    kept = found.sound == found.claimed
    done = f"all {found.sound} draws are kept" if kept else f"cut from {found.claimed} to {found.sound} draws"
    lines = [*found.problems, f"{path}: {done}"]
    if (path.parent / "config.toml").is_file():
        folder = RunFolder.open(path.parent)
        thermalisation = folder.config.chain.thermalisation_steps
        drop_checkpoints(folder.checkpoints(CHAIN), after=thermalisation + found.sound)
        start = f"from draw {folder.checkpointed_draws}" if folder.checkpointed_draws else "from its start"
        lines.append(f"what is missing is computed again, {start}, by: {folder.go_on}")
    return "\n".join(lines)


def open_checked(path: Path) -> tuple[Ensemble, Config]:
    """Open an ensemble to read, once a sample of it is computed again, and return it with its configuration.

    Raises what `Ensemble.open` and `check_sample` do.
    """
    ensemble = _opened(path)
    try:
        config = stored_config(ensemble)
        check_sample(ensemble, config)
    except BaseException:
        ensemble.close()
        raise
    return ensemble, config


def check_all(ensemble: Ensemble, config: Config, *, measured: bool = True) -> None:
    """Raise DataError naming the damaged configurations, or a number that is not that of its configuration."""
    if not ensemble.skipped and ensemble.verify():
        raise DataError(_damage(ensemble.path, survey(ensemble.path)))
    check_sample(ensemble, config, measured=measured)


def check_sample(ensemble: Ensemble, config: Config, *, measured: bool = True) -> str:
    """Compute action and standard observables of up to 16 stored configurations again; return the names.

    Without `measured` the action alone. Raises DataError, naming the configuration and both values, where one differs
    from what is stored.
    """
    action = build_bare_action(config)
    chosen = _spread(ensemble)
    if not chosen:
        return ""
    rows = [ensemble.field(action.field_name, slice(d, d + 1), chains=slice(c, c + 1))[0] for c, d in chosen]
    fields = torch.from_numpy(np.concatenate(rows))
    stored = {"action": ensemble.history("action")}
    names = set(ensemble.observable_names) if measured else set()
    known = {name: of for name, of in observables(action).items() if name in names}
    stored |= {name: ensemble.observable(name) for name in known}
    again = {"action": action(fields)} | (measure(fields, known) if known else {})
    for name, values in again.items():
        for (chain, draw), value in zip(chosen, values.numpy(), strict=True):
            if draw < stored[name].shape[1]:
                _compare(ensemble, name, (chain, draw), stored[name][chain, draw], value)
    return ", ".join(again)


def _compare(ensemble: Ensemble, name: str, place: tuple[int, int], stored: np.ndarray, again: np.ndarray) -> None:
    if not np.allclose(stored, again, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
        raise DataError(
            f"{ensemble.path}: {name} at chain {place[0]}, draw {place[1]} is {stored}, computed again {again}: "
            "the configurations are not those of this action"
        )


def _spread(ensemble: Ensemble) -> list[tuple[int, int]]:
    """Return up to 16 `(chain, draw)` spread over the ensemble."""
    total = _configurations(ensemble)
    chosen = np.linspace(0, total - 1, min(SAMPLE, total)).astype(int).tolist()
    return [divmod(number, ensemble.n_committed) for number in chosen]


def _configurations(ensemble: Ensemble) -> int:
    return ensemble.chains * ensemble.n_committed


def _opened(path: Path) -> Ensemble:
    """Open an ensemble to read; in a run folder it must be of that run."""
    if path.name == "ensemble.h5" and (path.parent / "config.toml").is_file():
        return RunFolder.open(path.parent).ensemble()
    return Ensemble.open(path)


def _checkpoints(path: Path) -> list[Path]:
    return [path.parent / "checkpoint" / stage for stage in (TRAINING, CHAIN)]


def _damage(path: Path, found: Survey) -> str:
    facts = list(found.problems)
    if found.damaged:
        facts.append(f"{path}: {len(found.damaged)} configurations are damaged: {found.places}")
    return (
        f"{'; '.join(facts)}; the first {found.sound} draws of every chain are sound: "
        f"`latticeflow verify {path} --repair` keeps those alone, --skip-damaged leaves out what is damaged"
    )
