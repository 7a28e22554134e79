"""Pieces on a lattice from the command line: topological sectors, and the two signs of a broken symmetry."""

import json
import math
from pathlib import Path

import h5py
import numpy as np
import pytest

from latticeflow.cli import folder as folder_module
from latticeflow.exact import u1_charge_distribution, u1_plaquette
from latticeflow.storage import load_checkpoint

SECTORS = """
[run]
seed = 5
threads = 1
[lattice]
shape = [4, 4]
[action]
kind = "u1"
beta = 2.0
[sampler]
kind = "piecewise"
pieces = "charge"
[sampler.prior]
kind = "quenched"
beta = 1.5
[sampler.flow]
kind = "gauge"
hidden = [8]
bins = 4
[training]
steps = 6
batch = 16
warmup = 0
window = 3
learning_rate = 5e-3
checkpoint_every = 2
[chain]
replica = 32
draws = 64
[baseline]
samples = 64
beta = 2.0
"""

SIGNS = """
[run]
seed = 5
threads = 1
[lattice]
shape = [4, 4]
[action]
kind = "scalar"
m2 = -4.0
lam = 2.0
[sampler]
kind = "piecewise"
pieces = "sign"
[sampler.prior]
kind = "free_field"
m2 = 4.0
[sampler.flow]
kind = "coupling"
layers = 4
hidden = [8]
[training]
steps = 40
batch = 32
warmup = 0
window = 10
learning_rate = 5e-3
[chain]
replica = 32
draws = 64
[analysis]
observables = ["magnetisation", "abs_magnetisation", "phi_squared"]
"""
DEVIATIONS = 5  # once in two million runs, were the seeds not fixed


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    monkeypatch.setattr("latticeflow.cli.commands.draw_figures", lambda folder: [])


@pytest.fixture(scope="module")
def folders(program, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pieces")
    for name, text in (("sectors", SECTORS), ("signs", SIGNS)):
        (folder / f"{name}.toml").write_text(text)
        assert program("run", folder / f"{name}.toml").code == 0
    return {name: folder / name for name in ("sectors", "signs")}


def test_sectors_have_their_probabilities_and_the_exact_plaquette(folders, report):
    found = report(folders["sectors"])
    plaquette = found["observables"]["plaquette"]
    assert abs(plaquette["mean"] - u1_plaquette(2.0, (4, 4))) < DEVIATIONS * plaquette["error"]
    with h5py.File(folders["sectors"] / "ensemble.h5") as file:
        charge = file["observables/topological_charge"][:]
    exact = dict(zip(*u1_charge_distribution(2.0, (4, 4)), strict=True))
    for one in (-1, 0, 1):
        share = (charge == one).mean()
        assert abs(share - exact[one]) < DEVIATIONS * math.sqrt(4 * exact[one] / charge.size)
    assert np.abs(np.diff(charge, axis=1)).sum() > 100


def test_the_weights_of_the_sectors_are_stored_with_the_flow(folders):
    weights = load_checkpoint(folders["sectors"] / "checkpoint" / "training").state["best_weights"]
    charges, exact = u1_charge_distribution(2.0, (4, 4))
    stored = weights["prior.log_weights"].exp()
    assert stored.sum() == pytest.approx(1)
    assert stored[len(stored) // 2].item() == pytest.approx(exact[list(charges).index(0)], rel=0.1)


def test_both_signs_are_sampled_and_the_chain_changes_them(folders):
    with h5py.File(folders["signs"] / "ensemble.h5") as file:
        magnetisation = file["observables/magnetisation"][:]
    assert 0.35 < (magnetisation > 0).mean() < 0.65
    assert (np.diff(np.sign(magnetisation), axis=1) != 0).mean() > 0.1
    assert np.abs(magnetisation).mean() > 0.5


@pytest.mark.parametrize("name", ["sectors", "signs"])
def test_interrupted_training_goes_on_bit_for_bit(program, folders, tmp_path, monkeypatch, name):
    config = tmp_path / f"{name}.toml"
    config.write_text(SECTORS if name == "sectors" else SIGNS)
    save, calls = folder_module.save_checkpoint, []

    def failing(path, *arguments):
        calls.append(path.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return save(path, *arguments)

    changes = ("--set", "training.checkpoint_every=2")
    whole = tmp_path / "whole.toml"
    whole.write_text(config.read_text())
    assert program("train", whole, *changes).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "save_checkpoint", failing)
        assert program("train", config, *changes).code == 130
    assert program("train", config, *changes, "--resume").code == 0
    one, other = (
        load_checkpoint(path.with_suffix("") / "checkpoint" / "training").state["best_weights"]
        for path in (whole, config)
    )
    assert one.keys() == other.keys()
    assert all((one[key] == other[key]).all() for key in one)


def test_check_names_the_sampler(program, folders):
    for name, pieces in (("sectors", "charge"), ("signs", "sign")):
        assert f"pieces {pieces}, prior" in program("check", folders[name].with_suffix(".toml")).out
    assert json.loads(program("status", folders["signs"], "--json").out)["state"] == "finished"
