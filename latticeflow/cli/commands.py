"""What each command does, from parsed arguments to printed output."""

import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from latticeflow.cli import inspect, stages
from latticeflow.cli.analysis import Report, analyse
from latticeflow.cli.figures import draw_figures
from latticeflow.cli.folder import RunFolder
from latticeflow.cli.report import as_json, table
from latticeflow.config import Config, ConfigError, load_config
from latticeflow.config.building import build_bare_action
from latticeflow.config.problems import Problem
from latticeflow.observables import observables


def run(options: Namespace) -> None:
    """Do the whole road and print the result table."""
    started = time.perf_counter()
    folder = _prepare(options)
    with folder.lock():
        stages.train(folder)
        stages.sample(folder)
        stages.measure_ensemble(folder)
        report = analyse(folder)
        draw_figures(folder)
        folder.status("done", folder.config.chain.draws, folder.config.chain.draws)
    _show(report, options)
    if not options.json:
        print(f"{folder.ensemble_file}, figures beside it; {time.perf_counter() - started:.0f} s")


def train(options: Namespace) -> None:
    folder = _prepare(options)
    with folder.lock():
        stages.train(folder)
    print(f"trained: {folder.path}; next: latticeflow sample {folder.path}")


def sample(options: Namespace) -> None:
    folder = _open(options)
    with folder.lock():
        stages.sample(folder)


def measure(options: Namespace) -> None:
    folder = _open(options)
    with folder.lock():
        stages.measure_ensemble(folder)


def analyse_folder(options: Namespace) -> None:
    folder = _open(options)
    with folder.lock():
        report = analyse(folder)
    _show(report, options)


def plot(options: Namespace) -> None:
    print("\n".join(draw_figures(_open(options))))


def check(options: Namespace) -> None:
    config = _load(options.config, options.overrides)
    print(inspect.describe(config))


def info(options: Namespace) -> None:
    print(inspect.machine())


COMMANDS: dict[str, Callable[[Namespace], None]] = {
    "run": run,
    "train": train,
    "sample": sample,
    "measure": measure,
    "analyse": analyse_folder,
    "plot": plot,
    "check": check,
    "info": info,
}


def _load(path: Path, overrides: list[str]) -> Config:
    """Load a configuration, check what only this machine and the theory can tell, set the number of threads."""
    config = load_config(path, overrides)
    problems = []
    try:
        torch.empty(0, device=config.run.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        problems.append(Problem("run.device", "a device of this machine", f'"{config.run.device}" ({reason})'))
    try:
        observables(build_bare_action(config), config.analysis.observables)
    except ValueError as error:
        problems.append(Problem("analysis.observables", "names of observables", str(error)))
    if problems:
        raise ConfigError(problems, str(path))
    _use_threads(config)
    return config


def _use_threads(config: Config) -> None:
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)


def _prepare(options: Namespace) -> RunFolder:
    config = _load(options.config, options.overrides)
    return RunFolder.create(options.out or options.config.with_suffix(""), config, resume=options.resume)


def _open(options: Namespace) -> RunFolder:
    folder = RunFolder.open(options.folder)
    _use_threads(folder.config)
    return folder


def _show(report: Report, options: Namespace) -> None:
    print(as_json(report) if options.json else table(report))
