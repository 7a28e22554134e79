"""The training stage, and the sampler that it leaves behind."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from latticeflow.cli import metrics
from latticeflow.cli.fitting import fit_clusters, fit_records, fitted_pieces
from latticeflow.cli.folder import TRAINING, RunFolder, UsageError
from latticeflow.cli.parts import learner
from latticeflow.cli.processes import TRAIN, Helpers, helpers, is_pipeline
from latticeflow.cli.progress import ticker
from latticeflow.cli.stopping import finishing
from latticeflow.config import Config
from latticeflow.config.building import build_sampler, build_trainer
from latticeflow.config.clusters import build_pieces
from latticeflow.flows import weights_for
from latticeflow.samplers import Sampler
from latticeflow.storage import DataError
from latticeflow.training import (
    StepRecord,
    Team,
    Trainer,
    TrainingError,
    hopeless,
    run_data_parallel,
    run_pipeline,
)

PROCESSES = "processes"
OnStep = Callable[[Trainer, StepRecord], None]


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
    trainer, others, steps = build_trainer(config, sampler), helpers(), config.training.steps
    checkpoint = folder.load_checkpoint(TRAINING)
    if checkpoint is not None:
        trainer.load_state_dict(checkpoint.state)
    else:
        start_from(config, trainer)
    taken = {record["step"]: record for record in metrics.written(folder) if record["step"] > trainer.step}
    before = 1 if checkpoint is None else checkpoint.state.get(PROCESSES, 1)
    sharing = _sharing(config, others)

    def save() -> None:
        noted = {PROCESSES: sharing} if sharing > 1 else {}
        folder.save_checkpoint(TRAINING, trainer.state_dict() | noted, trainer.step)

    if trainer.step < steps:
        metrics.rewrite(folder, map(asdict, trainer.records))
        if before != sharing:  # whose sums are rounded in another way
            taken = {}
            save()
    team = others.ask(TRAIN, config) if others is not None and trainer.step < steps else None
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
            stop.asked = stop.asked or (team is not None and team.stop_wanted)
            if trainer.step % config.training.checkpoint_every == 0 or trainer.step == steps or stop.asked:
                save()
                elsewhere, trainer.cpu_elsewhere = trainer.cpu_elsewhere, 0.0
                folder.status(TRAINING, trainer.step, steps, elsewhere=elsewhere)
            stop.here()

        try:
            if team is None:
                trainer.run(on_step)
            elif is_pipeline(config):
                _lead_pipeline(others, trainer, on_step, sync_every=config.training.checkpoint_every)
            else:
                run_data_parallel(trainer, team, on_step)
        except TrainingError as error:
            save()
            stored = folder.checkpoints(TRAINING)
            raise TrainingError(f"{error}; the weights of the last good step are in {stored}") from error
    return sampler


def help_train(config: Config, team: Team) -> None:
    """Take part in the training that the first process leads."""
    trainer = build_trainer(config, build_sampler(config))
    if is_pipeline(config):
        run_pipeline(trainer, sync_every=config.training.checkpoint_every)
    else:
        run_data_parallel(trainer, team)


def _sharing(config: Config, others: Helpers | None) -> int:
    """Return how many processes share a batch, on which the rounding of sums depends."""
    return 1 if others is None or is_pipeline(config) else others.exchange.processes


def _lead_pipeline(others: Helpers, trainer: Trainer, on_step: OnStep, *, sync_every: int) -> None:
    """Train the parts with the others, who then wait until the last steps, end to end, are done here."""
    team = others.team

    def watched(trainer: Trainer, record: StepRecord) -> None:
        team.waiting = True  # also where this fails: they are told, and leave the pipeline
        on_step(trainer, record)
        team.waiting = record.step >= trainer.schedule.local_steps
        if record.step > trainer.schedule.local_steps:
            others.keep()

    try:
        run_pipeline(trainer, watched, sync_every=sync_every)
    except TrainingError:
        team.waiting = True
        raise
    team.waiting = True


def start_from(config: Config, trainer: Trainer) -> None:
    """Begin with the best weights of another run, where `training.start_from` names one.

    Raises UsageError where that has no finished training, DataError where its weights do not fit.
    """
    path = config.training.start_from
    if path is None:
        return
    other = RunFolder.open(Path(path))
    here = other.config.run.model_copy(update={"device": config.run.device})  # where it was trained may not be here
    other.config = other.config.model_copy(update={"run": here})
    if not needs_training(other.config):
        raise UsageError(f"training.start_from: {path} was not trained")
    if other.config.clustered:
        raise UsageError(f"training.start_from: {path} has flows for its own clusters, which no other sampler can take")
    try:
        trainer.start_from(_weights_for(config, other))
    except ValueError as error:
        raise DataError(f"training.start_from: {path}: {error}") from error


def _weights_for(config: Config, other: RunFolder) -> dict[str, Any]:
    """Return the best weights of a run, for another lattice those of the nearest images of mask cells."""
    weights = _finished_training(other)["best_weights"]
    if config.lattice.shape == other.config.lattice.shape:
        return weights
    sampler = build_sampler(other.config)
    sampler.load_state_dict(weights)
    return weights_for(build_sampler(config), sampler)


def trained_sampler(folder: RunFolder) -> Sampler:
    """Return the sampler with the best weights of a finished training, or without one, in evaluation mode.

    Raises UsageError where the training is not finished.
    """
    return restored_sampler(folder.config, sampler_state(folder))


def sampler_state(folder: RunFolder) -> dict[str, Any]:
    """Return what the sampler of a finished training is made from again; raises as `trained_sampler`."""
    if not needs_training(folder.config):
        return {}
    return fitted_pieces(folder) if folder.config.clustered else _finished_training(folder)["best_weights"]


def restored_sampler(config: Config, state: dict[str, Any]) -> Sampler:
    """Return the sampler of such a state, in evaluation mode."""
    if not needs_training(config):
        return build_sampler(config).eval()
    if config.clustered:
        return build_pieces(config, **state).eval()
    sampler = build_sampler(config)
    sampler.load_state_dict(state)
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
