"""Training steps with a non-finite loss: skipped, counted in the metrics, and the end of the training if they persist.

The plain deep flow that diverges on the Cauchy density is the one that arXiv:2402.16408 stabilises.
"""

import json
import math
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from latticeflow.actions import ScalarAction
from latticeflow.config import load_config
from latticeflow.config.building import build_sampler
from latticeflow.storage import load_checkpoint
from latticeflow.training import Trainer

FAILED, USAGE = 1, 2

PHI4 = """
[run]
seed = 3
threads = 1
[lattice]
shape = [4, 4]
[action]
kind = "scalar"
m2 = -4.0
lam = 8.0
[sampler]
kind = "stabilised"
layers = 2
hidden = [4]
[training]
steps = 9
batch = 8
window = 3
warmup = 0
checkpoint_every = 2
[chain]
replica = 4
draws = 8
block = 8
candidates = 16
"""

CAUCHY = """
[run]
seed = 1
threads = 1
[lattice]
shape = [50]
[action]
kind = "student_t"
[sampler]
kind = "stabilised"
layers = 32
conditioner = "dense"
hidden = [16]
[training]
steps = 40
batch = 16
warmup = 0
dtype = "float64"
[chain]
replica = 2
draws = 4
"""


def changing(*changes):
    return [word for change in changes for word in ("--set", change)]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def skipped(folder):
    return [record["step"] for record in metrics(folder) if record["skipped"]]


def newest(folder):
    return load_checkpoint(folder / "checkpoint" / "training")


def finite(weights):
    return all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())


def last_good(path, folder):
    """Return the sampler of a configuration with the weights of the newest checkpoint, which must fit and be finite."""
    sampler, state = build_sampler(load_config(path)), newest(folder).state
    assert finite(state["weights"])
    assert finite(state["best_weights"])
    sampler.load_state_dict(state["weights"])
    return sampler


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "phi4.toml"
    path.write_text(PHI4)
    return path


@pytest.fixture
def cauchy(tmp_path) -> Path:
    path = tmp_path / "cauchy.toml"
    path.write_text(CAUCHY)
    return path


@pytest.fixture
def spoil(monkeypatch):
    """Return a function that makes the action of the first field infinite, or another value, at the chosen steps."""

    def install(patch, steps, value=math.inf):
        now, take_step, action = [0], Trainer._take_step, ScalarAction.__call__

        def taken(trainer):
            now[0] = trainer.step + 1
            try:
                return take_step(trainer)
            finally:
                now[0] = 0

        def spoilt(self, phi):
            values = action(self, phi)
            return torch.cat([torch.full_like(values[:1], value), values[1:]]) if steps(now[0]) else values

        patch.setattr(Trainer, "_take_step", taken)
        patch.setattr(ScalarAction, "__call__", spoilt)

    return install


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_steps_that_fail_now_and_then_are_counted_in_the_metrics(program, config, spoil, monkeypatch, value):
    """The run goes to its end, and the loss of a bad step is written and stored as it was."""
    monkeypatch.setattr("latticeflow.cli.commands.draw_figures", lambda folder: [])
    spoil(monkeypatch, lambda step: step in (1, 4, 8), value)
    assert program("run", config).code == 0
    folder = config.with_suffix("")
    assert skipped(folder) == [1, 4, 8]
    assert [record["step"] for record in metrics(folder) if not math.isfinite(record["loss"])] == [1, 4, 8]
    assert all(math.isfinite(record["ess"]) for record in metrics(folder))
    with h5py.File(folder / "ensemble.h5") as file:
        assert (np.flatnonzero(~np.isfinite(file["training/loss"][:])) + 1).tolist() == [1, 4, 8]
        assert (np.flatnonzero(file["training/skipped"][:]) + 1).tolist() == [1, 4, 8]
        assert len(file["training/skipped"]) == 9
    assert finite(newest(folder).state["weights"])


def test_figures_are_drawn_with_skipped_steps(program, config, spoil, monkeypatch):
    spoil(monkeypatch, lambda step: step in (2, 9))
    assert program("run", config).code == 0
    assert (config.with_suffix("") / "figures" / "training.png").exists()


def test_skipped_steps_are_shown_to_the_user(program, config, spoil, monkeypatch):
    monkeypatch.setattr("latticeflow.cli.commands.draw_figures", lambda folder: [])
    spoil(monkeypatch, lambda step: step in (1, 4, 8))
    outcome, folder = program("run", config), config.with_suffix("")
    warning = "3 of 9 training steps had a non-finite loss or gradient: skipped"
    assert warning in outcome.out
    (line,) = (line for line in outcome.err.splitlines() if line.startswith("training 9/9"))
    assert line.endswith("skipped 3")
    assert json.loads(program("analyse", folder, "--json").out)["warnings"].count(warning) == 1


