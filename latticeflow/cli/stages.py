"""The stages of a run: train, sample, measure. Each finds in the folder what the one before left there."""

import json
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from latticeflow.actions import Action
from latticeflow.cli.folder import RunFolder, UsageError
from latticeflow.cli.progress import ticker
from latticeflow.config import Config
from latticeflow.config.building import build_action, build_bare_action, build_kernel, build_sampler, build_trainer
from latticeflow.mcmc import ChainState, IndependenceMetropolis, StepInfo
from latticeflow.observables import measure, observables
from latticeflow.priors import QuenchedU1
from latticeflow.samplers import FlowSampler, quenched_baseline, tune_quenched
from latticeflow.stats import ess
from latticeflow.storage import DataError, Ensemble, load_checkpoint, save_checkpoint
from latticeflow.streams import stream
from latticeflow.training import StepRecord, Trainer

HISTORY = {"action": np.float64, "log_q": np.float64, "log_weight": np.float64, "accepted": np.bool_}
MAX_BAD_FRACTION = 0.01


class SamplingError(RuntimeError):
    """Sampling cannot go on, for the reason in the message."""


def train(folder: RunFolder) -> FlowSampler:
    """Train the sampler, or take up its training where the newest checkpoint left it; return it trained."""
    config, sampler = folder.config, build_sampler(folder.config)
    if config.training is None or config.training.steps == 0:
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
    training = folder.config.training
    if training is None or training.steps == 0:
        return sampler
    stored = folder.checkpoints("training")
    state = load_checkpoint(stored, map_location=folder.config.run.device).state if stored.exists() else {"step": 0}
    if state["step"] < training.steps:
        raise UsageError(
            f"{folder.path} is trained for {state['step']} of {training.steps} steps; "
            "finish it with `latticeflow run --resume` or `latticeflow train --resume`"
        )
    sampler.load_state_dict(state["best_weights"])
    return sampler


def sample(folder: RunFolder) -> None:
    """Run the chains to their end, block by block, each committed before the next begins."""
    config = folder.config
    kernel = build_kernel(config, trained_sampler(folder))
    if not folder.ensemble_file.exists():
        _create_ensemble(folder, kernel.action)
    with folder.ensemble("a") as ensemble:
        state, done = _chain_start(folder, kernel, ensemble)
        with ticker("sampling", ensemble.draws, done=done) as counter:
            while done < ensemble.draws:
                size = min(ensemble.block, ensemble.draws - done)
                state, rows = run_block(
                    kernel, state, size, stream(config.run.seed, "chain", done, device=config.run.device)
                )
                if done < ensemble.n_committed:
                    _check_replay(ensemble, rows, done)
                else:
                    ensemble.append(**rows)
                done += size
                save_checkpoint(folder.checkpoints("chain"), {"state": vars(state)}, done)
                folder.status("sampling", done, ensemble.draws)
                log_weights = ensemble.proposals("log_weight")
                note = f"acceptance {ensemble.history('accepted').mean():.3f}  ESS {ess(log_weights):.3f}"
                counter.advance(size, note)
        _write_training(folder, ensemble)
        if config.baseline is not None and "baseline_log_weight" not in ensemble.proposal_names:
            _write_baseline(folder, ensemble)


def run_block(
    kernel: IndependenceMetropolis, state: ChainState, draws: int, generator: torch.Generator
) -> tuple[ChainState, dict[str, dict[str, np.ndarray]]]:
    """Take `draws` steps; return the state and the rows `(chain, draws, ...)` in the form that an ensemble appends.

    Raises SamplingError when more than 1% of the proposals have a non-finite weight.
    """
    steps: list[tuple[ChainState, StepInfo]] = []
    for _ in range(draws):
        state, info = kernel.step(state, generator)
        steps.append((state, info))
    bad, total = sum(info.bad for _, info in steps), draws * len(state.field)
    if bad > MAX_BAD_FRACTION * total:
        raise SamplingError(
            f"{bad} of {total} proposals had a non-finite action or log q (limit {MAX_BAD_FRACTION:.0%})"
        )
    history = {name: _rows([getattr(s, name) for s, _ in steps]) for name in ("action", "log_q", "log_weight")}
    return state, {
        "fields": {kernel.action.field_name: _rows([s.field for s, _ in steps])},
        "history": history | {"accepted": _rows([info.accepted for _, info in steps])},
        "proposals": {"log_weight": _rows([info.proposal_log_weight for _, info in steps])},
    }


