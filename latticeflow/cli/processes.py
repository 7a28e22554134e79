"""One of several processes of a training by parts, started by `torchrun`: rank 0 is the program, the others help."""

import os
import signal
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from latticeflow.cli.folder import UsageError
from latticeflow.cli.stopping import SIGNALS
from latticeflow.config import Config
from latticeflow.config.building import build_sampler, build_trainer
from latticeflow.config.problems import alternatives
from latticeflow.training import LostProcessError, run_pipeline
from latticeflow.training.estimators import REVERSE
from latticeflow.training.exchange import short
from latticeflow.training.pipeline import split
from latticeflow.training.schedule import SIMULTANEOUS

PATIENCE = timedelta(minutes=10)
"""How long a process waits for another one, which is much longer than a step."""


def processes() -> int:
    """Return how many processes `torchrun` started, 1 without it."""
    return max(1, _count("WORLD_SIZE", default=1))


def check_shared(config: Config, *, training: bool) -> None:
    """Raise UsageError for a configuration that several processes cannot share; `training` says whether it trains."""
    settings, several = config.training, processes()
    kind = settings and settings.schedule
    if not training or kind != SIMULTANEOUS or settings.parts is None or settings.estimator not in REVERSE:
        raise UsageError(
            f"{several} processes can only share a training by parts from the action: training.parts, "
            f'training.schedule = "{SIMULTANEOUS}" and training.estimator {alternatives([*REVERSE])}; start one process'
        )
    if settings.ema is not None:
        raise UsageError(f"training.ema: {several} processes have no average of all weights; start one process")
    try:
        split(len(settings.parts), several)
    except ValueError as error:
        raise UsageError(f"training.parts: {error}") from error


def together(config: Config, command: Callable[[Namespace], None], options: Namespace) -> None:
    """Run the command on the first process while the others train their parts.

    Raises LostProcessError where a process does not answer.
    """
    with _connected(config):
        if dist.get_rank() == 0:
            command(options)
        else:
            _help(config)


def _help(config: Config) -> None:
    """Train the parts of this process; the first one says when to stop, whatever signals come."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    run_pipeline(build_trainer(config, build_sampler(config)), sync_every=config.training.checkpoint_every)


@contextmanager
def _connected(config: Config) -> Iterator[None]:
    """Be in torch.distributed's default group: nccl where each process has a GPU of its own, else gloo."""
    backend, device = "gloo", torch.device(config.run.device)
    if device.type == "cuda" and device.index is None and _count("LOCAL_WORLD_SIZE") <= torch.cuda.device_count():
        torch.cuda.set_device(_count("LOCAL_RANK"))
        backend = "nccl"
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = f"{processes()} processes were announced and did not find each other: {short(error)}"
        raise LostProcessError(f"{reason}; start them by torchrun") from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def _count(name: str, *, default: int | None = None) -> int:
    """Return a number that `torchrun` sets. Raises UsageError where it is none."""
    found = os.environ.get(name, default)
    try:
        return int(found)
    except (TypeError, ValueError):
        raise UsageError(
            f"the environment's {name} is {found!r}, expected a number; start processes by torchrun"
        ) from None
