"""The training stage, and the sampler that it leaves behind."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from latticeflow.cli.folder import TRAINING, RunFolder, UsageError
from latticeflow.cli.progress import ticker
from latticeflow.cli.stopping import finishing
from latticeflow.config import Config
from latticeflow.config.building import build_sampler, build_trainer
from latticeflow.samplers import Sampler
from latticeflow.storage import DataError, append_line, atomic_write_text
from latticeflow.training import StepRecord, Trainer, TrainingError, hopeless


def train(folder: RunFolder) -> Sampler:
    """Train the sampler, or take up its training where the newest checkpoint left it; return it trained.

    Nothing happens where no kernel of the chain uses the sampler. Steps that an earlier life took after its checkpoint
    are taken again: raises DataError when they differ from what it wrote down.
    """
    config, sampler = folder.config, build_sampler(folder.config)
    if not needs_training(config):
        return sampler
    trainer = build_trainer(config, sampler)
    checkpoint = folder.load_checkpoint(TRAINING)
    if checkpoint is not None:
        trainer.load_state_dict(checkpoint.state)
    else:
        start_from(config, trainer)
    taken = {record["step"]: record for record in _written(folder) if record["step"] > trainer.step}
    steps = config.training.steps
    if trainer.step < steps:
        _rewrite_metrics(folder, trainer)
    skipped = sum(record.skipped for record in trainer.records)
    with ticker(TRAINING, steps, done=trainer.step) as counter, finishing("step") as stop:

        def on_step(trainer: Trainer, record: StepRecord) -> None:
            nonlocal skipped
            _check_again(folder, taken.get(record.step), asdict(record))
            append_line(folder.metrics_file, json.dumps(asdict(record)))
            skipped += record.skipped
            counter.advance(1, f"loss {record.loss:.3f}  ESS {record.ess:.3f}" + f"  skipped {skipped}" * bool(skipped))
            if trainer.step % config.training.checkpoint_every == 0 or trainer.step == steps or stop.asked:
                folder.save_checkpoint(TRAINING, trainer.state_dict(), trainer.step)
                folder.status(TRAINING, trainer.step, steps)
            stop.here()

        try:
            trainer.run(on_step)
        except TrainingError as error:
            folder.save_checkpoint(TRAINING, trainer.state_dict(), trainer.step)
            stored = folder.checkpoints(TRAINING)
            raise TrainingError(f"{error}; the weights of the last good step are in {stored}") from error
    return sampler


def start_from(config: Config, trainer: Trainer) -> None:
    """Begin with the best weights of another run, where `training.start_from` names one.

    Raises UsageError where that has no finished training, DataError where its weights do not fit.
    """
    path = config.training.start_from
    if path is None:
        return
    other = RunFolder.open(Path(path))
    if not needs_training(other.config):
        raise UsageError(f"training.start_from: {path} was not trained")
    try:
        trainer.start_from(_finished_training(other)["best_weights"])
    except ValueError as error:
        raise DataError(f"training.start_from: {path}: {error}") from error


def trained_sampler(folder: RunFolder) -> Sampler:
    """Return the sampler with the best weights of a finished training. Raises UsageError where it is not finished."""
    sampler = build_sampler(folder.config)
    if needs_training(folder.config):
        sampler.load_state_dict(_finished_training(folder)["best_weights"])
    return sampler


def training_records(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the records of a finished training, none where there was nothing to train."""
    return _finished_training(folder)["records"] if needs_training(folder.config) else []


def needs_training(config: Config) -> bool:
    """Return whether there are steps of training to take for a sampler that the chain uses."""
    return config.training is not None and config.training.steps > 0 and config.chain.uses_sampler


def _finished_training(folder: RunFolder) -> dict[str, Any]:
    checkpoint, steps = folder.load_checkpoint(TRAINING), folder.config.training.steps
    done = 0 if checkpoint is None else checkpoint.step
    if done == steps and hopeless([record["skipped"] for record in checkpoint.state["records"]]):
        raise UsageError(f"{folder.path}: the training failed at its last step; start another with other settings")
    if done < steps:
        raise UsageError(
            f"{folder.path} is trained for {done} of {steps} steps; "
            "finish it with `latticeflow run --resume` or `latticeflow train --resume`"
        )
    return checkpoint.state


def _written(folder: RunFolder) -> Iterator[dict[str, Any]]:
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


def _check_again(folder: RunFolder, before: dict[str, Any] | None, again: dict[str, Any]) -> None:
    """Compare a step with what an earlier life wrote of it; all but the seconds must agree bit for bit."""
    if before is None:
        return
    names = [name for name in again if name != "seconds" and repr(again[name]) != repr(before.get(name))]
    if names:
        raise DataError(
            f"{folder.metrics_file}: step {again['step']} computed again differs in {', '.join(names)}; "
            f"{folder.same_machine()}"
        )


def _rewrite_metrics(folder: RunFolder, trainer: Trainer) -> None:
    """Leave in the metrics only the steps that the checkpoint has."""
    lines = [json.dumps(asdict(record)) + "\n" for record in trainer.records]
    if lines:
        atomic_write_text(folder.metrics_file, "".join(lines))
    else:
        folder.metrics_file.unlink(missing_ok=True)
