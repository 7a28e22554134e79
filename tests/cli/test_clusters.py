"""Samplers in pieces that are clusters: the whole road, its continuation, samples that will not do."""

import json
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from latticeflow.cli import folder as folder_module
from latticeflow.cli.analysis import _skipped
from latticeflow.cli.fitting import piece_columns
from latticeflow.cli.folder import RunFolder
from latticeflow.cli.pieces import PieceReport, silhouette_line
from latticeflow.cli.training import trained_sampler
from latticeflow.stats import ess
from latticeflow.storage import Ensemble, load_checkpoint

BAD_DATA, BAD_CONFIG, USAGE, INTERRUPTED = 65, 78, 2, 130

MOONS = """
[run]
seed = 7
threads = 1
[lattice]
shape = [2]
[action]
kind = "two_moons"
[sampler]
kind = "piecewise"
pieces = "clusters"
clusters = 3
[sampler.flow]
kind = "autoregressive"
blocks = 2
hidden = [8]
[training]
estimator = "forward_kl"
draws = 600
steps = 30
batch = 100
learning_rate = 2e-2
evaluate_every = 10
dtype = "float64"
[chain]
replica = 16
draws = 32
candidates = 64
[analysis]
observables = ["first_coordinate", "coordinates_squared"]
"""

PHI4 = """
[run]
seed = 3
threads = 1
[lattice]
shape = [4, 4]
[action]
kind = "scalar"
m2 = -4.0
lam = 4.0
[chain]
kernels = ["hmc"]
replica = 64
draws = 10
thermalisation = 20
"""
FLOW = MOONS.replace('kind = "piecewise"\npieces = "clusters"\nclusters = 3\n', "").replace("evaluate_every = 10\n", "")
"""One flow for all, trained by gradient steps on the same draws."""


def changing(*changes):
    return [word for change in changes for word in ("--set", change)]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state(folder):
    return load_checkpoint(folder / "checkpoint" / "training").state


def flat(state):
    return {f"{k}.{name}": value for k, piece in enumerate(state["pieces"]) for name, value in piece["weights"].items()}


def assert_same(one, other):
    """Assert that two trainings are bitwise the same but for the seconds."""
    left, right = state(one), state(other)
    assert flat(left).keys() == flat(right).keys()
    assert all(torch.equal(value, flat(right)[name]) for name, value in flat(left).items())
    assert torch.equal(left["labels"], right["labels"])
    strip = [[record | {"seconds": 0} for record in metrics(folder)] for folder in (one, other)]
    assert strip[0] == strip[1]


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "moons.toml"
    path.write_text(MOONS)
    return path


