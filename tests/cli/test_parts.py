"""Flows that are trained by parts: the whole road, its continuation, what is stored and shown."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from latticeflow.cli import folder as folder_module
from latticeflow.cli.folder import RunFolder
from latticeflow.cli.parts import learner, part_lines, stored_parts
from latticeflow.cli.training import trained_sampler
from latticeflow.config.loading import parse_config
from latticeflow.samplers import PartwiseSampler
from latticeflow.storage import Ensemble, load_checkpoint

BAD_CONFIG, INTERRUPTED = 78, 130

PHI4 = """
[run]
seed = 7
threads = 1
[lattice]
shape = [4, 4]
[action]
kind = "scalar"
m2 = -4.0
lam = 8.0
[sampler]
kind = "stabilised"
layers = 6
hidden = [4]
[sampler.prior]
kind = "student_t"
[training]
steps = 12
batch = 16
window = 2
warmup = 2
checkpoint_every = 3
parts = [2, 4]
schedule = "alternate"
fine_tuning = 0.34
learning_rates = [1e-2, 5e-3]
[chain]
replica = 8
draws = 8
block = 4
candidates = 16
"""
LEARNED = [1, 2, 1, 2, 1, 2, 1, 2, 0, 0, 0, 0]
"""Who learns in the steps above."""
PLAIN = PHI4.replace('parts = [2, 4]\nschedule = "alternate"\nfine_tuning = 0.34\nlearning_rates = [1e-2, 5e-3]\n', "")
GAUGE = """
[run]
threads = 1
[lattice]
shape = [4, 4]
[action]
kind = "u1"
beta = 1.0
[sampler.flow]
kind = "gauge"
layers = 16
hidden = [4]
[training]
steps = 4
batch = 4
parts = [8, 8]
[chain]
kernels = ["independence", "flow_hmc"]
replica = 4
draws = 4
thermalisation = 2
[baseline]
samples = 16
beta = 1.0
"""


def changing(*changes):
    return [word for change in changes for word in ("--set", change)]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state(folder):
    return load_checkpoint(folder / "checkpoint" / "training").state


def assert_same(one, other):
    """Assert that two trainings are bitwise the same but for the seconds."""
    left, right = state(one), state(other)
    for weights in ("weights", "best_weights"):
        assert left[weights].keys() == right[weights].keys()
        assert all(torch.equal(value, right[weights][name]) for name, value in left[weights].items())
    assert left["best_ess"] == right["best_ess"]
    strip = [[record | {"seconds": 0} for record in metrics(folder)] for folder in (one, other)]
    assert strip[0] == strip[1]


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "phi4.toml"
    path.write_text(PHI4)
    return path


@pytest.fixture(scope="module")
def road(program, tmp_path_factory):
    """Return the folder of a whole run and what it printed."""
    path = tmp_path_factory.mktemp("road") / "phi4.toml"
    path.write_text(PHI4)
    outcome = program("run", path)
    assert outcome.code == 0, outcome.err
    return path.with_suffix(""), outcome


# ---------------------------------------------------------------- the whole road


def test_who_learned_is_in_the_metrics_and_in_the_file(road):
    folder, _ = road
    assert [record["part"] for record in metrics(folder)] == LEARNED
    with h5py.File(folder / "ensemble.h5") as file:
        np.testing.assert_array_equal(file["training/part"][:], LEARNED)
        assert file["fields/phi"].shape == (8, 8, 4, 4)
    assert {path.name for path in folder.glob("figures/*")} == {"training.png", "weights.png", "autocorrelation.png"}
    assert isinstance(trained_sampler(RunFolder.open(folder)), PartwiseSampler)


def test_the_report_tells_of_the_parts(road, report):
    folder, outcome = road
    ess = {record["part"]: record["ess"] for record in metrics(folder)}
    assert "parts: alternate" in outcome.out
    for name, layers, steps, part in (("1", "2", "4", 1), ("2", "4", "4", 2), ("end to end", "6", "4", 0)):
        assert f"  {name:<10}  {layers:<6}  {steps:<5}  {ess[part]:.4f}" in outcome.out.splitlines()
    found = report(folder)["parts"]
    assert found["schedule"] == "alternate"
    assert found["parts"][1] == {"layers": 4, "steps": 4, "ess": ess[2]}
    assert found["end_to_end"] == {"layers": 6, "steps": 4, "ess": ess[0]}


def test_a_run_of_the_whole_flow_says_nothing_of_parts(program, config, report):
    config.write_text(PLAIN)
    outcome = program("run", config, *changing("training.steps=3"))
    assert outcome.code == 0
    assert "parts" not in outcome.out
    assert report(config.with_suffix(""))["parts"] is None
    assert [record["part"] for record in metrics(config.with_suffix(""))] == [0, 0, 0]
    with h5py.File(config.with_suffix("") / "ensemble.h5") as file:
        assert "part" not in file["training"]


def test_links_and_other_kernels(program, config, report):
    """Metropolis and HMC in the latent space of the whole flow, on all the road."""
    config.write_text(GAUGE)
    assert program("run", config).code == 0
    assert [record["part"] for record in metrics(config.with_suffix(""))] == [1, 2, 1, 0]
    found = report(config.with_suffix(""))
    assert set(found["kernels"]) == {"independence", "flow_hmc"}
    assert [part["steps"] for part in found["parts"]["parts"]] == [2, 1]


def test_all_parts_at_once(program, config, report):
    """They learn in the same steps; the ESS of every prefix is told, in the metrics, the file and the report."""
    outcome = program("run", config, *changing("training.schedule=simultaneous"))
    assert outcome.code == 0
    found = report(config.with_suffix(""))["parts"]
    assert [part["steps"] for part in found["parts"]] == [8, 8]
    told = [record["part_ess"] for record in metrics(config.with_suffix(""))]
    assert [len(values) for values in told] == [2] * 8 + [0] * 4
    assert [part["ess"] for part in found["parts"]] == told[7]
    with Ensemble.open(config.with_suffix("") / "ensemble.h5") as ensemble:
        training = ensemble.training()
    assert training["ess_of_part_1"][:8].tolist() == [values[0] for values in told[:8]]
    assert np.isnan(training["ess_of_part_2"][8:]).all()
    assert any(line.startswith("  1           2       8      0.") for line in outcome.out.splitlines())


def test_samples_are_learned_from_by_parts(program, config, road, report):
    """The last part learns first, as it is the first to see a sample."""
    samples = road[0] / "ensemble.h5"
    changes = ["training.estimator=forward_kl", f'training.samples="{samples}"', "training.schedule=sequential"]
    assert program("run", config, *changing(*changes)).code == 0
    assert [record["part"] for record in metrics(config.with_suffix(""))] == [2] * 4 + [1] * 4 + [0] * 4
    assert report(config.with_suffix(""))["parts"]["parts"][0]["steps"] == 4


def test_check_names_the_parts_and_makes_nothing(program, config):
    outcome = program("check", config)
    assert outcome.code == 0
    assert "end to end; parts [2, 4], alternate, fine tuning 0.34" in outcome.out
    assert not config.with_suffix("").exists()
    assert "parts" not in program("check", config, *changing("training.schedule=end_to_end")).out


def test_parts_that_do_not_fit_are_one_clear_message(program, config):
    outcome = program("run", config, *changing("training.parts=[3, 3]", "training.learning_rates=[1e-3]"))
    assert outcome.code == BAD_CONFIG
    for words in ("training.parts: expected cuts after multiples of 2", "2, 4 layers", "training.learning_rates"):
        assert words in outcome.err
    assert not config.with_suffix("").exists()


# ---------------------------------------------------------------- progress


def test_the_progress_says_who_learns(program, config, monkeypatch):
    monkeypatch.setattr("latticeflow.cli.progress.SECONDS_BETWEEN_LINES", -1)
    lines = [line for line in program("train", config).err.splitlines() if line.startswith("training ")]
    said = ["part 1  loss", "part 2  loss", "end to end  loss"]
    assert [said.index(words) for line in lines for words in said if words in line] == [(k - 1) % 3 for k in LEARNED]


def test_the_learner_by_the_schedule():
    whole, cut, together = (
        parse_config(text, overrides)
        for text, overrides in ((PLAIN, []), (PHI4, []), (PHI4, ["training.schedule=simultaneous"]))
    )
    assert [learner(whole, 0), learner(cut, 2), learner(cut, 0)] == ["", "part 2  ", "end to end  "]
    assert [learner(together, 2), learner(together, 0)] == ["all parts  ", "end to end  "]


def test_parts_without_a_step_have_no_ess(road):
    """There may be fewer steps than parts."""
    folder, _ = road

    class Stored:
        def training(self):
            return {"part": np.array([1, 1, 0]), "ess": np.array([0.1, 0.2, 0.5])}

    found = stored_parts(RunFolder.open(folder).config, Stored())
    assert [(part.steps, part.ess) for part in found.parts] == [(2, 0.2), (0, None)]
    assert part_lines(found)[1:] == [["1", "2", "2", "0.2000"], ["2", "4", "0", ""], ["end to end", "6", "1", "0.5000"]]


# ---------------------------------------------------------------- continuing


def interrupted(program, monkeypatch, *words, at, stored):
    """Run a command that is interrupted when it wants a checkpoint for the given step, which is `stored` or lost."""
    save = folder_module.save_checkpoint

    def failing(path, kept, step):
        if stored or step != at:
            save(path, kept, step)
        if step == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "save_checkpoint", failing)
        assert program(*words).code == INTERRUPTED


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("at", [3, 9])
def test_resume_is_the_same_training(program, road, config, monkeypatch, at, stored):
    """Between two turns, and over the change to the end, which some steps are taken again for."""
    interrupted(program, monkeypatch, "train", config, at=at, stored=stored)
    folder = config.with_suffix("")
    assert len(metrics(folder)) == at
    if stored or at > 3:
        reached = at if stored else at - 3
        assert program("status", folder).rows["training"] == [f"checkpoint at step {reached} of 12"]
    assert program("train", config, "--resume").code == 0
    assert_same(road[0], folder)


@pytest.mark.parametrize("schedule", ["sequential", "simultaneous"])
def test_resume_of_other_schedules(program, config, monkeypatch, schedule):
    changes = changing(f"training.schedule={schedule}")
    whole = config.with_name("whole")
    assert program("train", config, "--out", whole, *changes).code == 0
    interrupted(program, monkeypatch, "train", config, *changes, at=6, stored=True)
    assert program("train", config, "--resume", *changes).code == 0
    assert_same(whole, config.with_suffix(""))


def test_a_resumed_run_is_the_same_ensemble(program, road, config, monkeypatch):
    interrupted(program, monkeypatch, "run", config, at=9, stored=False)
    assert program("run", config, "--resume").code == 0
    with h5py.File(road[0] / "ensemble.h5") as one, h5py.File(config.with_suffix("") / "ensemble.h5") as other:
        for name in ("fields/phi", "history/log_weight", "training/part", "training/ess", "checksum/crc32"):
            np.testing.assert_array_equal(one[name][:], other[name][:])


@pytest.mark.parametrize(
    "change", ["training.parts=[4, 2]", "training.schedule=sequential", "training.fine_tuning=0.5"]
)
def test_resume_with_other_parts_is_refused(program, config, monkeypatch, change):
    interrupted(program, monkeypatch, "train", config, at=3, stored=True)
    outcome = program("train", config, "--resume", *changing(change))
    assert outcome.code == BAD_CONFIG
    assert change.partition("=")[0] in outcome.err


# ---------------------------------------------------------------- starting from other weights


@pytest.mark.parametrize(("first", "second"), [(PLAIN, PHI4), (PHI4, PLAIN)])
def test_weights_are_the_same_with_and_without_parts(program, config, monkeypatch, first, second):
    """A run begins with those of the other, and keeps them where no step is taken."""
    config.write_text(first)
    other = config.with_name("other")
    assert program("train", config, "--out", other).code == 0
    config.write_text(second)
    monkeypatch.setattr(
        "latticeflow.actions.ScalarAction.__call__", lambda action, phi: phi.flatten(1).sum(1).double() * torch.inf
    )
    assert program("train", config, *changing(f"training.start_from={other}")).code == 0
    assert all(record["skipped"] for record in metrics(config.with_suffix("")))
    kept, best = state(config.with_suffix(""))["best_weights"], state(other)["best_weights"]
    assert kept.keys() == best.keys()
    assert all(torch.equal(value, best[name]) for name, value in kept.items())
