"""`latticeflow export`: what a stranger finds in the file, and what is refused."""

import shutil
import sys
import warnings

import numpy as np
import pytest

from latticeflow.storage import Ensemble

SUFFIXES = {"npz": ".npz", "arviz": ".nc", "pyerrors": ".json.gz"}


def library(name):
    """Import a library that warns about itself or what it imports, or skip the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


@pytest.fixture
def run(runs, tmp_path):
    return shutil.copytree(runs["winding"], tmp_path / "run")


@pytest.fixture
def exported(program, run):
    """Return a function from a format to the file that is named in the output."""

    def export(to, *options):
        outcome = program("export", run, "--to", to, *options)
        assert outcome.code == 0
        path = run / f"ensemble{SUFFIXES[to]}"
        assert outcome.out == f"{path}\n"
        return path

    return export


def test_npz_has_every_number(exported, run):
    with np.load(exported("npz")) as file, Ensemble.open(run / "ensemble.h5") as ensemble:
        for name in ensemble.observable_names:
            np.testing.assert_array_equal(file[f"observables/{name}"], ensemble.observable(name))
        np.testing.assert_array_equal(file["history/delta_h"], ensemble.history("delta_h"))
        np.testing.assert_array_equal(file["proposals/baseline_charge"], ensemble.proposals("baseline_charge"))
        assert file["analysis/plaquette/mean"] == ensemble.analysis()["plaquette"]["mean"]
        assert str(file["config"]) == ensemble.config
        assert not [name for name in file if name.startswith("fields/")]


def test_npz_has_the_configurations_on_request(exported, run):
    with np.load(exported("npz", "--fields")) as file, Ensemble.open(run / "ensemble.h5") as ensemble:
        np.testing.assert_array_equal(file["fields/links"], ensemble.field("links"))


def test_arviz_reads_its_file(exported, run):
    library("h5netcdf")
    xarray = library("xarray")
    with xarray.open_dataset(exported("arviz"), group="posterior", engine="h5netcdf") as posterior:
        assert posterior["plaquette"].dims == ("chain", "draw")
        with Ensemble.open(run / "ensemble.h5") as ensemble:
            np.testing.assert_array_equal(posterior["plaquette"], ensemble.observable("plaquette"))


def test_pyerrors_has_the_mean_of_the_report(exported, run, report):
    pyerrors = library("pyerrors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pyerrors.input.json.load_json_dict(str(exported("pyerrors")), verbose=False)
    expected = report(run)["observables"]
    for name, result in expected.items():
        found[name].gamma_method(S=2.0)
        assert found[name].value == pytest.approx(result["mean"], abs=1e-12)
        assert found[name].dvalue == pytest.approx(result["error"], rel=0.3)  # pyerrors chooses its own windows


def test_an_ensemble_file_and_a_name_of_its_own(program, run, tmp_path):
    path = tmp_path / "numbers.npz"
    assert program("export", run / "ensemble.h5", "--to", "npz", "--out", path).out == f"{path}\n"
    assert path.exists()


def existing(run, to):
    path = run / f"ensemble{SUFFIXES[to]}"
    path.write_text("mine")
    return path


@pytest.mark.parametrize("to", SUFFIXES)
def test_an_existing_file_is_refused_and_untouched(program, run, to):
    path = existing(run, to)
    outcome = program("export", run, "--to", to)
    assert outcome.code != 0
    assert str(path) in outcome.err
    assert path.read_text() == "mine"
    assert outcome.out == ""


def test_an_existing_file_is_a_usage_error(program, run):
    existing(run, "npz")
    message = program("export", run, "--to", "npz").refused(2)
    assert "Errno" not in message


@pytest.mark.parametrize("to", SUFFIXES)
def test_a_wrong_suffix_is_a_usage_error(program, run, tmp_path, to):
    message = program("export", run, "--to", to, "--out", tmp_path / "numbers.txt").refused(2)
    assert "numbers.txt" in message
    assert SUFFIXES[to] in message


@pytest.mark.parametrize("to", ["arviz", "pyerrors"])
def test_only_npz_has_configurations(program, run, to):
    assert "only npz" in program("export", run, "--to", to, "--fields").refused(2)


def test_a_folder_that_does_not_exist(program, run, tmp_path):
    assert "none" in program("export", run, "--to", "npz", "--out", tmp_path / "none" / "a.npz").refused(74)


def test_an_unmeasured_run(program, unmeasured):
    message = program("export", unmeasured, "--to", "npz").refused(2)
    assert str(unmeasured) in message
    assert "measure" in message
    assert not (unmeasured / "ensemble.npz").exists()


def test_a_folder_without_an_ensemble(program, tmp_path):
    assert str(tmp_path) in program("export", tmp_path, "--to", "npz").refused(2)


def test_a_path_that_does_not_exist(program, tmp_path):
    assert str(tmp_path / "none") in program("export", tmp_path / "none", "--to", "npz").refused(2)


def test_a_damaged_file_is_bad_data(program, run):
    whole = (run / "ensemble.h5").read_bytes()
    (run / "ensemble.h5").write_bytes(whole[: len(whole) // 2])
    assert str(run / "ensemble.h5") in program("export", run, "--to", "npz").refused(65)


@pytest.mark.parametrize(("to", "name"), [("arviz", "xarray"), ("pyerrors", "pyerrors")])
def test_a_missing_library_is_named_with_how_to_get_it(program, run, to, name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    message = program("export", run, "--to", to).refused(2)
    assert name in message
    assert 'pip install "latticeflow[export]"' in message
    assert not (run / f"ensemble{SUFFIXES[to]}").exists()


def test_an_unknown_format_is_a_usage_error(program, run):
    with pytest.raises(SystemExit) as stop:
        program("export", run, "--to", "csv")
    assert stop.value.code == 2
