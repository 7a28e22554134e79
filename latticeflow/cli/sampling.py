"""The sampling stage: thermalise the chains, draw block by block, and weigh the draws that need no training."""

from dataclasses import dataclass

import numpy as np
import torch

from latticeflow.cli.chains import Chains, Rows, check_bad, proposals
from latticeflow.cli.fitting import piece_columns
from latticeflow.cli.folder import CHAIN, RunFolder, UsageError
from latticeflow.cli.parts import COLUMN as PART
from latticeflow.cli.parts import part_columns
from latticeflow.cli.pieces import NAME as PIECES
from latticeflow.cli.processes import SAMPLE, Helpers, helpers, processes
from latticeflow.cli.progress import ticker
from latticeflow.cli.stopping import Stop, finishing
from latticeflow.cli.training import restored_sampler, sampler_state, trained_sampler, training_records
from latticeflow.config import Config
from latticeflow.config.building import build_action, build_kernel
from latticeflow.mcmc import ChainState, Kernel
from latticeflow.priors import QuenchedU1
from latticeflow.samplers import quenched_baseline, tune_quenched
from latticeflow.stats import ess
from latticeflow.storage import DataError, Ensemble, load_checkpoint
from latticeflow.streams import stream
from latticeflow.training import Team

PROCESSES = "processes"
TRAINED = ("piece", PART, "step", "loss", "ess", "held_out", "seconds", "skipped")
NUMPY = {torch.bool: np.bool_, torch.float64: np.float64}


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
    """Run the chains to their end, block by block, each committed before the next begins.

    Other processes have their share of the chains, and end with them.
    """
    config = folder.config
    kernel, others = build_kernel(config, trained_sampler(folder)), helpers()
    if not folder.ensemble_file.exists():
        folder.check_complete(0, folder.checkpointed_draws)
        create_ensemble(folder, kernel)
    with folder.ensemble("a") as ensemble, finishing("block") as stop:
        if folder.draws > ensemble.draws:
            ensemble.extend(folder.draws - ensemble.draws, config=config.to_toml())
        if ensemble.n_committed < ensemble.draws or "tuned" not in ensemble.analysis():
            with _chains(folder, kernel, others) as chains:
                reached = _take_up(folder, chains, ensemble)
                reached = _thermalise(folder, chains, reached, stop)
                reached = _draw(folder, chains, ensemble, reached, stop)
            _write_training(folder, ensemble)
            ensemble.write_analysis("rejected", {"bad_proposals": reached.bad})
            ensemble.write_analysis("tuned", kernel.parameters)
        if others is not None:
            others.dismiss()
        if config.baseline is not None and "baseline_law" not in ensemble.analysis():
            _write_baseline(folder, ensemble)
            folder.status("baseline", config.baseline.samples, config.baseline.samples)
        stop.here()


def help_sample(config: Config, team: Team) -> None:
    """Move a share of the chains of the first process, which has the sampler."""
    kernel = build_kernel(config, restored_sampler(config, team.spread(None)))
    Chains(config, kernel, team).follow()


def check_processes(folder: RunFolder) -> None:
    """Raise UsageError where the chains go on and were begun by another number of processes."""
    try:
        checkpoint = load_checkpoint(folder.checkpoints(CHAIN))
    except (FileNotFoundError, DataError):  # what is wrong is said where the chains are taken up
        return
    begun_by = checkpoint.state.get(PROCESSES, 1)
    if begun_by == processes() or not _unfinished(folder):
        return
    how = f"`torchrun --nproc-per-node {begun_by} -m latticeflow ...`" if begun_by > 1 else "without torchrun"
    raise UsageError(
        f"{folder.path}: the chains were begun by {begun_by} process{'es' * (begun_by > 1)}, on which their numbers "
        f"depend, this is {processes()}; start {begun_by}, {how}"
    )


def _unfinished(folder: RunFolder) -> bool:
    if not folder.ensemble_file.exists():
        return True
    with folder.ensemble() as ensemble:
        return ensemble.n_committed < folder.draws or "tuned" not in ensemble.analysis()


def _chains(folder: RunFolder, kernel: Kernel, others: Helpers | None) -> Chains:
    """Return the chains, those of other processes begun there with the sampler of this one."""
    if others is None:
        return Chains(folder.config, kernel)
    team = others.ask(SAMPLE, folder.config)
    team.spread(sampler_state(folder))
    return Chains(folder.config, kernel, team)


def _take_up(folder: RunFolder, chains: Chains, ensemble: Ensemble) -> Reached:
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
            reached = {name: checkpoint.state[name] for name in ("thermalised", "draws", "bad")}
            state = chains.go_on(ChainState(**checkpoint.state["state"]), checkpoint.state["parameters"])
            return Reached(state, **reached)
    reached = Reached(chains.start())
    _save(folder, chains, reached)
    return reached


def _thermalise(folder: RunFolder, chains: Chains, reached: Reached, stop: Stop) -> Reached:
    """Take the steps of the thermalisation that are left, the kernel learning from them."""
    config, steps = folder.config, folder.config.chain.thermalisation_steps
    if reached.thermalised == steps:
        return reached
    with ticker("thermalising", steps, done=reached.thermalised) as counter:
        while reached.thermalised < steps:
            size = min(config.chain.block, steps - reached.thermalised)
            state = chains.thermalise(reached.thermalised, size)
            reached = Reached(state, reached.thermalised + size)
            _save(folder, chains, reached)
            folder.status("thermalising", reached.thermalised, steps, elsewhere=chains.taken_elsewhere())
            counter.advance(size, ", ".join(f"{name} {value:.3g}" for name, value in chains.kernel.parameters.items()))
            stop.here(also=chains.others_stop)
    return reached


def _draw(folder: RunFolder, chains: Chains, ensemble: Ensemble, reached: Reached, stop: Stop) -> Reached:
    """Take the chains to their end, comparing what is computed again with what is stored."""
    every = proposals(folder.config)
    with ticker("sampling", ensemble.draws, done=reached.draws) as counter:
        while reached.draws < ensemble.draws:
            first = reached.draws
            size = ensemble.block_at(first)
            state, rows, bad = chains.draw(first, size)
            check_bad(bad, size * every)
            check_bad(reached.bad + bad, (first + size) * every)
            if first < ensemble.n_committed:
                _check_again(folder, ensemble, rows, first)
            else:
                ensemble.append(**rows)
            reached = Reached(state, reached.thermalised, first + size, reached.bad + bad)
            _save(folder, chains, reached)
            folder.status("sampling", reached.draws, ensemble.draws, elsewhere=chains.taken_elsewhere())
            counter.advance(size, _note(chains.kernel, ensemble))
            stop.here(also=chains.others_stop)
    return reached


def _save(folder: RunFolder, chains: Chains, reached: Reached) -> None:
    contents = vars(reached) | {"state": vars(reached.state), "parameters": chains.kernel.parameters}
    contents |= {PROCESSES: chains.processes} if chains.processes > 1 else {}
    folder.save_checkpoint(CHAIN, contents, reached.thermalised + reached.draws)


def _note(kernel: Kernel, ensemble: Ensemble) -> str:
    accepted = [name for name in kernel.history if name.startswith("accepted")]
    notes = [f"{name.replace('accepted', 'acceptance')} {ensemble.history(name).mean():.3f}" for name in accepted]
    return "  ".join(notes + [f"ESS {ess(ensemble.proposals(name)):.3f}" for name in kernel.proposals])


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
