"""Looking before running: what a configuration means, and what this machine has."""

import math
import os
import platform
import time
from collections.abc import Callable
from importlib import metadata

import torch

import latticeflow
from latticeflow.cli.sampling import start
from latticeflow.cli.training import needs_training
from latticeflow.config import Config
from latticeflow.config.building import build_action, build_kernel, build_sampler, build_trainer
from latticeflow.streams import stream


def describe(config: Config) -> str:
    """Return shapes, parameters, file size and a time estimate, from one trial step of each kind; nothing is stored."""
    action, sampler, chain = build_action(config), build_sampler(config), config.chain
    configurations = chain.replica * chain.draws
    shape = list(action.field_shape(config.lattice.shape))
    megabytes = configurations * (8 * math.prod(shape) + 37) / 1e6
    parameters = sum(p.numel() for p in sampler.parameters())
    lines = [
        f"theory          {action}",
        f"lattice         {list(config.lattice.shape)}, one configuration {shape}",
        f"sampler         {_proposal(config)}, {parameters} parameters",
        f"ensemble        {chain.replica} replica x {chain.draws} draws, {megabytes:.1f} MB",
    ]
    seconds = 0.0
    if needs_training(config):
        trainer = build_trainer(config, sampler)
        step = _seconds(trainer.trial_step)
        seconds += step * config.training.steps
        lines.append(
            f"training        {config.training.estimator}, {config.training.steps} steps of {config.training.batch}, "
            f"{step:.3g} s each on this machine"
        )
    kernel = build_kernel(config, sampler)
    state = start(config, kernel)
    draw = _seconds(lambda: kernel.step(state, stream(config.run.seed, "trial", device=config.run.device)))
    seconds += draw * (chain.draws + chain.thermalisation_steps)
    lines.append(f"chain           {' + '.join(chain.kernels)}, {draw:.3g} s a draw of all replica")
    if chain.thermalisation_steps:
        lines.append(f"thermalisation  {chain.thermalisation_steps} steps before the first draw")
    lines.append(f"time            about {_duration(seconds)} for training and sampling (measured on one step of each)")
    return "\n".join(lines)


def _proposal(config: Config) -> str:
    settings = config.sampler
    kind, flow = (settings.kind, settings) if settings.kind == "stabilised" else (settings.flow.kind, settings.flow)
    layers = f" of {flow.layers} layers" if hasattr(flow, "layers") else ""
    pieces = f"pieces by {settings.pieces}, " if settings.kind == "piecewise" else ""
    return f"{pieces}prior {settings.prior.kind}, flow {kind}{layers}"


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
