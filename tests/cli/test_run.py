"""The command line as a stranger uses it: the whole road, its stages, and what it refuses."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from latticeflow.cli import folder, main

CONFIG = """
[run]
seed = 3
threads = 1
[lattice]
shape = [4, 4]
[action]
kind = "schwinger"
beta = 1.0
kappa = 0.2
holonomies = [2, 2]
[sampler.prior]
kind = "quenched"
[sampler.flow]
kind = "gauge"
layers = 2
hidden = [8]
[training]
estimator = "path"
steps = 6
batch = 8
checkpoint_every = 3
window = 2
[chain]
replica = 8
draws = 24
block = 8
candidates = 32
[baseline]
samples = 64
beta = 1.0
sector = 0.1
"""

COMPOSITE = [
    *("--set", "chain.kernels=['hmc', 'winding', 'independence']"),
    *("--set", "chain.thermalisation=16"),
    *("--set", "analysis.observables=['plaquette', 'topological_charge', 'wilson_loops', 'pion_correlator']"),
]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("road") / "small.toml"
    path.write_text(CONFIG)
    assert main(["run", str(path)]) == 0
    return path.with_suffix("")


def test_run_makes_the_whole_folder(finished):
    for name in ("config.toml", "provenance.json", "status.json", "ensemble.h5", "metrics.jsonl", "checkpoint"):
        assert (finished / name).exists()
    figures = {path.name for path in (finished / "figures").iterdir()}
    assert figures == {"training.png", "weights.png", "autocorrelation.png", "charge.png"}
    assert json.loads((finished / "status.json").read_text())["stage"] == "done"


def test_stored_plaquette_is_that_of_the_stored_links(finished):
    with h5py.File(finished / "ensemble.h5") as file:
        links, stored = file["fields/links"][:], file["observables/plaquette"][:]
        time_links, space = links[:, :, 0], links[:, :, 1]
    angle = time_links + np.roll(space, -1, -2) - np.roll(time_links, -1, -1) - space
    np.testing.assert_allclose(np.cos(angle).mean(axis=(-2, -1)), stored, rtol=0, atol=1e-12)


def test_stages_one_by_one_give_the_same_as_run(finished, config, capsys):
    out = str(config.parent / "stages")
    assert main(["train", str(config), "--out", out]) == 0
    for stage in ("sample", "measure", "analyse", "plot"):
        assert main([stage, out]) == 0
    with h5py.File(finished / "ensemble.h5") as one, h5py.File(f"{out}/ensemble.h5") as other:
        for name in ("fields/links", "history/log_weight", "observables/condensate"):
            np.testing.assert_array_equal(one[name][:], other[name][:])
    assert "plaquette" in capsys.readouterr().out


def test_json_has_full_precision(finished, capsys):
    assert main(["analyse", str(finished), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    with h5py.File(finished / "ensemble.h5") as file:
        assert report["observables"]["plaquette"]["mean"] == file["analysis/plaquette"].attrs["mean"]
    assert report["baseline"]["samples"] == 64


def interrupted_run(config, monkeypatch, *, stage, after, options=()):
    """Run until a stage wants its checkpoint number `after` + 1, interrupt it there, resume."""
    calls, save = [], folder.save_checkpoint

    def failing(path, *arguments):
        calls.extend([1] if path.name == stage else [])
        if len(calls) > after:
            raise KeyboardInterrupt
        return save(path, *arguments)

    monkeypatch.setattr(folder, "save_checkpoint", failing)
    assert main(["run", str(config), *options]) == 130
    monkeypatch.setattr(folder, "save_checkpoint", save)
    assert main(["run", str(config), "--resume", *options]) == 0


@pytest.mark.parametrize("stage", ["training", "chain"])
def test_resume_after_a_lost_end_is_the_same_run(finished, config, stage, monkeypatch):
    """Stop in the middle of a stage by an error, resume, and compare bit for bit with the undisturbed run."""
    interrupted_run(config, monkeypatch, stage=stage, after=1)
    with h5py.File(finished / "ensemble.h5") as one, h5py.File(config.with_suffix("") / "ensemble.h5") as other:
        for name in ("fields/links", "history/log_weight", "training/loss", "checksum/crc32"):
            np.testing.assert_array_equal(one[name][:], other[name][:])


@pytest.fixture(scope="module")
def composite(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("composite") / "small.toml"
    path.write_text(CONFIG)
    assert main(["run", str(path), *COMPOSITE]) == 0
    return path.with_suffix("")


@pytest.mark.parametrize("after", [2, 4])
def test_resume_of_a_composite_is_the_same_run(composite, config, after, monkeypatch):
    """The first two checkpoints are in the thermalisation, where HMC is still being tuned."""
    interrupted_run(config, monkeypatch, stage="chain", after=after, options=COMPOSITE)
    with h5py.File(composite / "ensemble.h5") as one, h5py.File(config.with_suffix("") / "ensemble.h5") as other:
        for name in ("fields/links", "history/delta_h", "history/accepted_winding", "checksum/crc32"):
            np.testing.assert_array_equal(one[name][:], other[name][:])
        assert one["analysis/tuned"].attrs["hmc.step_size"] == other["analysis/tuned"].attrs["hmc.step_size"]


def test_report_of_a_composite(composite, capsys):
    """Every kernel, both ESS, the sectors, arrays by component and derived quantities are in the report."""
    assert main(["analyse", str(composite)]) == 0
    text = capsys.readouterr().out
    for words in ("hmc: acceptance", "<exp(-delta_h)>", "winding: acceptance", "independence: acceptance", "(forward)"):
        assert words in text
    for name in ("pion_correlator[2]", "pion_effective_mass[1]", "creutz_ratios[2,2]", "sectors: abs(Q) = 0"):
        assert name in text
    with h5py.File(composite / "ensemble.h5") as file:
        assert file["analysis/pion_correlator/mean"].shape == (3,)
        assert file["analysis/sectors"].attrs["changes"] > 0
        assert file["analysis/cost"].attrs["sampling"] > 0


def test_hmc_alone_needs_no_training(config, capsys):
    """The section [training] is left alone where no kernel uses the sampler; there are no weights to report."""
    assert main(["run", str(config), "--set", "chain.kernels=['hmc']", "--set", "chain.thermalisation=8"]) == 0
    folder = config.with_suffix("")
    assert not (folder / "metrics.jsonl").exists()
    text = capsys.readouterr().out
    assert "log Z  " not in text
    assert "proposals:" not in text
    assert {path.name for path in (folder / "figures").iterdir()} == {"autocorrelation.png", "charge.png"}


def test_existing_folder_is_refused_and_untouched(finished, capsys):
    before = (finished / "ensemble.h5").read_bytes()
    assert main(["run", str(finished.with_suffix(".toml"))]) == 2
    assert "--resume" in capsys.readouterr().err
    assert (finished / "ensemble.h5").read_bytes() == before


def test_resume_with_another_configuration_names_the_key(finished, capsys):
    code = main(["run", str(finished.with_suffix(".toml")), "--resume", "--set", "action.beta=1.5"])
    assert code == 78
    assert "action.beta" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("action.kapa=0.2", ["kapa", "kappa"]),
        ("action.kappa=0.5", ["action.kappa", "0.5"]),
        ("action.beta=-1", ["action.beta", "-1"]),
        ("action.beta=nan", ["action.beta", "nan"]),
        ("lattice.shape=[6, 4]", ["[6, 4]", "multiples of 4"]),
        ("chain.draws='many'", ["chain.draws", "many"]),
        ("run.device=abacus", ["run.device", "abacus"]),
        ("analysis.observables=['plakette']", ["plakette", "plaquette"]),
    ],
)
def test_bad_configuration_is_one_clear_message(config, capsys, change, words):
    assert main(["run", str(config), "--set", change]) == 78
    error = capsys.readouterr().err
    assert all(word in error for word in words)
    assert "Traceback" not in error
    assert not config.with_suffix("").exists()


def test_all_problems_at_once(config, capsys):
    assert main(["check", str(config), "--set", "action.kappa=0.7", "--set", "chain.replica=0"]) == 78
    error = capsys.readouterr().err
    assert "action.kappa" in error
    assert "chain.replica" in error


@pytest.mark.parametrize("command", ["run", "check"])
def test_missing_file(tmp_path, capsys, command):
    assert main([command, str(tmp_path / "none.toml")]) == 78
    assert "none.toml" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sample", "measure", "analyse", "plot"])
def test_not_a_run_folder(tmp_path, capsys, command):
    assert main([command, str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err


def test_sample_before_training_is_refused(config, capsys):
    assert main(["train", str(config), "--set", "training.steps=0"]) == 0
    assert main(["analyse", str(config.with_suffix(""))]) == 2
    assert "latticeflow sample" in capsys.readouterr().err


def test_damaged_ensemble_is_bad_data(finished, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    data = bytearray((copy / "ensemble.h5").read_bytes())
    (copy / "ensemble.h5").write_bytes(data[: len(data) // 2])
    assert main(["measure", str(copy)]) == 65
    assert "ensemble.h5" in capsys.readouterr().err


def test_second_writer_is_refused(finished, capsys):
    from latticeflow.storage import RunLock

    with RunLock(finished / "run.lock"):
        assert main(["measure", str(finished)]) == 75
    assert "run.lock" in capsys.readouterr().err


def test_check_says_what_would_happen(config, capsys):
    assert main(["check", str(config)]) == 0
    text = capsys.readouterr().out
    assert "parameters" in text
    assert "about" in text
    assert not config.with_suffix("").exists()


def test_info_names_versions(capsys):
    assert main(["info"]) == 0
    assert "torch" in capsys.readouterr().out


def test_usage_errors_exit_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["runn", "x.toml"])
    assert stop.value.code == 2


def test_interrupt_prints_how_to_resume(config):
    command = [sys.executable, "-m", "latticeflow", "run", str(config), "--set", "training.steps=100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = config.with_suffix("") / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in error
    assert "Traceback" not in error
