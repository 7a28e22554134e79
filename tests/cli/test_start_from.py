"""Training that begins with the weights of another run, of a smaller lattice for instance."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from latticeflow.cli import folder as folder_module
from latticeflow.cli.folder import RunFolder
from latticeflow.config.building import build_sampler
from latticeflow.flows import weights_for
from latticeflow.storage import load_checkpoint

BAD_DATA, BAD_CONFIG, USAGE, INTERRUPTED = 65, 78, 2, 130

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
layers = 4
hidden = [8]
transform = "spline"
bound = 2.0
symmetry = "z2"
sites = "shared"
[sampler.prior]
kind = "free_field"
m2 = 0.67
[training]
steps = 60
batch = 64
warmup = 10
window = 10
learning_rate = 1e-2
[chain]
replica = 4
draws = 4
"""

U1 = """
[lattice]
shape = [4, 4]
[action]
kind = "u1"
beta = 1.0
[sampler.prior]
kind = "haar"
[sampler.flow]
kind = "gauge"
layers = 2
hidden = [4]
conditioner = "{conditioner}"
[training]
steps = 3
batch = 16
learning_rate = 1e-2
[chain]
replica = 4
draws = 4
"""

NEXT = ("lattice.shape=[8, 8]", "training.steps=6", "training.window=2", "training.learning_rate=1e-4")


def changing(*changes):
    return [word for change in changes for word in ("--set", change)]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state(folder):
    return load_checkpoint(folder / "checkpoint" / "training").state


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def trained(program, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("small") / "phi4.toml"
    path.write_text(PHI4)
    assert program("train", path).code == 0
    return path.with_suffix("")


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "phi4.toml"
    path.write_text(PHI4)
    return path


def test_a_larger_lattice_starts_with_the_weights_of_a_smaller_one(program, trained, config):
    """The ESS of the last step on 4x4 is there in the first on the same lattice, and much of it on 8x8."""
    start = f"training.start_from={trained}"
    first = {}
    for name, changes in {
        "same": ["lattice.shape=[4, 4]", start],
        "larger": [start],
        "scratch": [],
        "small scratch": ["lattice.shape=[4, 4]"],
    }.items():
        out = config.with_name(name)
        assert program("train", config, "--out", out, *changing(*NEXT, *changes)).code == 0
        first[name] = metrics(out)[1]["ess"]
    best = state(trained)["best_ess"]
    assert abs(first["same"] - best) < 0.25
    assert first["same"] > 2 * first["small scratch"]
    assert first["larger"] > 2 * first["scratch"]


@pytest.mark.parametrize("shape", ["[4, 4]", "[8, 8]", "[4, 6]"])
def test_the_weights_are_the_best_ones_of_the_other_run(program, trained, config, shape, monkeypatch):
    """Without a step that moves them, as every loss is made infinite."""
    monkeypatch.setattr(
        "latticeflow.actions.ScalarAction.__call__", lambda action, phi: phi.flatten(1).sum(1).double() * torch.inf
    )
    changes = (*NEXT, f"lattice.shape={shape}", f"training.start_from={trained}")
    assert program("train", config, *changing(*changes)).code == 0
    assert all(record["skipped"] for record in metrics(config.with_suffix("")))
    assert same(state(config.with_suffix(""))["weights"], state(trained)["best_weights"])
    assert same(state(config.with_suffix(""))["best_weights"], state(trained)["best_weights"])


@pytest.mark.parametrize("conditioner", ["global", "local"])
def test_a_gauge_flow_goes_on_with_the_nearest_images(program, tmp_path, conditioner):
    path = tmp_path / "u1.toml"
    path.write_text(U1.format(conditioner=conditioner))
    assert program("train", path).code == 0
    small, larger = path.with_suffix(""), tmp_path / "larger"
    changes = ["lattice.shape=[8, 8]", f"training.start_from={small}", "training.learning_rate=1e-12"]
    assert program("train", path, "--out", larger, *changing(*changes)).code == 0
    there, flow = (build_sampler(RunFolder.open(folder).config) for folder in (larger, small))
    flow.load_state_dict(state(small)["best_weights"])
    torch.testing.assert_close(state(larger)["weights"], weights_for(there, flow), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("sampler.conditioner=dense", ["network.layers.0.linear.weight is [8, 4], expected [8, 32]", "more"]),
        ("sampler.sites=own", ["flow.layers.5.log_scale is [], expected [8, 8]"]),
        ("sampler.layers=2", ["flow.layers.2", "expected absent", "more"]),
        ("sampler.symmetry=none", ["flow.layers.5.shift is absent, expected []"]),
        ('sampler.prior={kind = "student_t", sites = "shared"}', ["prior.log_degrees_of_freedom is absent"]),
        ("lattice.shape=[8, 8, 8]", ["flow.layers.0", "expected [8, 14]"]),
    ],
)
def test_weights_that_do_not_fit_are_refused(program, trained, config, change, words):
    outcome = program("train", config, *changing(*NEXT, f"training.start_from={trained}", change))
    error = outcome.refused(BAD_DATA)
    assert error.startswith(f"latticeflow: training.start_from: {trained}: ")
    assert all(word in error for word in words), error
    for command in ("check", "run"):
        again = program(command, config, *changing(*NEXT, f"training.start_from={trained}", change))
        assert again.refused(BAD_DATA) == error
    assert not config.with_suffix("").exists()


def test_check_takes_a_start_that_fits(program, trained, config):
    outcome = program("check", config, *changing(*NEXT, f"training.start_from={trained}"))
    assert outcome.code == 0
    assert not config.with_suffix("").exists()


