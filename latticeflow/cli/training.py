"""The training stage, and the sampler that it leaves behind."""

import json
from dataclasses import asdict

from latticeflow.cli.folder import RunFolder, UsageError
from latticeflow.cli.progress import ticker
from latticeflow.config import Config
from latticeflow.config.building import build_sampler, build_trainer
from latticeflow.samplers import FlowSampler
from latticeflow.storage import load_checkpoint, save_checkpoint
from latticeflow.training import StepRecord, Trainer


def train(folder: RunFolder) -> FlowSampler:
    """Train the sampler, or take up its training where the newest checkpoint left it; return it trained.

    Nothing happens where no kernel of the chain uses the sampler.
    """
    config, sampler = folder.config, build_sampler(folder.config)
    if not needs_training(config):
        return sampler
    trainer = build_trainer(config, sampler)
    stored = folder.checkpoints("training")
    if stored.exists():
        trainer.load_state_dict(load_checkpoint(stored, map_location=config.run.device).state)
    _rewrite_metrics(folder, trainer)
    with ticker("training", config.training.steps, done=trainer.step) as counter, open(folder.metrics_file, "a") as log:

        def on_step(trainer: Trainer, record: StepRecord) -> None:
            log.write(json.dumps(asdict(record)) + "\n")
            counter.advance(1, f"loss {record.loss:.3f}  ESS {record.ess:.3f}")
            if trainer.step % config.training.checkpoint_every == 0 or trainer.step == config.training.steps:
                log.flush()
                save_checkpoint(stored, trainer.state_dict(), trainer.step)
                folder.status("training", trainer.step, config.training.steps)

        trainer.run(on_step)
    return sampler


def trained_sampler(folder: RunFolder) -> FlowSampler:
    """Return the sampler with the best weights of a finished training. Raises UsageError where it is not finished."""
    sampler = build_sampler(folder.config)
    if not needs_training(folder.config):
        return sampler
    training = folder.config.training
    stored = folder.checkpoints("training")
    state = load_checkpoint(stored, map_location=folder.config.run.device).state if stored.exists() else {"step": 0}
    if state["step"] < training.steps:
        raise UsageError(
            f"{folder.path} is trained for {state['step']} of {training.steps} steps; "
            "finish it with `latticeflow run --resume` or `latticeflow train --resume`"
        )
    sampler.load_state_dict(state["best_weights"])
    return sampler


def needs_training(config: Config) -> bool:
    """Return whether there are steps of training to take for a sampler that the chain uses."""
    return config.training is not None and config.training.steps > 0 and config.chain.uses_sampler


def _rewrite_metrics(folder: RunFolder, trainer: Trainer) -> None:
    """Leave in the metrics only the steps that the checkpoint has."""
    folder.metrics_file.write_text("".join(json.dumps(asdict(record)) + "\n" for record in trainer.records))