def measure_ensemble(folder: RunFolder) -> None:
    """Evaluate the observables on every committed configuration and store them, `(chain, draw)`."""
    action = build_bare_action(folder.config)
    wanted = observables(action, folder.config.analysis.observables)
    with folder.ensemble("a") as ensemble, ticker("measuring", ensemble.n_committed) as counter:
        parts: list[dict[str, Tensor]] = []
        for _, block in ensemble.iter_blocks(action.field_name):
            chains, draws = block.shape[:2]
            fields = torch.from_numpy(block).flatten(0, 1).to(folder.config.run.device)
            values = measure(fields, wanted)
            parts.append({name: value.reshape(chains, draws) for name, value in values.items()})
            counter.advance(draws, "")
        for name in wanted:
            ensemble.write_observable(name, torch.cat([part[name] for part in parts], dim=1).cpu().numpy())


def _rows(tensors: list[Tensor]) -> np.ndarray:
    return torch.stack(tensors, dim=1).cpu().numpy()


def _create_ensemble(folder: RunFolder, action: Action) -> None:
    config: Config = folder.config
    Ensemble.create(
        folder.ensemble_file,
        theory=action.theory,
        lattice_shape=config.lattice.shape,
        config=config.to_toml(),
        fields={action.field_name: (action.field_shape(config.lattice.shape), np.float64)},
        history=HISTORY,
        proposals={"log_weight": 1},
        chains=config.chain.replica,
        draws=config.chain.draws,
        block=config.chain.block,
    ).close()


def _chain_start(folder: RunFolder, kernel: IndependenceMetropolis, ensemble: Ensemble) -> tuple[ChainState, int]:
    """Return the state to go on from and the draws it has behind it, at most a block less than are committed."""
    stored, config = folder.checkpoints("chain"), folder.config
    if stored.exists():
        checkpoint = load_checkpoint(stored, map_location=config.run.device)
        if checkpoint.step > ensemble.n_committed:
            raise DataError(
                f"{folder.ensemble_file} has {ensemble.n_committed} draws, its checkpoint {checkpoint.step}: "
                "the file was replaced or cut"
            )
        return ChainState(**checkpoint.state["state"]), checkpoint.step
    try:
        return kernel.start(config.chain.replica, stream(config.run.seed, "start", device=config.run.device)), 0
    except ValueError as error:
        raise SamplingError(str(error)) from error


def _check_replay(ensemble: Ensemble, rows: dict[str, dict[str, np.ndarray]], done: int) -> None:
    """Compare a block computed again with what is stored; they must agree bit for bit."""
    for name, again in rows["history"].items():
        stored = ensemble.history(name, slice(done, done + again.shape[1]))
        if not np.array_equal(stored, again):
            raise DataError(
                f"{ensemble.path}: draws {done} to {done + again.shape[1] - 1} computed again differ in {name}; "
                "resume on the same machine type, threads and torch version"
            )


def _write_training(folder: RunFolder, ensemble: Ensemble) -> None:
    if folder.metrics_file.exists():
        records = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
        ensemble.write_training(
            {key: np.array([r[key] for r in records]) for key in ("step", "loss", "ess", "seconds")}
        )


def _rewrite_metrics(folder: RunFolder, trainer: Trainer) -> None:
    """Leave in the metrics only the steps that the checkpoint has."""
    folder.metrics_file.write_text("".join(json.dumps(asdict(record)) + "\n" for record in trainer.records))


def _write_baseline(folder: RunFolder, ensemble: Ensemble) -> None:
    """Weigh quenched draws at the configured coupling, or at the one closest to the target, and store the weights."""
    config, action, settings = folder.config, build_action(folder.config), folder.config.baseline
    generator = stream(config.run.seed, "baseline")
    if settings.beta is None:
        prior = tune_quenched(action, config.lattice.shape, beta=config.action.beta, generator=generator)
    else:
        factor = {"sector": settings.sector, "smooth_sector": settings.smooth_sector}
        prior = QuenchedU1(settings.beta, config.lattice.shape, **factor)
    baseline = quenched_baseline(prior, action, samples=settings.samples, generator=generator)
    ensemble.write_proposals("baseline_log_weight", baseline.log_weight.numpy())
    ensemble.write_proposals("baseline_plain_log_weight", baseline.plain_log_weight.numpy())
    arrays = {"smooth_sector": np.array(prior.smooth_sector)} if prior.smooth_sector else {}
    ensemble.write_analysis("baseline_law", {"beta": prior.beta, "sector": prior.sector}, arrays)
