"""The training stage, and the sampler that it leaves behind."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from latticeflow.cli import metrics
from latticeflow.cli.fitting import fit_clusters, fit_records, fitted_sampler
from latticeflow.cli.folder import TRAINING, RunFolder, UsageError
from latticeflow.cli.parts import learner
from latticeflow.cli.processes import processes
from latticeflow.cli.progress import ticker
from latticeflow.cli.stopping import finishing
from latticeflow.config import Config
from latticeflow.config.building import build_sampler, build_trainer
from latticeflow.samplers import Sampler
from latticeflow.storage import DataError
from latticeflow.training import StepRecord, Trainer, TrainingError, hopeless, run_pipeline


def train(folder: RunFolder) -> Sampler:
    """Train the sampler, or take up its training where the newest checkpoint left it; return it trained.

    Nothing happens where no kernel of the chain uses the sampler. Steps that an earlier life took after its checkpoint
    are taken again: raises DataError when they differ from what it wrote down.
    """
    config, sampler = folder.config, build_sampler(folder.config)
    if not needs_training(config):
        return sampler
    if config.clustered:
        return fit_clusters(folder)
    trainer = build_trainer(config, sampler)
    checkpoint = folder.load_checkpoint(TRAINING)
    if checkpoint is not None:
        trainer.load_state_dict(checkpoint.state)
    else:
        start_from(config, trainer)
    taken = {record["step"]: record for record in metrics.written(folder) if record["step"] > trainer.step}
    steps = config.training.steps
    if trainer.step < steps:
        metrics.rewrite(folder, map(asdict, trainer.records))
    skipped = sum(record.skipped for record in trainer.records)
    with ticker(TRAINING, steps, done=trainer.step) as counter, finishing("step") as stop:

        def on_step(trainer: Trainer, record: StepRecord) -> None:
            nonlocal skipped
            metrics.check_again(folder, taken.get(record.step), asdict(record))
            metrics.append(folder, asdict(record))
            skipped += record.skipped
            note = f"{learner(config, record.part)}loss {record.loss:.3f}  ESS {record.ess:.3f}"
            counter.advance(1, note + f"  skipped {skipped}" * bool(skipped))
            if record.step < trainer.step:
                return  # one of several that came from other processes at once
            if trainer.step % config.training.checkpoint_every == 0 or trainer.step == steps or stop.asked:
                folder.save_checkpoint(TRAINING, trainer.state_dict(), trainer.step)
                elsewhere, trainer.cpu_elsewhere = trainer.cpu_elsewhere, 0.0
                folder.status(TRAINING, trainer.step, steps, elsewhere=elsewhere)
            stop.here()

        try:
            if processes() > 1:
                run_pipeline(trainer, on_step, sync_every=config.training.checkpoint_every)
            else:
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
    if other.config.clustered:
        raise UsageError(f"training.start_from: {path} has flows for its own clusters, which no other sampler can take")
    try:
        trainer.start_from(_finished_training(other)["best_weights"])
    except ValueError as error:
        raise DataError(f"training.start_from: {path}: {error}") from error


def trained_sampler(folder: RunFolder) -> Sampler:
    """Return the sampler with the best weights of a finished training, or without one, in evaluation mode.

    Raises UsageError where the training is not finished.
    """
    if folder.config.clustered and needs_training(folder.config):
        return fitted_sampler(folder).eval()
    sampler = build_sampler(folder.config)
    if needs_training(folder.config):
        sampler.load_state_dict(_finished_training(folder)["best_weights"])
    return sampler.eval()


def training_records(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the records of a finished training, none where there was nothing to train."""
    if not needs_training(folder.config):
        return []
    return fit_records(folder) if folder.config.clustered else _finished_training(folder)["records"]


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
