"""The sampling stage: thermalise the chains, draw block by block, and weigh the draws that need no training."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from latticeflow.cli.fitting import piece_columns
from latticeflow.cli.folder import CHAIN, RunFolder
from latticeflow.cli.parts import COLUMN as PART
from latticeflow.cli.parts import part_columns
from latticeflow.cli.pieces import NAME as PIECES
from latticeflow.cli.progress import ticker
from latticeflow.cli.stopping import Stop, finishing
from latticeflow.cli.training import trained_sampler, training_records
from latticeflow.config import Config
from latticeflow.config.building import build_action, build_kernel
from latticeflow.mcmc import ChainState, Kernel, StepInfo
from latticeflow.mcmc.kernel import state_at
from latticeflow.priors import QuenchedU1
from latticeflow.samplers import quenched_baseline, tune_quenched
from latticeflow.stats import ess
from latticeflow.storage import DataError, Ensemble
from latticeflow.streams import stream

MAX_BAD_FRACTION, FEW = 0.01, 1000
MAX_BAD_WHILE_TUNED, WHILE_TUNED = 0.05, 4
TRAINED = ("piece", PART, "step", "loss", "ess", "held_out", "seconds", "skipped")
NUMPY = {torch.bool: np.bool_, torch.float64: np.float64}

Rows = dict[str, dict[str, np.ndarray]]


class SamplingError(RuntimeError):
    """Sampling cannot go on, for the reason in the message."""


@dataclass(frozen=True)
class Reached:
    """How far the chains are: what a checkpoint holds beside the kernel's parameters.

    `thermalised` and `draws` count steps; `bad` proposals had a non-finite action, log q or energy and were rejected.
    """

    state: ChainState
    thermalised: int = 0
    draws: int = 0
    bad: int = 0


def sample(folder: RunFolder) -> None:
    """Run the chains to their end, block by block, each committed before the next begins."""
    config = folder.config
    kernel = build_kernel(config, trained_sampler(folder))
    if not folder.ensemble_file.exists():
        folder.check_complete(0, folder.checkpointed_draws)
        create_ensemble(folder, kernel)
    with folder.ensemble("a") as ensemble, finishing("block") as stop:
        if folder.draws > ensemble.draws:
            ensemble.extend(folder.draws - ensemble.draws, config=config.to_toml())
        if ensemble.n_committed < ensemble.draws or "tuned" not in ensemble.analysis():
            reached = _take_up(folder, kernel, ensemble)
            reached = _thermalise(folder, kernel, reached, stop)
            reached = _draw(folder, kernel, ensemble, reached, stop)
            _write_training(folder, ensemble)
            ensemble.write_analysis("rejected", {"bad_proposals": reached.bad})
            ensemble.write_analysis("tuned", kernel.parameters)
        if config.baseline is not None and "baseline_law" not in ensemble.analysis():
            _write_baseline(folder, ensemble)
            folder.status("baseline", config.baseline.samples, config.baseline.samples)
        stop.here()


def run_block(kernel: Kernel, state: ChainState, draws: int, generator: Generator) -> tuple[ChainState, Rows, int]:
    """Take `draws` steps; return the state, the rows `(chain, draws, ...)` to append, and the number of bad ones."""
    steps: list[tuple[ChainState, StepInfo]] = []
    for _ in range(draws):
        state, info = kernel.step(state, generator)
        steps.append((state, info))
    history = {name: _rows([info.history[name] for _, info in steps]) for name in kernel.history}
    rows = {
        "fields": {kernel.action.field_name: _rows([s.field for s, _ in steps])},
        "history": {"action": _rows([s.action for s, _ in steps])} | history,
        "proposals": {name: _rows([info.proposals[name] for _, info in steps]) for name in kernel.proposals},
    }
    return state, rows, sum(info.bad for _, info in steps)


def _check_bad(bad: int, total: int, *, limit: float = MAX_BAD_FRACTION, least: int = FEW) -> None:
    """Raise SamplingError when more than a fraction of the proposals is bad, or of `least` where they are fewer."""
    if bad > limit * max(total, least):
        raise SamplingError(f"{bad} of {total} proposals had a non-finite action or log q (limit {limit:.0%})")


def _take_up(folder: RunFolder, kernel: Kernel, ensemble: Ensemble) -> Reached:
    """Return the newest checkpoint before the end of what is stored, a block behind it, or the start of the chains.

    That block, computed again, shows whether this machine still gives the same numbers.
    """
    stored = folder.config.chain.thermalisation_steps + ensemble.n_committed
    for before in (stored, None) if ensemble.n_committed else (None,):
        try:
            checkpoint = folder.load_checkpoint(CHAIN, before=before)
        except DataError:
            if before is None:
                raise
            continue  # none before the end is valid, the one there may be
        if checkpoint is not None:
            kernel.parameters = checkpoint.state["parameters"]
            reached = {name: checkpoint.state[name] for name in ("thermalised", "draws", "bad")}
            return Reached(ChainState(**checkpoint.state["state"]), **reached)
    reached = Reached(start(folder.config, kernel))
    _save(folder, kernel, reached)
    return reached


def _thermalise(folder: RunFolder, kernel: Kernel, reached: Reached, stop: Stop) -> Reached:
    """Take the steps of the thermalisation that are left, the kernel learning from them."""
    config, steps, state = folder.config, folder.config.chain.thermalisation_steps, reached.state
    bad = taken = 0
    if reached.thermalised == steps:
        return reached
    with ticker("thermalising", steps, done=reached.thermalised) as counter:
        while reached.thermalised < steps:
            size = min(config.chain.block, steps - reached.thermalised)
            generator = _stream(config, "thermalisation", reached.thermalised)
            for _ in range(size):
                state, info = kernel.step(state, generator)
                kernel.tune(info)
                bad, taken = bad + info.bad, taken + _proposals(folder)
                least = round(WHILE_TUNED * _proposals(folder) / MAX_BAD_WHILE_TUNED)  # a step that is far too large
                _check_bad(bad, taken, limit=MAX_BAD_WHILE_TUNED, least=least)
            reached = Reached(state, reached.thermalised + size)
            _save(folder, kernel, reached)
            folder.status("thermalising", reached.thermalised, steps)
            counter.advance(size, ", ".join(f"{name} {value:.3g}" for name, value in kernel.parameters.items()))
            stop.here()
    return reached


def _draw(folder: RunFolder, kernel: Kernel, ensemble: Ensemble, reached: Reached, stop: Stop) -> Reached:
    """Take the chains to their end, comparing what is computed again with what is stored."""
    with ticker("sampling", ensemble.draws, done=reached.draws) as counter:
        while reached.draws < ensemble.draws:
            first = reached.draws
            size = ensemble.block_at(first)
            state, rows, bad = run_block(kernel, reached.state, size, _stream(folder.config, "chain", first))
            _check_bad(bad, size * _proposals(folder))
            _check_bad(reached.bad + bad, (first + size) * _proposals(folder))
            if first < ensemble.n_committed:
                _check_again(folder, ensemble, rows, first)
            else:
                ensemble.append(**rows)
            reached = Reached(state, reached.thermalised, first + size, reached.bad + bad)
            _save(folder, kernel, reached)
            folder.status("sampling", reached.draws, ensemble.draws)
            counter.advance(size, _note(kernel, ensemble))
            stop.here()
    return reached


def start(config: Config, kernel: Kernel) -> ChainState:
    """Return the states that the chains start from; raises SamplingError where there are none."""
    generator = _stream(config, "start")
    try:
        state = kernel.start(config.chain.replica, generator)
    except ValueError as error:
        raise SamplingError(str(error)) from error
    return state_at(kernel.action, torch.zeros_like(state.field), generator) if config.chain.start == "cold" else state


def _proposals(folder: RunFolder) -> int:
    """Return how many proposals the chains see in a step."""
    return folder.config.chain.replica * len(folder.config.chain.kernels)


def _save(folder: RunFolder, kernel: Kernel, reached: Reached) -> None:
    contents = vars(reached) | {"state": vars(reached.state), "parameters": kernel.parameters}
    folder.save_checkpoint(CHAIN, contents, reached.thermalised + reached.draws)


def _stream(config: Config, purpose: str, block: int = 0) -> Generator:
    return stream(config.run.seed, purpose, block, device=config.run.device)


def _note(kernel: Kernel, ensemble: Ensemble) -> str:
    accepted = [name for name in kernel.history if name.startswith("accepted")]
    notes = [f"{name.replace('accepted', 'acceptance')} {ensemble.history(name).mean():.3f}" for name in accepted]
    return "  ".join(notes + [f"ESS {ess(ensemble.proposals(name)):.3f}" for name in kernel.proposals])


def _rows(tensors: list[Tensor]) -> np.ndarray:
    return torch.stack(tensors, dim=1).cpu().numpy()


def create_ensemble(folder: RunFolder, kernel: Kernel) -> None:
    """Allocate the run's ensemble with the columns that the kernel fills."""
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
        draws=folder.draws,
        block=config.chain.block,
    ).close()


def _check_again(folder: RunFolder, ensemble: Ensemble, rows: Rows, done: int) -> None:
    """Compare a block computed again with what is stored; they must agree bit for bit."""
    names = ensemble.differences(done, **rows)
    if names:
        raise DataError(
            f"{ensemble.path}: draws {done} to {done + ensemble.block_at(done) - 1} computed again differ in "
            f"{', '.join(names)}; {folder.same_machine()}"
        )


def _write_training(folder: RunFolder, ensemble: Ensemble) -> None:
    records = training_records(folder)
    if records:
        cut = folder.config.training.parts is not None
        names = [name for name in TRAINED if name in records[0] and (cut or name != PART)]
        columns = {name: np.array([record[name] for record in records]) for name in names}
        ensemble.write_training(columns | part_columns(records))
    if records and folder.config.clustered:
        ensemble.write_analysis(PIECES, {}, piece_columns(folder))


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
