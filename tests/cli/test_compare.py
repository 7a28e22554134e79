"""`latticeflow compare`: every number against the reports of the runs, and what cannot be compared."""

import math
import re
import shutil

import h5py
import numpy as np
import pytest
from matplotlib.image import imread
from scipy.stats import chi2

from latticeflow.cli.compare import comparison, read_entries
from latticeflow.exact import u1_plaquette
from latticeflow.storage import Ensemble

NAMES = ("plaquette", "topological_charge", "topological_charge2", "topological_susceptibility")
KERNELS = ("hmc", "winding", "independence")


@pytest.fixture(scope="module")
def figure(tmp_path_factory):
    return tmp_path_factory.mktemp("figure") / "c.png"


@pytest.fixture(scope="module")
def compared(program, runs, figure):
    outcome = program("compare", *(runs[name] for name in KERNELS), "--out", figure)
    assert outcome.code == 0
    assert outcome.err == ""
    return outcome


def rounded(cell):
    """Return value, error and the unit of the last digit of `0.692(13)` and `0.0(1.2)`."""
    value, error = re.fullmatch(r"(-?[\d.]+)\(([\d.]+)\)", cell).groups()
    unit = 10.0 ** -len(value.partition(".")[2])
    return float(value), float(error) * (1 if "." in error else unit), unit


def test_means_are_those_of_the_reports(compared, report, runs):
    for column, run in enumerate(KERNELS):
        found = report(runs[run])["observables"]
        assert set(found) == set(NAMES)
        for name in NAMES:
            value, error, unit = rounded(compared.rows[name][column])
            assert value == pytest.approx(found[name]["mean"], abs=0.5001 * unit)
            assert error == pytest.approx(found[name]["error"], abs=0.5001 * unit)


def test_differences_are_in_units_of_both_errors(compared, report, runs):
    first, *others = (report(runs[run])["observables"] for run in KERNELS)
    for name in NAMES:
        for cell, other in zip(compared.rows[name][3:5], others, strict=True):
            sigma = math.sqrt(first[name]["error"] ** 2 + other[name]["error"] ** 2)
            assert cell == f"{(other[name]['mean'] - first[name]['mean']) / sigma:+.1f}"


def test_p_is_that_of_one_common_mean(compared, report, runs):
    reports = [report(runs[run])["observables"] for run in KERNELS]
    for name in NAMES:
        means, errors = (np.array([r[name][key] for r in reports]) for key in ("mean", "error"))
        centre = np.sum(means / errors**2) / np.sum(1 / errors**2)
        expected = chi2.sf(np.sum((means - centre) ** 2 / errors**2), df=2)
        assert float(compared.rows[name][5]) == pytest.approx(expected, rel=0.06)


def test_exact_values_stand_in_the_last_column(compared):
    assert compared.rows["observable"] == ["1", "2", "3", "2-1 [sigma]", "3-1 [sigma]", "p", "exact"]
    assert float(compared.rows["plaquette"][-1]) == pytest.approx(u1_plaquette(2.0, (4, 4)), abs=5e-7)
    assert compared.rows["topological_charge"][-1] == "0"


def test_independent_runs_of_one_theory_agree(compared):
    """Four observables of which three are functions of the charge: below 1e-3 with probability 4e-3."""
    assert all(float(compared.rows[name][5]) > 1e-3 for name in NAMES)


def test_the_legend_names_the_runs(compared, runs):
    assert compared.out.splitlines()[:3] == [f"{i + 1}: {runs[name]}" for i, name in enumerate(KERNELS)]


def test_the_figure_is_where_it_was_asked_for(compared, figure):
    assert compared.out.splitlines()[-1] == str(figure)
    assert imread(figure).ndim == 3
    assert [path.name for path in figure.parent.iterdir()] == ["c.png"]