@pytest.fixture(scope="module")
def finished(program, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("road") / "moons.toml"
    path.write_text(MOONS)
    assert program("run", path).code == 0
    return path.with_suffix("")


# ---------------------------------------------------------------- the whole road


def test_the_folder_has_everything(finished):
    assert {path.name for path in finished.glob("figures/*")} == {"training.png", "pieces.png", "weights.png"}
    found = metrics(finished)
    places = [(record["piece"], record["step"]) for record in found]
    assert places == [(k, step) for k in range(3) for step in (0, 10, 20, 30)]
    assert all(np.isfinite(record["held_out"]) for record in found)
    assert [record["loss"] is None for record in found] == [record["step"] == 0 for record in found]
    assert all(found[4 * k + 3]["held_out"] < found[4 * k]["held_out"] for k in range(3))
    with h5py.File(finished / "ensemble.h5") as file:
        assert file["fields/x"].shape == (16, 32, 2)
        np.testing.assert_array_equal(file["training/piece"][:], np.repeat(range(3), 4))
        np.testing.assert_array_equal(file["training/held_out"][:], [record["held_out"] for record in found])


def test_the_report_tells_of_the_pieces(program, finished, report):
    pieces = report(finished)["pieces"]
    sizes = torch.bincount(state(finished)["labels"]).tolist()
    assert pieces["samples"] == sizes
    assert sum(sizes) == 600
    assert pieces["weights"] == pytest.approx([size / 600 for size in sizes])
    losses = [[record["held_out"] for record in metrics(finished) if record["piece"] == k] for k in range(3)]
    assert pieces["held_out"] == list(map(min, losses))
    assert list(pieces["silhouettes"]) == ["3"]
    outcome = program("analyse", finished)
    assert f"pieces: 3; silhouette by number of clusters 3: {pieces['silhouettes']['3']:.3f}" in outcome.out
    lines = [line.split() for line in outcome.out.splitlines() if line.startswith("  ")]
    assert lines[0] == ["piece", "samples", "weight", "held-out", "NLL"]
    assert [line[:2] for line in lines[1:]] == [[str(k), str(size)] for k, size in enumerate(sizes)]


def test_the_sampler_is_built_from_configuration_and_checkpoint(finished):
    """Its weights are those of the samples, its density that of the stored chain's proposals."""
    sampler = trained_sampler(RunFolder.open(finished))
    sizes = torch.bincount(state(finished)["labels"]).double()
    torch.testing.assert_close(sampler.weights, sizes / sizes.sum(), rtol=1e-14, atol=0)
    with Ensemble.open(finished / "ensemble.h5") as ensemble:
        x = torch.from_numpy(ensemble.field("x")).flatten(0, 1)
        log_weight = ensemble.history("log_weight").ravel()
        action = ensemble.history("action").ravel()
        assert ess(ensemble.proposals("log_weight")) > 0.3
    with torch.no_grad():
        np.testing.assert_allclose(-action - sampler.log_prob(x).numpy(), log_weight, rtol=0, atol=1e-10)


def test_the_chain_is_exact(finished, report):
    """Five standard deviations: once in two million runs, were the seed not fixed."""
    found = report(finished)
    first = found["observables"]["first_coordinate"]
    assert abs(first["mean"]) < 5 * first["error"]
    assert abs(found["proposals"]["log_z"] - found["exact"]["log_z"]) < 5 * found["proposals"]["log_z_error"]


def test_status_counts_the_pieces(program, finished):
    assert program("status", finished).rows["training"] == ["3 pieces fitted"]
    found = json.loads(program("status", finished, "--json").out)
    assert found["training"] == {"pieces": 3}
    assert found["state"] == "finished"
    assert found["cpu_seconds"]["training"] > 0


def test_check_counts_the_parameters_of_a_piece(program, config):
    out = program("check", config).out
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    parameters = sum(value.numel() for value in trained_parameters())
    expected = f"pieces clusters, prior normal, flow autoregressive of 2 blocks, {parameters} parameters a piece"
    assert rows["sampler"] == expected
    assert rows["training"].startswith("forward_kl, at most 30 steps of 100, ")
    assert rows["training"].endswith("for each piece; the times below are for 3 pieces")
    assert not config.with_suffix("").exists()


def trained_parameters():
    """Return the shapes of two blocks of one hidden layer of 8 and of an affine map, in two dimensions."""
    block = [torch.zeros(8, 2), torch.zeros(8), torch.zeros(4, 8), torch.zeros(4)]
    return [*block, *block, torch.zeros(2), torch.zeros(2)]


def test_the_number_of_pieces_is_found(program, config, report):
    """And comes from the checkpoint from then on; a number whose clusters are too small is passed over."""
    text = MOONS.replace("clusters = 3\n", "most_clusters = 3\nsmallest_cluster = 60\n")
    config.write_text(text)
    assert program("train", config, *changing("training.steps=2")).code == 0
    folder = config.with_suffix("")
    assert set(state(folder)["silhouettes"]) == {2, 3}
    assert len(trained_sampler(RunFolder.open(folder)).pieces) == 2


def test_processes_share_the_fits(program, finished, config):
    """With the same result, and with their CPU seconds counted."""
    assert program("train", config, *changing("training.processes=2")).code == 0
    assert_same(finished, config.with_suffix(""))
    assert json.loads((config.with_suffix("") / "status.json").read_text())["cpu_seconds"]["training"] > 0.1


def test_hmc_needs_no_clusters(program, config):
    short = ('chain.kernels=["hmc"]', "chain.draws=4", "chain.thermalisation=4")
    assert program("train", config, *changing(*short)).code == 0
    assert not (config.with_suffix("") / "metrics.jsonl").exists()
    assert program("sample", config.with_suffix("")).code == 0


def test_lattice_fields_in_pieces(program, tmp_path, report):
    """An ensemble of phi^4 with two wells, made by HMC: two pieces by the magnetisation."""
    source, config = tmp_path / "hmc.toml", tmp_path / "pieces.toml"
    source.write_text(PHI4)
    assert program("train", source).code == program("sample", source.with_suffix("")).code == 0
    samples = source.with_suffix("") / "ensemble.h5"
    fit = f'[training]\nestimator = "forward_kl"\nsamples = "{samples}"\nsteps = 5\nbatch = 64\n'
    sampler = '[sampler]\nkind = "piecewise"\npieces = "clusters"\n[sampler.flow]\nkind = "coupling"\nlayers = 2\n'
    own = PHI4.partition("[chain]")[0] + "[chain]\nreplica = 8\ndraws = 8\ncandidates = 64\n"
    config.write_text(own + sampler + "hidden = [4]\n" + fit)
    assert program("run", config).code == 0
    folder = config.with_suffix("")
    labels = state(folder)["labels"].numpy()
    with Ensemble.open(samples) as ensemble:
        magnetisation = ensemble.field("phi").mean((2, 3)).ravel()
    (low, middle), (other, high) = sorted((m.min(), m.max()) for m in (magnetisation[labels == k] for k in range(2)))
    assert low < -0.3 < middle < other < 0.3 < high
    assert {path.name for path in folder.glob("figures/*")} == {"training.png", "weights.png", "autocorrelation.png"}
    assert report(folder)["pieces"]["samples"] == np.bincount(labels).tolist()


def test_a_single_flow_learns_from_draws(program, config):
    config.write_text(FLOW)
    assert program("train", config).code == 0
    assert [record["step"] for record in metrics(config.with_suffix(""))] == list(range(1, 31))
    assert program("check", config).code == 0


# ---------------------------------------------------------------- continuing


def interrupted(monkeypatch, program, *words, name, at):
    """Run a command that dies when it comes to the given call, counted from 1, of a function of the folder."""
    function, calls = getattr(folder_module, name), []

    def failing(*arguments, **keywords):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return function(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, name, failing)
        assert program(*words).code == INTERRUPTED


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_resume_is_the_same_training(program, finished, config, monkeypatch, at):
    """Killed when it wants to store the clusters, or a piece whose metrics are written already."""
    interrupted(monkeypatch, program, "train", config, name="save_checkpoint", at=at)
    folder, fitted = config.with_suffix(""), []
    assert len(metrics(folder) if at > 1 else []) == 4 * (at - 1)
    before = folder / "checkpoint" / "training"
    assert (load_checkpoint(before).step if at > 1 else None) == (at - 2 if at > 1 else None)
    with monkeypatch.context() as patch:
        count_fits(patch, fitted)
        assert program("train", config, "--resume").code == 0
    assert len(fitted) == 3 - max(0, at - 2)
    assert_same(finished, folder)


def count_fits(patch, fitted):
    from latticeflow.training import pieces

    fit = pieces.fit
    patch.setattr(pieces, "fit", lambda *arguments, **keywords: fitted.append(1) or fit(*arguments, **keywords))


def test_resume_after_a_death_within_the_metrics(program, finished, config, monkeypatch):
    """The last line is cut short, the piece is fitted again, and its lines are there once."""
    interrupted(monkeypatch, program, "train", config, name="save_checkpoint", at=3)
    path = config.with_suffix("") / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    assert program("train", config, "--resume").code == 0
    assert_same(finished, config.with_suffix(""))


def test_a_signal_waits_for_the_piece(program, finished, config, monkeypatch):
    """It comes in the middle of the second fit, which is stored before the program stops."""
    from latticeflow.training import pieces

    fit, calls = pieces.fit, []

    def signalled(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return fit(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(pieces, "fit", signalled)
        outcome = program("train", config)
    assert outcome.code == INTERRUPTED
    assert "--resume" in outcome.err
    assert program("status", config.with_suffix("")).rows["training"] == ["2 pieces fitted"]
    assert program("train", config, "--resume").code == 0
    assert_same(finished, config.with_suffix(""))


def test_a_piece_that_comes_out_differently_is_refused(program, config, monkeypatch):
    interrupted(monkeypatch, program, "train", config, name="save_checkpoint", at=3)
    path = config.with_suffix("") / "metrics.jsonl"
    lines = path.read_text().splitlines()
    record = json.loads(lines[5])
    lines[5] = json.dumps(record | {"held_out": record["held_out"] + 1e-9})
    path.write_text("\n".join(lines) + "\n")
    error = program("train", config, "--resume").refused(BAD_DATA)
    assert f"piece {record['piece']}, step {record['step']} computed again differs in held_out" in error


def test_resume_with_other_processes_is_allowed(program, finished, config, monkeypatch):
    interrupted(monkeypatch, program, "train", config, name="save_checkpoint", at=3)
    assert program("train", config, "--resume", *changing("training.processes=2")).code == 0
    assert_same(finished, config.with_suffix(""))


def test_a_finished_training_does_not_look_for_its_samples(program, finished, config, monkeypatch):
    shutil.copytree(finished, config.with_suffix(""))
    with monkeypatch.context() as patch:
        patch.setattr("latticeflow.cli.fitting.training_fields", lambda *arguments: pytest.fail("read again"))
        assert program("train", config, "--resume").code == 0
    assert_same(finished, config.with_suffix(""))


def test_an_unfinished_training_is_refused(program, config, monkeypatch):
    interrupted(monkeypatch, program, "train", config, name="save_checkpoint", at=3)
    error = program("sample", config.with_suffix("")).refused(USAGE)
    assert "has 1 of 3 pieces fitted" in error
    assert "--resume" in error
    with suppress(FileNotFoundError):
        shutil.rmtree(config.with_suffix("") / "checkpoint")
    assert "has 0 pieces fitted" in program("sample", config.with_suffix("")).refused(USAGE)


def test_figures_without_the_weights_leave_the_pieces_out(program, finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoint")
    shutil.rmtree(folder / "figures")
    assert program("plot", folder).code == 0
    assert {path.name for path in folder.glob("figures/*")} == {"training.png", "weights.png"}


def test_other_runs_cannot_start_from_pieces(program, finished, config):
    config.write_text(FLOW)
    error = program("check", config, *changing(f"training.start_from={finished}")).refused(USAGE)
    assert "has flows for its own clusters" in error


# ---------------------------------------------------------------- samples that will not do


def stored(path, x, *, theory="two_moons", name="x"):
    """Store samples `(n, ...)` as an ensemble of two chains."""
    x = np.asarray(x, dtype=np.float64).reshape(2, -1, *np.shape(x)[1:])
    shape = x.shape[2:]
    layout = {"fields": {name: (shape, np.float64)}, "history": {}, "chains": 2, "draws": x.shape[1]}
    with Ensemble.create(path, theory=theory, lattice_shape=shape, config="", block=x.shape[1], **layout) as ensemble:
        ensemble.append(fields={name: x}, history={}, proposals={})
    return path


def from_ensemble(config, path):
    config.write_text(MOONS.replace("draws = 600", f'samples = "{path}"'))


def cloud(n=400, seed=1):
    return np.random.default_rng(seed).normal(size=(n, 2)) + 6.0 * (np.arange(n) % 2)[:, None]


def with_nan(x):
    x[[250, 301], [0, 1]] = np.nan
    return x


@pytest.mark.parametrize(
    ("samples", "changes", "words"),
    [
        (lambda: with_nan(cloud()), [], "2 of 400 configurations are not finite, the first at chain 1, draw 50"),
        (lambda: cloud(60), [], "60 samples, expected at least 300 (3 x sampler.smallest_cluster = 100)"),
        (lambda: cloud(80), ["sampler.smallest_cluster=30"], "80 samples, expected at least 90 (3 x"),
        (lambda: cloud() * [1, 0], [], "features [1] are constant over 400 samples"),
    ],
)
def test_samples_that_will_not_do_are_refused_before_anything_is_made(program, config, samples, changes, words):
    """By `check` as well; samples that do not vary need the clustering, or a flow, to be seen."""
    path = stored(config.with_name("e.h5"), samples())
    from_ensemble(config, path)
    error = program("check", config, *changing(*changes)).refused(BAD_DATA)
    assert str(path) in error
    assert words in error
    again = program("run", config, *changing(*changes)).refused(BAD_DATA)
    if "constant" not in words:
        assert again == error
        assert not config.with_suffix("").exists()


SMALL = "sampler.smallest_cluster="
DBSCAN = 'clusterer = "dbscan"\nneighbourhood = 1.5\n'


@pytest.mark.parametrize(
    ("samples", "smallest", "words"),
    [
        (lambda: cloud() * [1, 0], 100, "features must vary: of 2 columns [1] are constant"),
        (lambda: np.concatenate([cloud(390), [[99, 99]] * 10]), 50, "has 10 samples, expected at least 50"),
        (lambda: np.repeat([[0, 0], [1, 1]], 200, 0), 1, "3 clusters of 2 distinct samples"),
    ],
)
def test_clusters_that_cannot_be_made_are_refused(program, config, samples, smallest, words):
    path = stored(config.with_name("e.h5"), samples())
    from_ensemble(config, path)
    error = program("train", config, *changing(f"{SMALL}{smallest}")).refused(BAD_DATA)
    assert error.startswith(f"latticeflow: training.samples: {path}: ")
    assert words in error
    assert not (config.with_suffix("") / "checkpoint").exists()


def test_noise_is_refused(program, config):
    path = stored(config.with_name("e.h5"), np.concatenate([grid(196), [[99, 99]] * 4]))
    from_ensemble(config, path)
    config.write_text(config.read_text().replace("clusters = 3\n", DBSCAN))
    error = program("train", config).refused(BAD_DATA)
    assert "DBSCAN leaves 4 of 200 samples without a cluster" in error
    assert "noise='nearest'" in error


def grid(n):
    """Return two clusters of points a unit apart, 20 units from each other."""
    i = np.arange(n // 2)
    half = np.stack([i % 10, i // 10], axis=1)
    return np.concatenate([half, half + [29, 0]])


def test_noise_goes_to_the_nearest_cluster_where_that_is_asked_for(program, config):
    path = stored(config.with_name("e.h5"), np.concatenate([grid(198), [[50, 50], [-50, -50]]]))
    from_ensemble(config, path)
    config.write_text(config.read_text().replace("clusters = 3\n", DBSCAN + 'noise = "nearest"\n'))
    assert program("train", config, *changing("training.steps=2", f"{SMALL}50")).code == 0
    labels = state(config.with_suffix(""))["labels"].tolist()
    assert labels == [0] * 99 + [1] * 99 + [1, 0]


def test_an_ensemble_of_another_shape_or_theory_is_refused(program, config):
    for theory, x in (("two_rings", cloud()), ("two_moons", np.random.default_rng(1).normal(size=(400, 3)))):
        path = stored(config.with_name(f"{theory}.h5"), x, theory=theory)
        from_ensemble(config, path)
        assert str(path) in program("run", config).refused(BAD_DATA)
        assert not config.with_suffix("").exists()


def test_a_missing_ensemble_is_refused(program, config):
    from_ensemble(config, "nowhere.h5")
    outcome = program("run", config)
    assert outcome.code == BAD_CONFIG
    assert 'training.samples: expected an existing ensemble file, found "nowhere.h5"' in outcome.err


def test_resume_with_samples_that_changed_is_refused(program, config, monkeypatch):
    path = stored(config.with_name("e.h5"), cloud())
    from_ensemble(config, path)
    changes = changing("sampler.smallest_cluster=50")
    interrupted(monkeypatch, program, "train", config, *changes, name="save_checkpoint", at=3)
    path.unlink()
    stored(path, cloud(seed=2))
    error = program("train", config, "--resume", *changes).refused(BAD_DATA)
    assert f"{path}: not the samples that the pieces of {config.with_suffix('')} were cut from" in error


def test_a_fit_that_fails_keeps_the_pieces_before_it(program, config, monkeypatch):
    from latticeflow.training import pieces

    fit, calls = pieces.fit, []

    def failing(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 2:
            raise pieces.TrainingError("diverged")
        return fit(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(pieces, "fit", failing)
        outcome = program("train", config)
    assert outcome.code == 1
    assert outcome.err.endswith("latticeflow: piece 1: diverged\n")
    assert load_checkpoint(config.with_suffix("") / "checkpoint" / "training").step == 1


def test_too_few_samples_to_hold_some_out(program, config):
    """A cluster may be allowed to be smaller than a fit can use; its number is named."""
    changes = ("sampler.smallest_cluster=1", "training.draws=12", "training.validation=0.1", "sampler.clusters=4")
    error = program("train", config, *changing(*changes))
    assert error.code == BAD_DATA
    assert "training.draws = 12: piece" in error.err


# ---------------------------------------------------------------- words


def test_skipped_steps_are_counted_against_all_steps():
    training = {"piece": np.array([0, 0, 1, 1]), "step": np.array([0, 50, 0, 20]), "skipped": np.array([0, 2, 0, 1])}
    assert _skipped(training) == ["3 of 70 training steps had a non-finite loss or gradient: skipped"]
    assert _skipped({"step": np.arange(5), "skipped": np.array([0, 1, 0, 0, 0])})[0].startswith("1 of 5 training steps")
    assert _skipped({"step": np.arange(5), "skipped": np.zeros(5)}) == _skipped({}) == []


def test_the_best_scores_are_shown_and_what_was_passed_over():
    scores = {2: 0.3, 3: 0.7, 4: 0.5, 5: 0.1, 6: 0.2, 7: 0.6}
    line = silhouette_line(PieceReport([9, 8], [0.5, 0.5], [1.0, 1.0], scores))
    assert "3: 0.700, 7: 0.600, 4: 0.500, 2: 0.300, 6: 0.200, 1 more below" in line
    assert "3 clusters were passed over" in line
    assert silhouette_line(PieceReport([9], [1.0], [1.0], {})) == "pieces: 1"
    assert "passed over" not in silhouette_line(PieceReport([9, 8, 7], [0.5, 0.3, 0.2], [1.0] * 3, scores))


def test_some_samples_of_all_chains_are_kept_for_the_figure(program, config, monkeypatch):
    """Those of an ensemble come chain by chain, and its chains may be stuck."""
    monkeypatch.setattr("latticeflow.cli.fitting.SHOWN", 150)
    path = stored(config.with_name("e.h5"), cloud())
    from_ensemble(config, path)
    assert program("train", config, *changing("training.steps=1", f"{SMALL}30")).code == 0
    columns = piece_columns(RunFolder.open(config.with_suffix("")))
    np.testing.assert_array_equal(columns["feature"], cloud()[::3])
    np.testing.assert_array_equal(columns["label"], state(config.with_suffix(""))["labels"][::3])