def test_nothing_is_said_where_no_step_is_skipped(program, config, monkeypatch):
    monkeypatch.setattr("latticeflow.cli.commands.draw_figures", lambda folder: [])
    outcome = program("run", config)
    assert "skipped" not in outcome.out + outcome.err
    with h5py.File(config.with_suffix("") / "ensemble.h5") as file:
        assert file["training/skipped"][:].tolist() == [0] * 9


def test_steps_that_keep_failing_stop_the_run_and_the_last_good_weights_are_named(program, config, spoil, monkeypatch):
    folder = config.with_suffix("")
    changes = changing("training.steps=60", "training.checkpoint_every=50")
    with monkeypatch.context() as patch:
        spoil(patch, lambda step: step > 5)
        outcome = program("run", config, *changes)
    assert outcome.code == FAILED
    *_, message = outcome.err.splitlines()
    assert message.startswith("latticeflow: step 25: 20 steps in a row had a non-finite loss or gradient")
    assert message.endswith(f"the weights of the last good step are in {folder / 'checkpoint' / 'training'}")
    assert "lower learning_rate (0.001)" in message
    assert skipped(folder) == list(range(6, 26))
    assert newest(folder).step == 25
    x, log_q = last_good(config, folder).sample(8, torch.Generator().manual_seed(1))
    assert torch.isfinite(x).all()
    assert torch.isfinite(log_q).all()
    assert not (folder / "ensemble.h5").exists()
    assert "is trained for 25 of 60 steps" in program("sample", folder).refused(USAGE)
    assert program("train", config, "--resume", *changes).code == 0
    assert [record["step"] for record in metrics(folder)] == list(range(1, 61))
    assert skipped(folder) == list(range(6, 26))


def test_the_weights_left_are_those_of_the_last_good_step(program, config, spoil, monkeypatch):
    """A training that was told to stop after step 5 has them too."""
    other = config.with_name("other")
    constant = ("training.decay=none", "training.steps=60")
    with monkeypatch.context() as patch:
        spoil(patch, lambda step: step > 5)
        assert program("train", config, *changing(*constant)).code == FAILED
    assert program("train", config, "--out", other, *changing("training.decay=none", "training.steps=5")).code == 0
    kept, expected = newest(config.with_suffix("")).state["weights"], newest(other).state["weights"]
    assert all(torch.equal(kept[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_plain_deep_flow_diverges_on_the_cauchy_density_and_says_so(program, cauchy, dtype):
    """No fault is put in: one step of this size moves 32 unclamped scales beyond all numbers."""
    changes = changing("sampler.clamp=none", "training.learning_rate=1", f"training.dtype={dtype}")
    outcome = program("train", cauchy, *changes)
    folder = cauchy.with_suffix("")
    assert outcome.code == FAILED
    *_, message = outcome.err.splitlines()
    assert re.fullmatch(r"latticeflow: step \d+: 20 steps in a row had .*; lower learning_rate \(1\) .*", message)
    assert message.endswith(str(folder / "checkpoint" / "training"))
    assert len(skipped(folder)) >= 20
    last_good(folder / "config.toml", folder)


def test_a_stabilised_flow_skips_no_step_there(program, cauchy):
    assert program("train", cauchy, *changing("training.steps=12", "training.learning_rate=1e-2")).code == 0
    folder = cauchy.with_suffix("")
    assert skipped(folder) == []
    assert all(math.isfinite(record["gradient_norm"]) for record in metrics(folder))


def test_a_training_that_fails_at_its_last_step_is_not_finished(program, config, spoil, monkeypatch):
    """Not even without the fault, as no step is left; what needs its weights refuses them."""
    changes, folder = changing("training.steps=25"), config.with_suffix("")
    with monkeypatch.context() as patch:
        spoil(patch, lambda step: step > 5)
        assert program("train", config, *changes).code == FAILED
        assert program("train", config, "--resume", *changes).code == FAILED
    outcome = program("train", config, "--resume", *changes)
    assert outcome.code == FAILED
    assert "step 25: 20 steps in a row had a non-finite loss or gradient" in outcome.err
    assert skipped(folder) == list(range(6, 26))
    assert f"{folder}: the training failed at its last step" in program("sample", folder).refused(USAGE)
    assert not (folder / "ensemble.h5").exists()
    out = config.with_name("next")
    program("train", config, "--out", out, *changing(f"training.start_from={folder}")).refused(USAGE)
    assert not out.exists()
