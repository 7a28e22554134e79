"""The README's 'Reading without this package' does what it says, in a process that never sees the package or torch."""

import importlib.util
import json
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import h5py
import numpy as np
import pytest

from latticeflow.cli import main

README = Path(__file__).parents[1] / "README.md"
TITLE = "Reading without this package"
CONFIG = """
[run]
seed = 5
threads = 1
[lattice]
shape = [4, 4]
[action]
kind = "schwinger"
beta = 1.0
kappa = 0.2
[sampler.prior]
kind = "quenched"
[chain]
kernels = ["independence"]
replica = 4
draws = 32
block = 16
thermalisation = 0
candidates = 32
"""
ALONE = """
import sys
foreign = [name for name in ("latticeflow", "torch") if name in sys.modules]
assert not foreign, foreign
"""
XARRAY = ("xarray", "h5netcdf")


def program(*words: object) -> str:
    """Run a command as from a shell and return what it printed."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = main([str(word) for word in words])
    assert code == 0, (words, err.getvalue())
    return out.getvalue()


def blocks() -> list[str]:
    """The Python of the section."""
    section = re.search(rf"^#+ {TITLE}$(.*?)(?=^## |\Z)", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    if section is None:
        pytest.fail(f"the README has no section {TITLE!r}")
    found = re.findall(r"^```python\n(.*?)^```", section[1], flags=re.MULTILINE | re.DOTALL)
    if not found:
        pytest.fail(f"the section {TITLE!r} has no Python")
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder in which runs/schwinger-8x8 is a finished run with a further file."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "run.toml").write_text(CONFIG)
    run = folder / "runs/schwinger-8x8"
    program("train", folder / "run.toml", "--out", run)
    program("sample", run)
    program("sample", run, "--extend", 16)
    program("measure", run)
    program("analyse", run)
    return folder


def isolated(code: str, home: Path) -> str:
    """Run code by itself: no user site, no environment, nothing of the current folder on the path."""
    command = [sys.executable, "-I", "-W", "error", "-c", code + ALONE]
    finished = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def stored(home: Path) -> dict[str, float]:
    """The mean plaquette as it is stored: measured draw by draw, and analysed."""
    run = home / "runs/schwinger-8x8"
    values = []
    for name in ("ensemble.h5", "ensemble-2.h5"):
        with h5py.File(run / name) as file:
            values.append(file["observables/plaquette"][:, : file["state/n_committed"][()]])
    with h5py.File(run / "ensemble.h5") as file:
        return {
            "observable": np.concatenate(values, axis=1).mean(),
            "analysis": file["analysis/plaquette"].attrs["mean"],
        }


def test_the_stored_plaquettes_agree(home):
    report = json.loads(program("analyse", home / "runs/schwinger-8x8", "--json"))
    assert stored(home)["observable"] == pytest.approx(stored(home)["analysis"], rel=1e-12)
    assert stored(home)["analysis"] == report["observables"]["plaquette"]["mean"]


def numbers(text: str) -> list[float]:
    return [float(word) for word in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", text)]


def matching(output: str, home: Path) -> bool:
    """Whether a number was printed that is the stored plaquette, of all draws and both files."""
    expected = stored(home)
    return any(all(abs(found - value) < 1e-9 for value in expected.values()) for found in numbers(output))


def test_every_block_runs_by_itself_or_after_those_before_it(home):
    """A reader copies them from top to bottom."""
    code = blocks()
    if not all(map(importlib.util.find_spec, XARRAY)):
        code = [block for block in code if "xarray" not in block]
    assert matching(isolated("\n".join(code), home), home)


def test_the_first_block_alone_prints_the_plaquette_of_all_draws(home):
    assert matching(isolated(blocks()[0], home), home)


@pytest.mark.skipif(not all(map(importlib.util.find_spec, XARRAY)), reason="xarray and h5netcdf are not installed")
def test_there_is_a_block_for_xarray(home):
    assert any("xarray" in block and "h5netcdf" in block for block in blocks())


READER = """
import glob, zlib
import h5py, numpy as np

links = []
for path in sorted(glob.glob("runs/schwinger-8x8/ensemble*.h5"), key=lambda path: (len(path), path)):
    with h5py.File(path) as file:
        n = file["state/n_committed"][()]
        links.append(file["fields/links"][:, :n])
        for chain, draw in np.ndindex(len(links[-1]), n):
            assert zlib.crc32(links[-1][chain, draw].tobytes()) == file["checksum/crc32"][chain, draw]
time, space = np.moveaxis(np.concatenate(links, axis=1), 2, 0)
angle = time + np.roll(space, -1, -2) - np.roll(time, -1, -1) - space
print(float(np.cos(angle).mean()))
"""


def test_a_reader_of_these_few_lines_finds_the_plaquette(home):
    """What the section promises, independent of its words."""
    assert matching(isolated(READER, home), home)


XARRAY_READER = """
import h5py, xarray
parts = []
for path in ("runs/schwinger-8x8/ensemble.h5", "runs/schwinger-8x8/ensemble-2.h5"):
    with h5py.File(path) as file:
        n = int(file["state/n_committed"][()])
    with xarray.open_dataset(path, engine="h5netcdf", group="observables") as data:
        parts.append(data["plaquette"].isel(draw=slice(n)).load())
print(float(xarray.concat(parts, dim="draw").mean()))
"""


@pytest.mark.skipif(not all(map(importlib.util.find_spec, XARRAY)), reason="xarray and h5netcdf are not installed")
def test_xarray_reads_the_groups(home):
    assert matching(isolated(XARRAY_READER, home), home)


@pytest.mark.parametrize("code", ["import latticeflow", "import torch", "raise ValueError"])
def test_a_module_that_should_not_be_there_and_an_error_are_seen(home, code):
    with pytest.raises(AssertionError):
        isolated(f"{code}\n", home)


def test_another_number_is_seen(home):
    assert not matching("plaquette 0.123456789\n", home)


def test_the_first_file_alone_is_not_all(home):
    """Why the section has to say that there are further files."""
    (found,) = numbers(isolated(READER.replace("ensemble*.h5", "ensemble.h5"), home))
    assert abs(found - stored(home)["analysis"]) > 1e-9