def test_the_figure_is_in_the_working_folder_by_default(program, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert program("compare", runs["hmc"], runs["winding"]).code == 0
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_effective_samples_per_cpu_second(program, report, runs, tmp_path):
    """With training, the seconds of the training are added to those of the chain."""
    outcome = program("compare", runs["trained"], runs["hmc"], "--out", tmp_path / "c.png")
    for number, run in (("1", "trained"), ("2", "hmc")):
        found = report(runs[run])
        spent, result = found["cpu_seconds"], found["observables"]["plaquette"]
        chain, training = spent.get("thermalising", 0) + spent["sampling"], spent.get("training", 0)
        assert (training > 0) == (run == "trained")
        rates = [
            result["n_eff"] / seconds if result["converged"] else math.nan for seconds in (chain, chain + training)
        ]
        assert outcome.rows[number][2] == "{:.3g} ({:.3g})".format(*rates)
        assert outcome.rows[number][:2] == [f"{training:.0f}", f"{chain:.0f}"]
    assert "N_eff/s (with training) plaquette" in outcome.rows["CPU seconds"]


def test_an_ensemble_file_is_as_good_as_its_folder(program, runs, tmp_path):
    folder = program("compare", runs["hmc"], runs["winding"], "--out", tmp_path / "a.png")
    moved = shutil.copy(runs["winding"] / "ensemble.h5", tmp_path / "elsewhere.h5")
    file = program("compare", runs["hmc"], moved, "--out", tmp_path / "b.png")
    assert file.code == 0
    assert file.rows == folder.rows


def test_entries_are_read_in_order(runs):
    entries = read_entries([runs["winding"], runs["hmc"]])
    assert [entry.config.run.seed for entry in entries] == [3, 2]
    assert entries[1].training_seconds == 0


def test_only_shared_observables_are_compared(program, runs, small_run, tmp_path):
    other = small_run(tmp_path / "other", 'analysis.observables=["plaquette", "polyakov_correlator"]', "run.seed=9")
    outcome = program("compare", runs["hmc"], other, "--out", tmp_path / "c.png")
    assert outcome.code == 0
    assert "plaquette" in outcome.rows
    assert not {"topological_charge", "polyakov_correlator[1]"} & set(outcome.rows)


@pytest.fixture(scope="module")
def arrays(small_run, tmp_path_factory):
    """Two runs of the same array observables."""
    folder, names = tmp_path_factory.mktemp("arrays"), '["polyakov_correlator", "wilson_loops"]'
    return [small_run(folder / f"{i}", f"analysis.observables={names}", f"run.seed={i}") for i in (11, 12)]


def test_components_of_arrays_are_compared_one_by_one(arrays, table_of):
    rows = table_of(comparison(read_entries(arrays)))
    assert rows["polyakov_correlator[0]"] == ["1", "1"]  # constant: no error, no difference, no p
    assert len(rows["wilson_loops[2,1]"]) == len(rows["creutz_ratios[2,2]"]) == 5  # two means, sigma, p, exact


def test_arrays_alone_can_be_compared(program, arrays, tmp_path):
    assert program("compare", *arrays, "--out", tmp_path / "c.png").code == 0


def test_the_grid_of_holonomies_is_no_difference_of_the_theory(program, runs, small_run, tmp_path):
    other = small_run(tmp_path / "other", "action.holonomies=[2, 1]", "chain.draws=16", until="measure")
    assert program("compare", runs["hmc"], other, "--out", tmp_path / "c.png").code == 0


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (["action.beta=2.5"], "action.beta"),
        (["lattice.shape=[4, 8]"], "lattice.shape"),
        (["action.kind=schwinger", "action.kappa=0.1"], "action.kind"),
    ],
)
def test_different_theories_are_refused(program, runs, small_run, tmp_path, changes, key):
    other = small_run(tmp_path / "other", *changes, "chain.replica=2", "chain.draws=4", until="measure")
    message = program("compare", runs["hmc"], other, "--out", tmp_path / "c.png").refused(2)
    assert all(words in message for words in (str(runs["hmc"]), str(other), key, "different theories"))
    assert not (tmp_path / "c.png").exists()


def test_different_hopping_parameters_are_refused(program, small_run, tmp_path):
    settings = ("action.kind=schwinger", "chain.replica=2", "chain.draws=4")
    one, two = (small_run(tmp_path / k, f"action.kappa=0.{k}", *settings, until="measure") for k in ("1", "2"))
    message = program("compare", one, two).refused(2)
    assert f"{one} and {two}" in message
    assert "action.kappa" in message
    assert "action.beta" not in message


