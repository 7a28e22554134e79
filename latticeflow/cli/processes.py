"""One of several processes, started by `torchrun`: rank 0 is the program, the others help it train and run its chains.

The first process alone reads configurations, finds what is wrong with them, and writes. The others wait for it to ask
for something, and end when it says so, with its exit code; where one of them is lost, the others fail.

Without `run.threads` each process on a CPU takes its share of the cores. `torchrun` sets OMP_NUM_THREADS=1 for several
processes where it is not set, which cannot be told from a 1 of the user's: another number is left as it is.
"""

import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from latticeflow.cli.folder import UsageError
from latticeflow.cli.stopping import SIGNALS
from latticeflow.config import Config
from latticeflow.config.loading import parse_config
from latticeflow.training import LostProcessError, Team
from latticeflow.training.estimators import REVERSE
from latticeflow.training.exchange import Exchange, short
from latticeflow.training.pipeline import split
from latticeflow.training.schedule import SIMULTANEOUS

PATIENCE = timedelta(minutes=10)
"""How long a process waits for another one, which is much longer than a step or a block of draws."""
KEEP = 60.0
"""Seconds after which processes that wait are told to go on waiting."""
TRAIN, SAMPLE, WAIT, END = "train", "sample", "wait", "end"

Tasks = dict[str, Callable[[Config, Team], None]]


def processes() -> int:
    """Return how many processes `torchrun` started, 1 without it."""
    return max(1, _count("WORLD_SIZE", default=1))


def check_shared(config: Config, *, trains: bool, samples: bool) -> None:
    """Raise UsageError for what several processes cannot share: the training, if `trains`, the chains, if `samples`."""
    several = processes()
    if several == 1:
        return
    here, device = _count("LOCAL_WORLD_SIZE", default=1), torch.device(config.run.device)
    if device.type == "cuda" and device.index is None and here > torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise UsageError(
            f"{here} processes per node, {found} CUDA devices: start {found} at most, or name one for all in run.device"
        )
    if trains:
        _check_training(config, several)
    if samples and config.chain.replica % several:
        raise UsageError(
            f"chain.replica = {config.chain.replica} chains cannot be shared equally by {several} processes; "
            "expected a multiple"
        )


def _check_training(config: Config, several: int) -> None:
    settings = config.training
    if config.clustered:
        raise UsageError(
            f'sampler.pieces = "clusters": {several} processes cannot share its fits, which have their own '
            "(training.processes); train by one process, then let several `sample`"
        )
    if not is_pipeline(config):
        if settings.batch % several:
            raise UsageError(
                f"training.batch = {settings.batch} cannot be shared equally by {several} processes; "
                "expected a multiple"
            )
        return
    if settings.ema is not None:
        raise UsageError(
            f'training.ema: {several} processes have no average of all weights with schedule "{SIMULTANEOUS}"; '
            "start one process"
        )
    try:
        split(len(settings.parts), several)
    except ValueError as error:
        raise UsageError(f"training.parts: {error}") from error


def is_pipeline(config: Config) -> bool:
    """Return whether processes share the parts of the flow, not the batches."""
    settings = config.training
    return settings.parts is not None and settings.schedule == SIMULTANEOUS and settings.estimator in REVERSE


class Helpers:
    """The other processes, as the first one sees them: what it asks for, all do."""

    def __init__(self) -> None:
        self.exchange, self.team = Exchange(torch.device("cpu")), None
        self.dismissed, self.asked_at = False, time.monotonic()

    def ask(self, task: str, config: Config) -> Team:
        """Let them begin a task and return the team that does it, which says when they wait again."""
        self.exchange.spread([task, config.to_toml()])
        self.team = self.team or Team(_device(config))
        self.team.waiting = False
        return self.team

    def keep(self) -> None:
        """Let them go on waiting, while the first process does something long."""
        if time.monotonic() - self.asked_at > KEEP:
            self.exchange.spread([WAIT, 0])
            self.asked_at = time.monotonic()

    def dismiss(self, code: int = 0) -> None:
        """Let them end, where they wait for what is next; others find out when the first process is gone."""
        if not self.dismissed and (self.team is None or self.team.waiting):
            self.dismissed = True
            self.exchange.spread([END, code])


_helpers: Helpers | None = None


def helpers() -> Helpers | None:
    """Return the other processes, None where there are none or they have been dismissed."""
    return None if _helpers is None or _helpers.dismissed else _helpers


def together(command: Callable[[Namespace], None], options: Namespace, tasks: Tasks) -> None:
    """Run the command on the first process while the others do the tasks that it asks for.

    Raises LostProcessError where a process does not answer; SystemExit, on the others, with the code of the first one.
    """
    global _helpers
    _connect()
    if dist.get_rank() == 0:
        _helpers = Helpers()
        command(options)
    else:
        _help(tasks)


def leave(code: int) -> None:
    """Let the others end with this exit code too, and leave the group."""
    global _helpers
    for number in SIGNALS if dist.is_initialized() else ():
        signal.signal(number, signal.SIG_IGN)  # torchrun ends those that are slower than the first to end
    with suppress(LostProcessError):
        if _helpers is not None:
            _helpers.dismiss(code)
    _helpers = None
    if dist.is_initialized():
        dist.destroy_process_group()


def use_threads(config: Config) -> None:
    """Set the number of threads of this process."""
    here = _count("LOCAL_WORLD_SIZE", default=1)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    elif here > 1 and torch.device(config.run.device).type == "cpu" and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // here))


def _help(tasks: Tasks) -> None:
    """Do what the first process asks for; a signal is a wish that it hears of."""
    exchange, team, wishes = Exchange(torch.device("cpu")), None, []

    def wish(*_: object) -> None:
        wishes.append(True)
        if team is not None:
            team.wants_stop = True

    for number in SIGNALS:
        signal.signal(number, wish)
    while True:
        task, told = exchange.spread(None)
        if task == END:
            sys.exit(told)
        if task == WAIT:
            continue
        config = parse_config(told, source="the first process")
        use_threads(config)
        team = team or Team(_device(config))
        team.wants_stop = bool(wishes)
        tasks[task](config, team)


def _device(config: Config) -> torch.device:
    """Return the device of this process; "cuda" is that of its number on its node."""
    device = torch.device(config.run.device)
    if device.type == "cuda":
        torch.cuda.set_device(_count("LOCAL_RANK") if device.index is None else device.index)
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _connect() -> None:
    """Be in torch.distributed's default group, with gloo, for GPUs nccl."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = f"{processes()} processes were announced and did not find each other: {short(error)}"
        raise LostProcessError(f"{reason}; start them by torchrun") from error


def _count(name: str, *, default: int | None = None) -> int:
    """Return a number that `torchrun` sets. Raises UsageError where it is none."""
    found = os.environ.get(name, default)
    try:
        return int(found)
    except (TypeError, ValueError):
        raise UsageError(
            f"the environment's {name} is {found!r}, expected a number; start processes by torchrun"
        ) from None
