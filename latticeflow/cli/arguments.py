"""The command line's words."""

import argparse
from pathlib import Path

import latticeflow


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = argparse.ArgumentParser(
        prog="latticeflow",
        description="Lattice field theory ensembles from normalizing flows and exact accept/reject chains.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"latticeflow {latticeflow.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("run", "the whole road: train, sample, measure, analyse, plot"),
        ("train", "only train the sampler of a configuration"),
    ):
        command = _command(commands, name, text)
        _add_config(command)
        command.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: the file's name, no suffix)")
        command.add_argument("--resume", action="store_true", help="go on with an existing run folder")
        if name == "run":
            _add_extend(command)
            _add_json(command)
    for name, text in (
        ("sample", "run the chains of a trained run folder"),
        ("measure", "evaluate the observables on the stored ensemble"),
        ("analyse", "means, errors and diagnostics of the measured ensemble"),
        ("plot", "draw the figures again"),
    ):
        command = _command(commands, name, text)
        _add_folder(command)
        if name == "sample":
            _add_extend(command)
        else:
            command.add_argument("--skip-damaged", action="store_true", help="leave out draws that are damaged")
        if name == "analyse":
            _add_json(command)
    command = _command(commands, "status", "where a run stands; does not disturb it")
    _add_folder(command)
    _add_json(command)
    command = _command(commands, "verify", "check every stored configuration against its checksums")
    _add_run(command)
    command.add_argument("--repair", action="store_true", help="cut the ensemble after its last good block")
    command = _command(commands, "compare", "the same observables from several ensembles, side by side")
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder or ensemble file")
    command.add_argument("--out", type=Path, default=Path("compare.png"), metavar="FILE", help="figure (compare.png)")
    command = _command(commands, "export", "the numbers of an ensemble for other packages")
    _add_run(command)
    command.add_argument("--to", required=True, choices=("arviz", "pyerrors", "npz"), help="the package that reads it")
    command.add_argument("--out", type=Path, metavar="FILE", help="new file (default: beside the ensemble)")
    command.add_argument("--fields", action="store_true", help="with the configurations (npz only)")
    _add_config(_command(commands, "check", "validate a configuration and estimate its cost; nothing is stored"))
    _command(commands, "info", "versions, threads and devices")
    return top


def _command(commands: "argparse._SubParsersAction", name: str, text: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", type=Path, metavar="CONFIG", help="configuration file (TOML)")
    command.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides", help="change one key"
    )


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print the results as JSON at full precision")


def _add_folder(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", type=Path, metavar="DIR", help="run folder")


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", type=Path, metavar="RUN", help="run folder or ensemble file")


def _add_extend(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--extend",
        type=_count,
        default=0,
        metavar="N",
        help="N draws per chain more than chain.draws, in a further file",
    )


def _count(text: str) -> int:
    """Return a number of at least 1."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, found {text!r}")
    return int(text)