@pytest.mark.parametrize("again", ["hmc", "hmc/ensemble.h5", "winding/../hmc"])
def test_one_ensemble_is_not_two(program, runs, again):
    assert "same configurations" in program("compare", runs["hmc"], runs["hmc"].parent / again).refused(2)


def test_a_path_that_does_not_exist(program, runs, tmp_path):
    assert str(tmp_path / "none") in program("compare", runs["hmc"], tmp_path / "none").refused(2)


def test_a_folder_without_an_ensemble(program, runs, tmp_path):
    assert str(tmp_path) in program("compare", runs["hmc"], tmp_path).refused(2)


def test_an_unmeasured_run(program, runs, unmeasured):
    message = program("compare", runs["hmc"], unmeasured).refused(2)
    assert f"latticeflow measure {unmeasured}" in message


@pytest.fixture
def loops_only(small_run, tmp_path):
    settings = ('analysis.observables=["wilson_loops"]', "chain.draws=8")
    return small_run(tmp_path / "loops", *settings, until="measure")


def test_no_shared_observable(program, runs, loops_only):
    assert "no observable in common" in program("compare", runs["hmc"], loops_only).refused(2)


def test_no_shared_observable_names_both(program, runs, loops_only):
    message = program("compare", runs["hmc"], loops_only).refused(2)
    assert str(runs["hmc"]) in message
    assert str(loops_only) in message


def test_one_ensemble_is_named(program, runs):
    assert str(runs["hmc"]) in program("compare", runs["hmc"], runs["hmc"]).refused(2)


def test_a_file_that_is_cut_is_bad_data(program, runs, tmp_path):
    whole = (runs["winding"] / "ensemble.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(whole[: len(whole) // 2])
    assert str(tmp_path / "cut.h5") in program("compare", runs["hmc"], tmp_path / "cut.h5").refused(65)


def test_a_file_of_another_kind_is_bad_data(program, runs, tmp_path):
    (tmp_path / "notes.txt").write_text("nothing to see here")
    assert "not an HDF5 file" in program("compare", runs["hmc"], tmp_path / "notes.txt").refused(65)


def test_a_changed_byte_of_an_observable_is_bad_data(program, runs, tmp_path):
    path = tmp_path / "changed.h5"
    shutil.copy(runs["winding"] / "ensemble.h5", path)
    with h5py.File(path) as file:
        offset = file["observables/plaquette"].id.get_chunk_info(0).byte_offset
    data = bytearray(path.read_bytes())
    data[offset + 5] ^= 1
    path.write_bytes(data)
    assert str(path) in program("compare", runs["hmc"], path).refused(65)


def test_a_figure_that_cannot_be_written(program, runs, tmp_path):
    outcome = program("compare", runs["hmc"], runs["winding"], "--out", tmp_path / "none" / "c.png")
    assert "none" in outcome.refused(2)


@pytest.mark.parametrize("name", ["c.xyz", "."])
def test_a_figure_without_a_known_format_is_a_usage_error(program, runs, tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert name in program("compare", runs["hmc"], runs["winding"], "--out", name).refused(2)


def test_one_ensemble_alone_has_a_table_without_differences(program, runs, tmp_path):
    outcome = program("compare", runs["hmc"], "--out", tmp_path / "c.png")
    assert outcome.code == 0
    assert outcome.rows["observable"] == ["1", "exact"]


def test_a_value_that_is_not_finite_is_bad_data(program, runs, tmp_path):
    path = tmp_path / "nan.h5"
    shutil.copy(runs["winding"] / "ensemble.h5", path)
    with Ensemble.open(path, "a") as ensemble:
        values = ensemble.observable("plaquette")
        values[3, 17] = np.nan
        ensemble.write_observable("plaquette", values)
    message = program("compare", runs["hmc"], path).refused(65)
    assert all(words in message for words in (str(path), "plaquette", "3", "17"))
