"""Energy-based flows from the command line: the whole road, its exact continuation, averages, and singular weights."""

import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from latticeflow.cli import folder as folder_module
from latticeflow.cli.folder import RunFolder
from latticeflow.cli.training import trained_sampler
from latticeflow.samplers import EBFlowSampler
from latticeflow.storage import load_checkpoint
from latticeflow.training import Trainer

FAILED, INTERRUPTED = 1, 130

HEAD = """
[run]
seed = 5
threads = 1
[lattice]
shape = [4, 4]
[chain]
replica = 8
draws = 16
block = 8
candidates = 32
[training]
steps = 6
batch = 16
warmup = 0
window = 3
checkpoint_every = 2
learning_rate = 1e-2
"""
FREE = HEAD + 'estimator = "explicit"\n[action]\nkind = "scalar"\nm2 = 1.0\nlam = 0.0\n[sampler]\nkind = "ebflow"\n'
GLOW = FREE + '[sampler.flow]\nkind = "glow"\nlevels = 1\nsteps = 1\nhidden = 4\n'
PHI4 = f"""{HEAD}
estimator = "explicit"
fine_tuning_estimator = "path"
fine_tuning = 0.5
fine_tuning_rate = 5e-3
ema = 0.9
[action]
kind = "scalar"
m2 = -4.0
lam = 8.0
[sampler]
kind = "ebflow"
[sampler.flow]
kind = "linear"
linear = "convolution"
activation = "cubic"
symmetry = "z2"
"""
MOONS = f"""{HEAD.replace("[4, 4]", "[2]")}
draws = 200
estimator = "ESTIMATOR"
[action]
kind = "two_moons"
[sampler]
kind = "ebflow"
"""
ROADS = {
    "explicit": (FREE, "flow linear of 2 layers, 544 parameters", "explicit, 6 steps of 16"),
    "glow": (GLOW, "flow glow of 1 level, ", "explicit, 6 steps of 16"),
    "sliced": (MOONS.replace("ESTIMATOR", "sliced"), "flow linear of 2 layers, 12 parameters", "sliced, "),
    "denoising": (MOONS.replace('"ESTIMATOR"', '"denoising"\nnoise = 0.2'), "flow linear of 2 layers", "denoising, "),
    "finite_difference": (
        MOONS.replace('"ESTIMATOR"', '"finite_difference"\ndifference = 0.05'),
        "flow linear of 2 layers",
        "finite_difference, ",
    ),
}


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state(folder):
    return load_checkpoint(folder / "checkpoint" / "training").state


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.fixture
def without_figures(monkeypatch):
    monkeypatch.setattr("latticeflow.cli.commands.draw_figures", lambda folder: [])


@pytest.fixture
def write(tmp_path):
    def put(text: str) -> Path:
        path = tmp_path / "run.toml"
        path.write_text(text)
        return path

    return put


@pytest.fixture(scope="module")
def staged(program, tmp_path_factory) -> Path:
    """Return the folder of a run in two stages, with averages and figures."""
    path = tmp_path_factory.mktemp("staged") / "phi4.toml"
    path.write_text(PHI4)
    outcome = program("run", path)
    assert outcome.code == 0, outcome.err
    return path.with_suffix("")


# ---------------------------------------------------------------- the whole road


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize(("text", "sampler", "training"), ROADS.values(), ids=ROADS)
def test_every_estimator_and_flow_goes_the_whole_road(program, write, text, sampler, training):
    config = write(text)
    rows = dict(line.split(maxsplit=1) for line in program("check", config).out.splitlines())
    assert sampler in rows["sampler"]
    assert rows["training"].startswith(training)
    assert rows["ensemble"].endswith(" MB")
    assert rows["time"].startswith("about ")
    assert not config.with_suffix("").exists()
    outcome, folder = program("run", config), config.with_suffix("")
    assert outcome.code == 0, outcome.err
    assert isinstance(trained_sampler(RunFolder.open(folder)), EBFlowSampler)
    assert [record["step"] for record in metrics(folder)] == list(range(1, 7))
    assert all(np.isfinite(record["loss"]) and 0 < record["ess"] <= 1 for record in metrics(folder))
    assert not any(record["skipped"] for record in metrics(folder))
    with h5py.File(folder / "ensemble.h5") as file:
        assert np.isfinite(file["history/log_weight"][:]).all()
    for command in ("status", "verify", "analyse"):
        assert program(command, folder).code == 0


def test_stages_go_the_whole_road(program, staged):
    assert {path.name for path in staged.glob("figures/*")} == {"training.png", "weights.png", "autocorrelation.png"}
    rates = [record["learning_rate"] for record in metrics(staged)]
    assert rates[0] == 1e-2
    assert rates[3] == pytest.approx(5e-3)
    assert all(record["part"] == 0 for record in metrics(staged))
    for command in ("status", "verify", "analyse", "plot"):
        assert program(command, staged).code == 0


def test_check_tells_of_both_stages(program, write):
    (line,) = (line for line in program("check", write(PHI4)).out.splitlines() if line.startswith("training"))
    assert line.split(maxsplit=1)[1].startswith("explicit, 6 steps of 16")
    assert line.endswith("; fine tuning 0.5 by path")


@pytest.mark.usefixtures("without_figures")
def test_stages_one_by_one_give_the_same_as_run(program, staged, write):
    config = write(PHI4)
    assert program("train", config).code == 0
    assert program("sample", config.with_suffix("")).code == 0
    assert_same(staged, config.with_suffix(""))