def test_a_folder_that_is_not_there_is_refused_before_anything_is_made(program, config):
    outcome = program("run", config, *changing("training.start_from=nowhere"))
    assert outcome.code == BAD_CONFIG
    assert 'training.start_from: expected the folder of an earlier run, found "nowhere"' in outcome.err
    assert program("check", config, *changing("training.start_from=nowhere")).code == BAD_CONFIG
    config.with_name("empty").mkdir()
    assert program("run", config, *changing(f"training.start_from={config.with_name('empty')}")).code == BAD_CONFIG
    assert not config.with_suffix("").exists()


def interrupted(program, monkeypatch, *words, at: int):
    """Run a command that is interrupted when it wants a checkpoint of the training for the given step."""
    save = folder_module.save_checkpoint

    def failing(path, kept, step):
        save(path, kept, step)
        if step == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "save_checkpoint", failing)
        assert program(*words).code == INTERRUPTED


def test_an_unfinished_training_is_refused(program, config, monkeypatch):
    other = config.with_name("other")
    short = ("training.steps=6", "training.checkpoint_every=2")
    interrupted(program, monkeypatch, "train", config, "--out", other, *changing(*short), at=2)
    start = changing(*short, f"training.start_from={other}")
    error = program("train", config, *start).refused(USAGE)
    assert f"{other} is trained for 2 of 6 steps" in error
    assert "--resume" in error
    assert program("check", config, *start).refused(USAGE) == error
    assert not config.with_suffix("").exists()
    assert program("train", config, "--out", other, "--resume", *changing(*short)).code == 0
    assert program("train", config, *start).code == 0


@pytest.mark.parametrize("changes", [["training.steps=0"], ["chain.kernels=['hmc']"], None])
def test_a_run_that_was_not_trained_is_refused(program, config, changes):
    """Without steps, without a kernel that uses the sampler, or without the section."""
    other = config.with_name("other")
    if changes is None:
        head, _, tail = PHI4.partition("[training]")
        config.with_name("plain.toml").write_text(f"{head}[chain]{tail.partition('[chain]')[2]}")
        assert program("train", config.with_name("plain.toml"), "--out", other).code == 0
    else:
        assert program("train", config, "--out", other, *changing(*changes)).code == 0
    error = program("train", config, *changing(f"training.start_from={other}")).refused(USAGE)
    assert error == f"latticeflow: training.start_from: {other} was not trained\n"
    assert not config.with_suffix("").exists()


def test_resume_goes_on_without_the_other_run(program, trained, config, monkeypatch):
    """The other run is gone by then; the continued training is bitwise the undisturbed one."""
    other = config.with_name("other")
    shutil.copytree(trained, other)
    changes = changing(*NEXT, "training.checkpoint_every=2", f"training.start_from={other}")
    whole, folder = config.with_name("whole"), config.with_suffix("")
    assert program("train", config, "--out", whole, *changes).code == 0
    interrupted(program, monkeypatch, "train", config, *changes, at=2)
    shutil.rmtree(other)
    assert program("train", config, "--resume", *changes).code == 0
    assert same(state(folder)["best_weights"], state(whole)["best_weights"])
    assert [r | {"seconds": 0} for r in metrics(folder)] == [r | {"seconds": 0} for r in metrics(whole)]
    assert program("sample", folder).code == 0


def test_resume_before_the_first_checkpoint_still_needs_the_other_run(program, trained, config, monkeypatch):
    other = config.with_name("other")
    shutil.copytree(trained, other)
    changes = changing(*NEXT, f"training.start_from={other}")
    with monkeypatch.context() as patch:
        patch.setattr("latticeflow.cli.training.build_trainer", lambda *arguments: interrupt())
        assert program("train", config, *changes).code == INTERRUPTED
    moved = other.rename(other.with_name("moved"))
    assert f"{other} is not a run folder" in program("train", config, "--resume", *changes).refused(USAGE)
    moved.rename(other)
    assert program("train", config, "--resume", *changes).code == 0


def interrupt():
    raise KeyboardInterrupt


def test_resume_with_another_start_is_refused(program, trained, config):
    changes = changing(*NEXT, f"training.start_from={trained}")
    assert program("train", config, *changes).code == 0
    other = changing(*NEXT, f"training.start_from={config.with_suffix('')}")
    outcome = program("train", config, "--resume", *other)
    assert outcome.code == BAD_CONFIG
    assert "training.start_from" in outcome.err


def test_a_damaged_checkpoint_of_the_other_run_is_refused(program, trained, config):
    other = config.with_name("other")
    shutil.copytree(trained, other)
    for path in (other / "checkpoint" / "training").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    outcome = program("train", config, *changing(*NEXT, f"training.start_from={other}"))
    assert outcome.code == BAD_DATA
    assert str(other / "checkpoint" / "training") in outcome.err
    assert "Traceback" not in outcome.err
    assert not config.with_suffix("").exists()


def test_a_run_of_links_does_not_fit(program, config):
    other = config.with_name("gauge.toml")
    other.write_text(
        '[run]\nthreads = 1\n[lattice]\nshape = [4, 4]\n[action]\nkind = "u1"\nbeta = 1\n[training]\nsteps = 1\n'
        'batch = 2\n[sampler.flow]\nkind = "gauge"\nlayers = 1\nhidden = [4]\n[chain]\nreplica = 2\ndraws = 4\n'
    )
    assert program("train", other).code == 0
    error = program("train", config, *changing(f"training.start_from={other.with_suffix('')}")).refused(BAD_DATA)
    assert "the weights to start from do not fit" in error
