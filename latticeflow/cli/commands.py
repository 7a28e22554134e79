"""What each command does, from parsed arguments to printed output."""

import json
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from latticeflow.cli import inspect, processes
from latticeflow.cli.analysis import analyse
from latticeflow.cli.compare import comparison, draw_comparison, read_entries
from latticeflow.cli.figures import draw_figures
from latticeflow.cli.folder import RunFolder, UsageError, ensemble_path
from latticeflow.cli.measuring import measure_ensemble, open_reference
from latticeflow.cli.report import as_json, table
from latticeflow.cli.results import Report
from latticeflow.cli.sampling import check_processes, help_sample
from latticeflow.cli.sampling import sample as sample_chains
from latticeflow.cli.status import described, state_of
from latticeflow.cli.training import help_train, needs_training, start_from
from latticeflow.cli.training import train as train_sampler
from latticeflow.cli.verifying import cut, open_checked, verify
from latticeflow.config import Config, ConfigError, load_config
from latticeflow.config.building import build_bare_action, build_sampler, build_trainer
from latticeflow.config.problems import Problem
from latticeflow.config.samples import check_samples
from latticeflow.flows.compiling import compiler
from latticeflow.observables import observables
from latticeflow.storage import default_export_path, export


def execute(options: Namespace) -> None:
    """Run a command, also as one of several processes."""
    command = COMMANDS[options.command]
    if processes.processes() == 1:
        return command(options)
    tasks = {processes.TRAIN: help_train, processes.SAMPLE: help_sample}
    return processes.together(command if command in (run, train, sample) else _refuse, options, tasks)


def _refuse(options: Namespace) -> None:
    several = processes.processes()
    raise UsageError(f"{several} processes are for `run`, `train` and `sample`; start {options.command} alone")


def run(options: Namespace) -> None:
    """Do the whole road and print the result table."""
    started = time.perf_counter()
    folder = _prepare(options, extend=options.extend, samples=True)
    with folder.lock():
        check_processes(folder)
        folder.begin()
        train_sampler(folder)
        sample_chains(folder)
        measure_ensemble(folder)
        report = analyse(folder)
        draw_figures(folder)
        folder.status("analysing", 1, 1)
        folder.status("done", 1, 1)
    _show(report, options)
    if not options.json:
        print(f"{folder.ensemble_file}, figures beside it; {time.perf_counter() - started:.0f} s")


def train(options: Namespace) -> None:
    folder = _prepare(options)
    with folder.lock():
        folder.begin()
        train_sampler(folder)
    print(f"trained: {folder.path}; next: latticeflow sample {folder.path}")


def sample(options: Namespace) -> None:
    folder = _open(options, extend=options.extend)
    processes.check_shared(folder.config, trains=False, samples=True)
    with folder.lock():
        check_processes(folder)
        sample_chains(folder)


def measure(options: Namespace) -> None:
    folder = _open(options)
    with folder.lock():
        measure_ensemble(folder, skip_damaged=options.skip_damaged)


def analyse_folder(options: Namespace) -> None:
    folder = _open(options)
    with folder.lock():
        report = analyse(folder, skip_damaged=options.skip_damaged)
    _show(report, options)


def plot(options: Namespace) -> None:
    print("\n".join(draw_figures(_open(options), skip_damaged=options.skip_damaged)))


def status(options: Namespace) -> None:
    folder = RunFolder.open(options.folder)
    found = state_of(folder)
    print(json.dumps(found, indent=2) if options.json else described(found, folder))


def verify_ensemble(options: Namespace) -> None:
    print(cut(options.run) if options.repair else verify(options.run))


def compare(options: Namespace) -> None:
    if options.out.suffix not in FIGURES or not options.out.parent.is_dir():
        kinds = ", ".join(FIGURES)
        raise UsageError(f"--out {options.out}: expected a name that ends in {kinds}, in a folder that exists")
    entries = read_entries(options.runs)
    print(comparison(entries))
    draw_comparison(entries, options.out)
    print(f"\n{options.out}")


def export_ensemble(options: Namespace) -> None:
    path = ensemble_path(options.run)
    ensemble, _ = open_checked(path)
    with ensemble:
        try:
            print(
                export(
                    ensemble, options.out or default_export_path(path, options.to), to=options.to, fields=options.fields
                )
            )
        except FileExistsError as error:
            raise UsageError(f"{error.filename} exists and is not overwritten; choose another by --out") from error
        except ValueError as error:
            raise UsageError(str(error)) from error


def check(options: Namespace) -> None:
    config = _load(options.config, options.overrides)
    _try_start(config)
    print(inspect.describe(config))


def info(options: Namespace) -> None:
    print(inspect.machine())


FIGURES = (".png", ".pdf", ".svg")
COMMANDS: dict[str, Callable[[Namespace], None]] = {
    "run": run,
    "train": train,
    "sample": sample,
    "measure": measure,
    "analyse": analyse_folder,
    "plot": plot,
    "compare": compare,
    "export": export_ensemble,
    "check": check,
    "info": info,
    "status": status,
    "verify": verify_ensemble,
}


def _load(path: Path, overrides: list[str], *, resume: bool = False) -> Config:
    """Load a configuration, check what only this machine and the theory can tell, set the number of threads."""
    config = load_config(path, overrides)
    problems = []
    try:
        float(torch.zeros((), device=config.run.device))  # "meta" makes tensors without numbers
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        problems.append(Problem("run.device", "a device of this machine", f'"{config.run.device}" ({reason})'))
    try:
        observables(build_bare_action(config), config.analysis.observables)
    except ValueError as error:
        problems.append(Problem("analysis.observables", "names of observables", str(error)))
    reference = config.analysis.reference
    if reference is not None and not Path(reference).exists():
        problems.append(Problem("analysis.reference", "an existing run folder or ensemble", f'"{reference}"'))
    samples = config.training.samples if config.training is not None else None
    if samples is not None and not Path(samples).is_file():
        problems.append(Problem("training.samples", "an existing ensemble file", f'"{samples}"'))
    if config.training is not None and config.training.compile and config.run.device == "cpu" and compiler() is None:
        problems.append(Problem("training.compile", "a C++ compiler on this machine (g++, or CXX)", "none"))
    start_from = config.training.start_from if config.training is not None else None
    if start_from is not None and not resume and not (Path(start_from) / "config.toml").is_file():
        problems.append(Problem("training.start_from", "the folder of an earlier run", f'"{start_from}"'))
    if problems:
        raise ConfigError(problems, str(path))
    processes.use_threads(config)
    return config


def _prepare(options: Namespace, *, extend: int = 0, samples: bool = False) -> RunFolder:
    config = _load(options.config, options.overrides, resume=options.resume)
    processes.check_shared(config, trains=needs_training(config), samples=samples)
    if config.analysis.reference is not None:
        open_reference(config).close()  # better refused now than after the chain
    if not options.resume:
        _try_start(config)
    out = options.out or options.config.with_suffix("")
    return RunFolder.create(out, config, resume=options.resume, extend=extend)


def _try_start(config: Config) -> None:
    """Raise what stands against `training.start_from` or the samples to learn from, before there is a folder."""
    if not needs_training(config):
        return
    if config.training.start_from is not None:
        start_from(config, build_trainer(config, build_sampler(config)))
    if config.clustered:
        check_samples(config, build_bare_action(config))


def _open(options: Namespace, *, extend: int = 0) -> RunFolder:
    folder = RunFolder.open(options.folder, extend=extend)
    processes.use_threads(folder.config)
    return folder


def _show(report: Report, options: Namespace) -> None:
    print(as_json(report) if options.json else table(report))