@pytest.mark.usefixtures("without_figures")
def test_the_chain_may_move_in_the_latent_space(program, write):
    config, short = write(FREE), ("training.steps=2", "chain.thermalisation=2", "chain.draws=4", "chain.block=4")
    changes = ("chain.kernels=['flow_hmc']", "chain.flow_hmc.step_size=0.5", *short)
    assert program("run", config, *(word for change in changes for word in ("--set", change))).code == 0
    with h5py.File(config.with_suffix("") / "ensemble.h5") as file:
        assert file["history/accepted"][:].any()


# ---------------------------------------------------------------- averages, and continuing


def test_the_weights_that_are_kept_are_averages(program, write):
    """The best window is the only one, at whose end the average is stored beside the last weights."""
    config = write(PHI4)
    assert program("train", config, "--set", "training.window=6").code == 0
    kept, last = state(config.with_suffix(""))["best_weights"], state(config.with_suffix(""))["weights"]
    assert equal(kept, state(config.with_suffix(""))["average"]["weights"])
    assert not equal(kept, last)
    sampler = trained_sampler(RunFolder.open(config.with_suffix("")))
    assert equal(dict(sampler.state_dict()), kept)


def assert_same(one, other):
    """Assert that two runs are bitwise the same but for the seconds."""
    strip = [[record | {"seconds": 0} for record in metrics(folder)] for folder in (one, other)]
    assert strip[0] == strip[1]
    left, right = state(one), state(other)
    assert equal(left["weights"], right["weights"])
    assert equal(left["best_weights"], right["best_weights"])
    assert equal(left["average"]["weights"], right["average"]["weights"])
    assert left["average"]["updates"] == right["average"]["updates"]
    with h5py.File(one / "ensemble.h5") as first, h5py.File(other / "ensemble.h5") as second:
        for name in ("fields/phi", "history/log_weight", "training/loss", "checksum/crc32"):
            np.testing.assert_array_equal(first[name][:], second[name][:])


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize(("stage", "failing_save"), [("training", 2), ("training", 3), ("chain", 2)])
def test_a_resumed_run_is_the_same_run(program, staged, write, monkeypatch, stage, failing_save):
    """Interrupted within the second stage of training, or taken up before it, and in the chain."""
    config, calls, save = write(PHI4), [], folder_module.save_checkpoint

    def failing(path, *arguments):
        calls.extend([1] if path.name == stage else [])
        if len(calls) == failing_save:
            raise KeyboardInterrupt
        return save(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "save_checkpoint", failing)
        assert program("run", config).code == INTERRUPTED
    assert program("run", config, "--resume").code == 0
    assert_same(staged, config.with_suffix(""))


@pytest.mark.usefixtures("without_figures")
def test_chains_by_an_untrained_glow_are_exactly_resumed(program, write, tmp_path, monkeypatch):
    """Its normalisation waits for a first batch in training, which the draws of a chain are not."""
    head, _, tail = GLOW.partition("[training]")
    config, whole, save = write(head + "[action]" + tail.partition("[action]")[2]), tmp_path / "whole", []
    assert program("run", config, "--out", whole).code == 0

    def failing(path, *arguments, original=folder_module.save_checkpoint):
        save.append(path)
        if len(save) == 3:
            raise KeyboardInterrupt
        return original(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "save_checkpoint", failing)
        assert program("run", config).code == INTERRUPTED
    assert program("run", config, "--resume").code == 0
    with h5py.File(whole / "ensemble.h5") as one, h5py.File(config.with_suffix("") / "ensemble.h5") as other:
        for name in ("fields/phi", "history/log_weight"):
            np.testing.assert_array_equal(one[name][:], other[name][:])


# ---------------------------------------------------------------- singular weights


@pytest.mark.parametrize("estimator", ["explicit", "path"])
def test_a_training_whose_weights_become_singular_ends_with_one_message(program, write, monkeypatch, estimator):
    settle = Trainer.settle

    def spoilt(trainer, record):
        settle(trainer, record)
        if trainer.step == 3:
            with torch.no_grad():
                trainer.sampler.flow.layers[2].weight.zero_()

    monkeypatch.setattr(Trainer, "settle", spoilt)
    config = write(FREE)
    outcome, folder = program("run", config, "--set", f"training.estimator={estimator}"), config.with_suffix("")
    assert outcome.code == FAILED
    *_, message = outcome.err.splitlines()
    assert message.startswith("latticeflow: step 4: the weights of layers.2, Dense, are singular")
    assert "lower learning_rate (0.01)" in message
    assert message.endswith(f"are in {folder / 'checkpoint' / 'training'}")
    assert load_checkpoint(folder / "checkpoint" / "training").step == 3
    assert [record["step"] for record in metrics(folder)] == [1, 2, 3]
    assert not (folder / "ensemble.h5").exists()


@pytest.mark.parametrize("command", ["check", "run"])
def test_what_cannot_be_drawn_from_is_one_message(program, write, monkeypatch, command):
    monkeypatch.setattr(torch.nn.init, "orthogonal_", torch.nn.init.zeros_)
    head, _, tail = FREE.partition("[training]")
    outcome = program(command, write(head + "[action]" + tail.partition("[action]")[2]))
    assert outcome.code == FAILED
    assert re.search(r"(?m)^latticeflow: the weights of layers\.\d, Dense, are singular: .*\n\Z", outcome.err)
