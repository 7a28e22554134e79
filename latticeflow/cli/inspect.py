"""Looking before running: what a configuration means, and what this machine has."""

import math
import os
import platform
import time
from collections.abc import Callable
from importlib import metadata

import torch

import latticeflow
from latticeflow.cli.chains import start
from latticeflow.cli.training import needs_training
from latticeflow.config import Config
from latticeflow.config.building import build_action, build_bare_action, build_kernel, build_sampler, build_trainer
from latticeflow.config.clusters import build_piece
from latticeflow.config.samples import source_of, training_fields
from latticeflow.config.schema import TrainingSettings
from latticeflow.samplers import PiecewiseSampler
from latticeflow.storage import DataError
from latticeflow.streams import stream
from latticeflow.training.schedule import END_TO_END


def describe(config: Config) -> str:
    """Return shapes, parameters, file size and a time estimate, from one trial step of each kind; nothing is stored."""
    action, chain = build_action(config), config.chain
    fitted = config.clustered and needs_training(config)
    sampler = trial_pieces(config) if fitted else build_sampler(config)
    configurations = chain.replica * chain.draws
    shape = list(action.field_shape(config.lattice.shape))
    megabytes = configurations * (8 * math.prod(shape) + 37) / 1e6
    parameters = sum(p.numel() for p in (sampler.pieces[0] if fitted else sampler).parameters())
    lines = [
        f"theory          {action}",
        f"lattice         {list(config.lattice.shape)}, one configuration {shape}",
        f"sampler         {_proposal(config)}, {parameters} parameters{' a piece' * fitted}",
        f"ensemble        {chain.replica} replica x {chain.draws} draws, {megabytes:.1f} MB",
    ]
    seconds = 0.0
    if needs_training(config):
        settings = config.training
        step = _seconds(trial_fit(config, sampler) if fitted else build_trainer(config, sampler).trial_step)
        pieces, most = (len(sampler.pieces), "at most ") if fitted else (1, "")
        seconds += step * settings.steps * pieces / (settings.processes or 1)
        lines.append(
            f"training        {settings.estimator}, {most}{settings.steps} steps of {settings.batch}, "
            f"{step:.3g} s each on this machine{_by_parts(settings)}"
            + f", for each piece; the times below are for {pieces} pieces"
            * fitted
        )
    kernel = build_kernel(config, sampler)
    beginning = stream(config.run.seed, "start", device=config.run.device)
    state = start(config, kernel, chain.replica, beginning)
    draw = _seconds(lambda: kernel.step(state, stream(config.run.seed, "trial", device=config.run.device)))
    seconds += draw * (chain.draws + chain.thermalisation_steps)
    lines.append(f"chain           {' + '.join(chain.kernels)}, {draw:.3g} s a draw of all replica")
    if chain.thermalisation_steps:
        lines.append(f"thermalisation  {chain.thermalisation_steps} steps before the first draw")
    lines.append(f"time            about {_duration(seconds)} for training and sampling (measured on one step of each)")
    return "\n".join(lines)


def trial_pieces(config: Config) -> PiecewiseSampler:
    """Return pieces that have not been fitted, each on all of the samples: as many as are asked for, else two."""
    fields = training_fields(config, build_bare_action(config))
    pieces = config.sampler.clusters or 2
    try:
        with torch.random.fork_rng(devices=[]):
            return PiecewiseSampler([build_piece(config, fields) for _ in range(pieces)], [1.0] * pieces)
    except ValueError as error:
        raise DataError(f"{source_of(config)}: {error}") from error


def trial_fit(config: Config, sampler: PiecewiseSampler) -> Callable[[], object]:
    """Return what takes as long as a step of the fit of one piece."""
    piece = sampler.pieces[0]
    with torch.no_grad():
        x, _ = piece.sample(config.training.batch, stream(config.run.seed, "trial", device=config.run.device))
    return lambda: piece.log_prob(x).mean().backward()


def _proposal(config: Config) -> str:
    settings = config.sampler
    kind, flow = (settings.kind, settings) if settings.kind == "stabilised" else (settings.flow.kind, settings.flow)
    layers = f" of {flow.layers} layers" if hasattr(flow, "layers") else ""
    layers = f" of {flow.blocks} blocks" if hasattr(flow, "blocks") else layers
    layers = f" of {flow.levels} level{'s' * (flow.levels > 1)}" if hasattr(flow, "levels") else layers
    pieces = f"pieces {settings.pieces}, " if settings.kind == "piecewise" else ""
    return f"{pieces}prior {settings.prior.kind}, flow {kind}{layers}"


def _by_parts(settings: TrainingSettings) -> str:
    by = f" by {settings.fine_tuning_estimator}" if settings.fine_tuning_estimator else ""
    tuned = f"fine tuning {settings.fine_tuning:.3g}{by}" if settings.fine_tuning is not None else ""
    if settings.parts is None or settings.schedule == END_TO_END:
        return f"; {tuned}" * bool(by)
    return f" end to end; parts {list(settings.parts)}, {settings.schedule}, {tuned}"


def machine() -> str:
    """Return versions, threads and devices, one a line."""
    packages = ("torch", "numpy", "scipy", "h5py", "pydantic", "rich", "scikit-learn", "matplotlib")
    lines = [f"latticeflow {latticeflow.__version__}", f"python {platform.python_version()} on {platform.platform()}"]
    lines += [f"{name} {metadata.version(name)}" for name in packages]
    lines.append(f"cpu threads {torch.get_num_threads()} of {os.cpu_count()}")
    if torch.cuda.is_available():
        lines += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    else:
        lines.append("no CUDA device")
    return "\n".join(lines)


def _seconds(action: Callable[[], object]) -> float:
    action()
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
