"""An ensemble in the files of NumPy, ArviZ and pyerrors, read back by each of them."""

import sys
import warnings

import numpy as np
import pytest

from latticeflow.stats import gamma_method
from latticeflow.storage import (
    DataError,
    DiskFullError,
    Ensemble,
    ExportError,
    MissingLibraryError,
    default_export_path,
    export,
)

SUFFIXES = {"arviz": ".nc", "npz": ".npz", "pyerrors": ".json.gz"}
CONFIG = '[action]\nname = "u1"\nbeta = 2.0  # β\n'


def library(name):
    """Import a library that warns about itself or what it imports, or skip the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


@pytest.fixture(scope="module")
def arviz():
    library("h5netcdf")
    return library("arviz")


@pytest.fixture(scope="module")
def pyerrors():
    return library("pyerrors")


@pytest.fixture
def ensemble(path, kit):
    """Twelve chains, so that r10 sorts before r2, of 20 draws; scalar, integer, short and vector observables."""
    with Ensemble.create(path, **kit.settings(chains=12, proposals={"weights": 3}, config=CONFIG)) as ensemble:
        random = np.random.default_rng(5)
        while ensemble.n_committed < ensemble.draws:
            count = min(ensemble.block, ensemble.draws - ensemble.n_committed)
            rows = kit.block(ensemble.n_committed, count, chains=12)
            ensemble.append(**rows, proposals={"weights": random.normal(size=(12, 3 * count))})
        ensemble.write_observable("plaquette", random.normal(size=(12, 20)) / 3)
        ensemble.write_observable("charge", random.integers(-3, 4, size=(12, 20)))
        ensemble.write_observable("condensate", random.normal(size=(12, 20)).astype(np.float32))
        ensemble.write_observable("loops", random.normal(size=(12, 20, 2, 3)))
        ensemble.write_analysis("plaquette", {"mean": 0.1, "window": 3, "converged": True}, {"rho": [1.0, 0.5]})
        ensemble.write_proposals("whole", random.normal(size=30))
        yield ensemble


@pytest.fixture
def measured(path, kit):
    """Makes an ensemble of one chain of 400 draws with given observables, `(400, ...)` each, open to append."""
    opened = []

    def make(**observables):
        ensemble = Ensemble.create(path, **kit.settings(chains=1, draws=400, block=100))
        opened.append(kit.fill(ensemble))
        for name, values in observables.items():
            ensemble.write_observable(name, np.asarray(values)[None])
        return ensemble

    yield make
    for ensemble in opened:
        ensemble.close()


def exported(ensemble, to, **options):
    return export(ensemble, default_export_path(ensemble.path, to), to=to, **options)


def assert_same(found, expected):
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def names_in(folder):
    return sorted(item.name for item in folder.iterdir())


def observables_of(ensemble):
    return {name: ensemble.observable(name) for name in ensemble.observable_names}


@pytest.mark.parametrize(("to", "suffix"), SUFFIXES.items())
def test_default_path_lies_beside_the_ensemble(tmp_path, to, suffix):
    assert default_export_path(tmp_path / "ensemble.h5", to) == tmp_path / f"ensemble{suffix}"


# ---------------------------------------------------------------- npz


def test_npz_holds_everything_bit_for_bit_without_pickles(ensemble):
    with np.load(exported(ensemble, "npz"), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file}
    expected = {f"observables/{name}": values for name, values in observables_of(ensemble).items()}
    expected |= {f"history/{name}": ensemble.history(name) for name in ("action", "accepted")}
    expected |= {f"proposals/{name}": ensemble.proposals(name) for name in ("weights", "whole")}
    expected |= {"analysis/plaquette/mean": np.array(0.1), "analysis/plaquette/rho": np.array([1.0, 0.5])}
    expected |= {"analysis/plaquette/window": np.array(3), "analysis/plaquette/converged": np.array(True)}
    assert arrays.keys() == expected.keys() | {"theory", "lattice_shape", "config", "n_committed"}
    for name, values in expected.items():
        assert_same(arrays[name], values)
    assert (str(arrays["theory"]), str(arrays["config"])) == ("u1", CONFIG)
    assert arrays["lattice_shape"].tolist() == [4, 4]
    assert arrays["n_committed"] == 20


def test_npz_takes_fields_on_request(ensemble):
    with np.load(exported(ensemble, "npz", fields=True), allow_pickle=False) as file:
        assert_same(file["fields/links"], ensemble.field("links"))


def test_npz_keeps_what_is_measured_of_each_and_complex_numbers(measured):
    loop = np.exp(1j * np.arange(100.0))
    with np.load(exported(measured(loop=loop, plaquette=np.arange(400.0)), "npz"), allow_pickle=False) as file:
        assert_same(file["observables/loop"], loop[None])
        assert file["observables/plaquette"].shape == (1, 400)


# ---------------------------------------------------------------- arviz


def test_arviz_reads_observables_and_history_bit_for_bit(ensemble, arviz):
    data = arviz.from_netcdf(str(exported(ensemble, "arviz")))
    assert set(data.posterior.data_vars) == set(ensemble.observable_names)
    for name, values in observables_of(ensemble).items():
        assert_same(data.posterior[name].values, values)
    assert set(data.sample_stats.data_vars) == {"action", "accepted", "lp"}
    for name in ("action", "accepted"):
        assert_same(data.sample_stats[name].values, ensemble.history(name))
    np.testing.assert_array_equal(data.sample_stats["lp"].values, -ensemble.history("action"))


def test_arviz_knows_the_axes_and_the_origin(ensemble, arviz):
    data = arviz.from_netcdf(str(exported(ensemble, "arviz")))
    assert data.posterior["loops"].dims == ("chain", "draw", "loops_dim_0", "loops_dim_1")
    assert data.posterior["draw"].values.tolist() == list(range(20))
    assert (data.attrs["theory"], data.attrs["config"]) == ("u1", CONFIG)
    assert data.attrs["lattice_shape"].tolist() == [4, 4]


def test_arviz_analyses_the_result(ensemble, arviz):
    data = arviz.from_netcdf(str(exported(ensemble, "arviz")))
    expected = arviz.ess(ensemble.observable("plaquette"))
    assert float(arviz.ess(data)["plaquette"]) == pytest.approx(float(expected), rel=1e-12)
    assert arviz.rhat(data)["loops"].shape == (2, 3)
    assert np.isfinite(arviz.rhat(data)["loops"].values).all()


def test_arviz_takes_as_much_history_as_is_measured(measured, arviz):
    values = np.arange(300.0)
    data = arviz.from_netcdf(str(exported(measured(plaquette=values, charge=values), "arviz")))
    assert data.posterior["plaquette"].shape == data.sample_stats["action"].shape == (1, 300)


def test_arviz_refuses_observables_of_unequal_length(measured):
    library("h5netcdf")
    ensemble = measured(plaquette=np.arange(400.0), charge=np.arange(300.0))
    with pytest.raises(DataError, match="of 400 measured draws charge has 300; measure it again"):
        exported(ensemble, "arviz")
    assert not default_export_path(ensemble.path, "arviz").exists()


# ---------------------------------------------------------------- pyerrors


def test_pyerrors_reads_every_component_with_one_replica_per_chain(ensemble, pyerrors):
    found = pyerrors.input.json.load_json_dict(str(exported(ensemble, "pyerrors")), verbose=False)
    assert found.keys() == set(ensemble.observable_names)
    for name, values in observables_of(ensemble).items():
        components = np.asarray(found[name], dtype=object)
        assert components.shape == values.shape[2:]
        for index, obs in np.ndenumerate(components):
            for chain in range(12):
                series = obs.deltas[f"u1|r{chain}"] + obs.r_values[f"u1|r{chain}"]
                np.testing.assert_allclose(series, values[(chain, slice(None), *index)], rtol=0, atol=4e-15)


def test_pyerrors_lists_the_observables_in_order_and_says_whence(ensemble, pyerrors):
    found = pyerrors.input.json.load_json(str(exported(ensemble, "pyerrors")), verbose=False, full_output=True)
    charge, condensate, loops, plaquette = found["obsdata"]
    assert [charge.tag, condensate.tag, plaquette.tag] == ["charge", "condensate", "plaquette"]
    assert loops[1, 2].tag == "loops[1][2]"
    expected = {"theory": "u1", "lattice_shape": [4, 4], "config": CONFIG}
    assert found["description"]["description"] == expected


def test_pyerrors_finds_the_same_error(measured, pyerrors):
    random = np.random.default_rng(6)
    noise = random.normal(size=(400, 2))
    series = np.zeros((400, 2))
    for draw in range(1, 400):
        series[draw] = 0.6 * series[draw - 1] + noise[draw]
    ensemble = measured(plaquette=series[:, 0] + 5, loops=series)
    found = pyerrors.input.json.load_json_dict(str(exported(ensemble, "pyerrors")), verbose=False)
    for obs, values in [(found["plaquette"], series[:, 0] + 5), *zip(found["loops"], series.T, strict=True)]:
        obs.gamma_method(S=2.0)
        expected = gamma_method(values)
        assert obs.dvalue == pytest.approx(expected.error, rel=1e-10)
        assert obs.value == pytest.approx(expected.mean, rel=1e-12)
        assert obs.e_windowsize["u1"] == expected.window


@pytest.mark.parametrize("constant", [0.0, 0.1, -1 / 3, 1e300])
def test_pyerrors_takes_a_constant_exactly(ensemble, pyerrors, constant):
    ensemble.write_observable("constant", np.full((12, 20), constant))
    obs = pyerrors.input.json.load_json_dict(str(exported(ensemble, "pyerrors")), verbose=False)["constant"]
    obs.gamma_method()
    assert (obs.value, obs.dvalue) == (constant, 0.0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.r_[np.zeros(7), np.nan, np.zeros(392)], "'loop' is not finite at chain 0, draw 7"),
        (np.arange(4.0), "'loop' has 4 draws per chain, pyerrors needs at least 5"),
        (np.exp(1j * np.arange(400.0)), "loop is complex"),
    ],
)
def test_pyerrors_refuses_what_it_cannot_analyse(measured, pyerrors, values, words):
    with pytest.raises(ExportError, match=words) as error:
        exported(measured(loop=values), "pyerrors")
    assert error.value.exit_code == 2


# ---------------------------------------------------------------- files and refusals


@pytest.mark.parametrize("to", SUFFIXES)
def test_nothing_is_left_beside_the_export(ensemble, to):
    library({"arviz": "h5netcdf", "npz": "numpy", "pyerrors": "pyerrors"}[to])
    path = exported(ensemble, to)
    assert names_in(path.parent) == sorted(["ensemble.h5", "ensemble.h5.lock", path.name])


@pytest.mark.parametrize("to", SUFFIXES)
def test_existing_file_is_refused_and_untouched(ensemble, to):
    path = default_export_path(ensemble.path, to)
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="exists already and is not overwritten"):
        exported(ensemble, to)
    assert path.read_text() == "mine"


def test_file_that_appears_meanwhile_is_untouched(ensemble, monkeypatch):
    path = default_export_path(ensemble.path, "npz")
    save = np.savez

    def slow(*args, **arrays):
        save(*args, **arrays)
        path.write_text("theirs")

    monkeypatch.setattr(np, "savez", slow)
    with pytest.raises(FileExistsError):
        exported(ensemble, "npz")
    assert path.read_text() == "theirs"
    assert names_in(path.parent) == ["ensemble.h5", "ensemble.h5.lock", "ensemble.npz"]


@pytest.mark.parametrize(("number", "kind"), [(28, DiskFullError), (5, OSError)])
def test_failure_leaves_nothing_and_a_full_disk_is_named(ensemble, monkeypatch, number, kind):
    def failing(path, **arrays):
        path.write_bytes(b"half of it")
        raise OSError(number, "a fault")

    monkeypatch.setattr(np, "savez", failing)
    with pytest.raises(OSError) as error:
        exported(ensemble, "npz")
    assert type(error.value) is kind
    assert number != 28 or "ensemble.npz" in str(error.value)
    assert names_in(ensemble.path.parent) == ["ensemble.h5", "ensemble.h5.lock"]


@pytest.mark.parametrize("to", SUFFIXES)
def test_unmeasured_ensemble_is_refused(full, to):
    with Ensemble.open(full) as ensemble, pytest.raises(ExportError, match="no observables; measure it first") as error:
        exported(ensemble, to)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(("to", "name"), [("arviz", "xarray"), ("arviz", "h5netcdf"), ("pyerrors", "pyerrors")])
def test_missing_library_says_how_to_install_it(ensemble, monkeypatch, to, name):
    if to == "arviz" and name == "h5netcdf":
        library("xarray")
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingLibraryError, match=f'needs {name}.*pip install "latticeflow') as error:
        exported(ensemble, to)
    assert isinstance(error.value, ImportError)
    assert (error.value.exit_code, error.value.name) == (2, name)
    assert names_in(ensemble.path.parent) == ["ensemble.h5", "ensemble.h5.lock"]


def test_unfit_requests_are_refused(ensemble, tmp_path):
    with pytest.raises(ValueError, match="to is 'csv', expected one of arviz, npz, pyerrors"):
        export(ensemble, tmp_path / "ensemble.csv", to="csv")
    with pytest.raises(ValueError, match="to is 'csv'"):
        default_export_path(ensemble.path, "csv")
    with pytest.raises(ValueError, match=r"expected one that ends in \.json\.gz"):
        export(ensemble, tmp_path / "ensemble.json", to="pyerrors")
    with pytest.raises(ValueError, match="only npz holds fields"):
        exported(ensemble, "arviz", fields=True)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        export(ensemble, tmp_path / "nowhere" / "ensemble.npz", to="npz")
