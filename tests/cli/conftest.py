"""Small runs that several tests look at, and a way to use the program as from a shell."""

import json
import re
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest

from latticeflow.cli import main

U1 = """
[run]
seed = 1
threads = 1
[lattice]
shape = [4, 4]
[action]
kind = "u1"
beta = 2.0
[chain]
kernels = ["independence"]
replica = 8
draws = 64
block = 64
thermalisation = 0
[baseline]
samples = 64
beta = 2.0
"""


def cells(text: str) -> dict[str, list[str]]:
    lines = [re.split(r"\s{2,}", line) for line in text.splitlines() if "  " in line]
    return {first: rest for first, *rest in lines}


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def rows(self) -> dict[str, list[str]]:
        """The lines of its tables, cells by their first one; empty cells are not seen."""
        return cells(self.out)

    def refused(self, code: int) -> str:
        """Return the one plain line that the program refused with."""
        assert self.code == code
        assert re.fullmatch(r"latticeflow: [^\n]+\n", self.err)
        return self.err


def stages(folder: Path, *changes: str, until: str = "analyse") -> Path:
    """Do the stages of a run of the configuration above but for its figures, in a new folder, and return that."""
    config = folder.with_suffix(".toml")
    config.write_text(U1)
    assert main(["train", str(config), *(word for change in changes for word in ("--set", change))]) == 0
    for stage in ("sample", "measure", "analyse"):
        assert main([stage, str(folder)]) == 0
        if stage == until:
            break
    return folder


@pytest.fixture(scope="session")
def small_run() -> Callable[..., Path]:
    return stages


@pytest.fixture(scope="session")
def table_of() -> Callable[[str], dict[str, list[str]]]:
    return cells


@pytest.fixture(scope="session")
def program() -> Callable[..., Outcome]:
    """Return a function from words to the outcome of the command; an unexpected exception fails the test."""

    def call(*words: object) -> Outcome:
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
            code = main([str(word) for word in words])
        return Outcome(code, out.getvalue(), err.getvalue())

    return call


@pytest.fixture(scope="session")
def report(program) -> Callable[[Path], dict]:
    """Return a function from a run folder to its report."""
    return lambda folder: json.loads(program("analyse", folder, "--json").out)


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Three runs of one theory by different kernels, and one that trains; read only."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        "independence": stages(folder / "independence"),
        "hmc": stages(folder / "hmc", "run.seed=2", 'chain.kernels=["hmc"]', "chain.thermalisation=40"),
        "winding": stages(
            folder / "winding", "run.seed=3", 'chain.kernels=["hmc", "winding"]', "chain.thermalisation=40"
        ),
        "trained": stages(
            folder / "trained",
            "run.seed=4",
            'sampler.flow={kind = "gauge", layers = 2, hidden = [8]}',
            "training.steps=4",
            "training.batch=8",
        ),
    }


@pytest.fixture(scope="session")
def unmeasured(tmp_path_factory) -> Path:
    return stages(tmp_path_factory.mktemp("unmeasured") / "run", "chain.draws=4", until="sample")
