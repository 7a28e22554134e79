"""The sampling stage: thermalise the chains, draw block by block, and weigh the draws that need no training."""

import json

import numpy as np
import torch
from torch import Generator, Tensor

from latticeflow.cli.folder import RunFolder
from latticeflow.cli.progress import ticker
from latticeflow.cli.training import trained_sampler
from latticeflow.config import Config
from latticeflow.config.building import build_action, build_kernel
from latticeflow.mcmc import ChainState, Kernel, StepInfo
from latticeflow.mcmc.kernel import state_at
from latticeflow.priors import QuenchedU1
from latticeflow.samplers import quenched_baseline, tune_quenched
from latticeflow.stats import ess
from latticeflow.storage import DataError, Ensemble, load_checkpoint, save_checkpoint
from latticeflow.streams import stream

MAX_BAD_FRACTION = 0.01
NUMPY = {torch.bool: np.bool_, torch.float64: np.float64}

Rows = dict[str, dict[str, np.ndarray]]


class SamplingError(RuntimeError):
    """Sampling cannot go on, for the reason in the message."""


def sample(folder: RunFolder) -> None:
    """Run the chains to their end, block by block, each committed before the next begins."""
    config = folder.config
    kernel = build_kernel(config, trained_sampler(folder))
    if not folder.ensemble_file.exists():
        _create_ensemble(folder, kernel)
    with folder.ensemble("a") as ensemble:
        state, done = _take_up(folder, kernel, ensemble)
        with ticker("sampling", ensemble.draws, done=done) as counter:
            while done < ensemble.draws:
                size = min(ensemble.block, ensemble.draws - done)
                state, rows = run_block(kernel, state, size, _stream(config, "chain", done))
                if done < ensemble.n_committed:
                    _check_replay(ensemble, rows, done)
                else:
                    ensemble.append(**rows)
                done += size
                _save(folder, kernel, state, done)
                folder.status("sampling", done, ensemble.draws)
                counter.advance(size, _note(kernel, ensemble))
        _write_training(folder, ensemble)
        ensemble.write_analysis("tuned", kernel.parameters)
        if config.baseline is not None and "baseline_log_weight" not in ensemble.proposal_names:
            _write_baseline(folder, ensemble)
            folder.status("baseline", config.baseline.samples, config.baseline.samples)


def run_block(kernel: Kernel, state: ChainState, draws: int, generator: Generator) -> tuple[ChainState, Rows]:
    """Take `draws` steps; return the state and the rows `(chain, draws, ...)` in the form that an ensemble appends.

    Raises SamplingError when more than 1% of the proposals are bad (StepInfo).
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
    history = {name: _rows([info.history[name] for _, info in steps]) for name in kernel.history}
    return state, {
        "fields": {kernel.action.field_name: _rows([s.field for s, _ in steps])},
        "history": {"action": _rows([s.action for s, _ in steps])} | history,
        "proposals": {name: _rows([info.proposals[name] for _, info in steps]) for name in kernel.proposals},
    }


def _thermalise(folder: RunFolder, kernel: Kernel, state: ChainState, done: int) -> ChainState:
    """Take the steps of the thermalisation that are left, the kernel learning from them."""
    config, steps = folder.config, folder.config.chain.thermalisation_steps
    if done >= steps:
        return state
    with ticker("thermalising", steps, done=done) as counter:
        while done < steps:
            size = min(config.chain.block, steps - done)
            generator = _stream(config, "thermalisation", done)
            for _ in range(size):
                state, info = kernel.step(state, generator)
                kernel.tune(info)
            done += size
            _save(folder, kernel, state, 0, thermalised=done)
            folder.status("thermalising", done, steps)
            counter.advance(size, ", ".join(f"{name} {value:.3g}" for name, value in kernel.parameters.items()))
    return state


def _take_up(folder: RunFolder, kernel: Kernel, ensemble: Ensemble) -> tuple[ChainState, int]:
    """Return the state to go on from and the draws it has behind it, at most a block less than are committed."""
    stored, config = folder.checkpoints("chain"), folder.config
    if not stored.exists():
        return _thermalise(folder, kernel, _start(config, kernel), 0), 0
    checkpoint = load_checkpoint(stored, map_location=config.run.device)
    if checkpoint.step > ensemble.n_committed:
        raise DataError(
            f"{folder.ensemble_file} has {ensemble.n_committed} draws, its checkpoint {checkpoint.step}: "
            "the file was replaced or cut"
        )
    kernel.parameters = checkpoint.state["parameters"]
    state = ChainState(**checkpoint.state["state"])
    return _thermalise(folder, kernel, state, checkpoint.state["thermalised"]), checkpoint.step


def _start(config: Config, kernel: Kernel) -> ChainState:
    generator = _stream(config, "start")
    try:
        state = kernel.start(config.chain.replica, generator)
    except ValueError as error:
        raise SamplingError(str(error)) from error
    return state_at(kernel.action, torch.zeros_like(state.field), generator) if config.chain.start == "cold" else state


def _save(folder: RunFolder, kernel: Kernel, state: ChainState, draws: int, thermalised: int | None = None) -> None:
    steps = folder.config.chain.thermalisation_steps if thermalised is None else thermalised
    contents = {"state": vars(state), "parameters": kernel.parameters, "thermalised": steps}
    save_checkpoint(folder.checkpoints("chain"), contents, draws)


def _stream(config: Config, purpose: str, block: int = 0) -> Generator:
    return stream(config.run.seed, purpose, block, device=config.run.device)


def _note(kernel: Kernel, ensemble: Ensemble) -> str:
    accepted = [name for name in kernel.history if name.startswith("accepted")]
    notes = [f"{name.replace('accepted', 'acceptance')} {ensemble.history(name).mean():.3f}" for name in accepted]
    return "  ".join(notes + [f"ESS {ess(ensemble.proposals(name)):.3f}" for name in kernel.proposals])


def _rows(tensors: list[Tensor]) -> np.ndarray:
    return torch.stack(tensors, dim=1).cpu().numpy()


def _create_ensemble(folder: RunFolder, kernel: Kernel) -> None:
    config, action = folder.config, kernel.action
    Ensemble.create(
        folder.ensemble_file,
        theory=action.theory,
        lattice_shape=config.lattice.shape,
        config=config.to_toml(),
        fields={action.field_name: (action.field_shape(config.lattice.shape), np.float64)},
        history={"action": np.float64} | {name: NUMPY[dtype] for name, dtype in kernel.history.items()},
        proposals=dict.fromkeys(kernel.proposals, 1),
        chains=config.chain.replica,
        draws=config.chain.draws,
        block=config.chain.block,
    ).close()


def _check_replay(ensemble: Ensemble, rows: Rows, done: int) -> None:
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


def _write_baseline(folder: RunFolder, ensemble: Ensemble) -> None:
    """Weigh quenched draws at the configured coupling, or the one closest to the target; store weights and charges."""
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
    ensemble.write_proposals("baseline_charge", baseline.charge.numpy())
    arrays = {"smooth_sector": np.array(prior.smooth_sector)} if prior.smooth_sector else {}
    ensemble.write_analysis("baseline_law", {"beta": prior.beta, "sector": prior.sector}, arrays)
