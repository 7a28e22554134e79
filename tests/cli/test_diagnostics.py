"""What a run says about itself: frozen chains are flagged whatever their ESS, honest ones are left in peace."""

import shutil

import numpy as np
import pytest

from latticeflow.cli import main
from latticeflow.exact import u1_charge_distribution, u1_log_z
from latticeflow.storage import Ensemble

FROZEN_PRIOR = 'sampler.prior={kind = "quenched", sector = 30.0}'
SCHWINGER = ("action.kind=schwinger", "action.kappa=0.1", "baseline.samples=1024")


def serious(report):
    """Return the warnings but for those of single observables, which speak of their statistics."""
    numbers = {name.partition("[")[0] for name in report["observables"]}
    return [text for text in report["warnings"] if text.partition(":")[0] not in numbers]


@pytest.fixture(scope="module")
def frozen(small_run, tmp_path_factory, runs):
    """A flow that proposes Q = 0 alone, with target samples from a run of HMC."""
    folder = tmp_path_factory.mktemp("frozen") / "run"
    return small_run(folder, FROZEN_PRIOR, f"analysis.reference={runs['winding']}")


def test_a_frozen_flow_is_flagged_though_its_ess_is_one(frozen, report):
    found = report(frozen)
    assert found["proposals"]["ess"] > 0.999
    assert found["kernels"]["independence"]["acceptance"] > 0.99
    assert found["sectors"]["frozen"] is True
    warnings = " ".join(serious(found))
    for words in ("frozen in Q = 0", "the exact distribution", "Q = 1 by -", "miss a part of the target"):
        assert words in warnings


def test_a_reference_shows_what_the_proposals_miss(frozen, report, runs):
    """log Z of the proposals is that of their sector; with the reference it is right: 4 sigma, 6e-5."""
    found = report(frozen)
    charges, probabilities = u1_charge_distribution(2.0, (4, 4))
    sector = float(np.log(probabilities[charges == 0][0]))
    forward, exact = found["forward"], u1_log_z(2.0, (4, 4))
    assert found["proposals"]["log_z"] == pytest.approx(exact + sector, abs=1e-6)
    assert forward["source"] == str(runs["winding"])
    assert forward["ess"] < 1e-6
    assert forward["log_z_error"] < 0.08
    assert abs(forward["log_z"] - exact) < 4 * forward["log_z_error"]


def test_the_table_shows_both(frozen, program):
    text = program("analyse", frozen).out
    assert "(forward)" in text
    assert "abs(Q) = 0: 1.0000 (0.7175)" in text
    assert "warning: the topological charge never changed" in text


@pytest.mark.parametrize("source", ["reweighted quenched draws", "the reference"])
def test_a_frozen_flow_of_the_schwinger_model(small_run, report, tmp_path, source):
    """No exact distribution here: reweighted quenched draws do, or a reference, here by an honest flow."""
    settings = [*SCHWINGER, FROZEN_PRIOR]
    if source == "the reference":
        honest = small_run(tmp_path / "honest", *SCHWINGER, "run.seed=2", until="sample")
        settings.append(f"analysis.reference={honest}")
    found = report(small_run(tmp_path / "frozen", *settings))
    assert found["sectors"]["source"] == source
    assert found["sectors"]["frozen"] is True
    assert found["proposals"]["ess"] > 0.99
    assert any(f"differ from {source}" in text for text in found["warnings"])
    if source == "the reference":
        assert found["forward"]["ess"] < 1e-6
        assert abs(found["forward"]["log_z"] - found["baseline"]["log_z"]) < 4 * found["forward"]["log_z_error"]


@pytest.mark.parametrize("seed", [11, 12, 13, 14])
def test_an_honest_flow_is_not_flagged(small_run, report, tmp_path, seed):
    """Three sectors of 4 sigma in four runs: one false alarm in a thousand such tests."""
    found = report(small_run(tmp_path / "run", f"run.seed={seed}"))
    assert serious(found) == []
    assert found["sectors"]["frozen"] is False


@pytest.mark.parametrize("seed", [1, 2])
def test_an_honest_flow_of_the_schwinger_model_is_not_flagged(small_run, report, tmp_path, seed):
    """As above; whether it beats quenched draws, which it is, is tested beside `weight_warnings`."""
    found = report(small_run(tmp_path / "run", *SCHWINGER, f"run.seed={seed}"))
    assert [text for text in serious(found) if "do not beat" not in text] == []


def test_honest_kernels_are_not_flagged(runs, report):
    for name in ("independence", "winding"):
        assert serious(report(runs[name])) == []


def test_hmc_frozen_from_cold_is_flagged(small_run, report, tmp_path):
    """At this coupling HMC does not leave Q = 0, where one draw in six should not be."""
    settings = ("lattice.shape=[8, 8]", "action.beta=8.0", 'chain.kernels=["hmc"]', "chain.start=cold")
    found = report(small_run(tmp_path / "run", *settings, "chain.thermalisation=60"))
    assert found["proposals"] is None
    assert found["sectors"]["changes"] == 0
    assert sum("frozen in Q = 0" in text or "Q = 0 by +" in text for text in found["warnings"]) == 2


def negative_pion(small_run, folder, *settings):
    """Return a measured run of the Schwinger model whose pion correlator is made to be below zero."""
    small_run(folder, *SCHWINGER[:2], *settings, until="measure")
    noise = np.random.default_rng(1).normal(0, 0.01, (8, 64, 3))
    with Ensemble.open(folder / "ensemble.h5", "a") as ensemble:
        ensemble.write_observable("pion_correlator", [-1.0, -2.0, -3.0] + noise)
    return folder


def test_what_is_not_defined_is_called_so(small_run, program, report, tmp_path):
    negative = negative_pion(small_run, tmp_path / "negative")
    other = negative_pion(small_run, tmp_path / "other", "run.seed=12")
    rows = program("analyse", negative).rows
    assert rows["pion_effective_mass[1]"] == ["undefined"]
    assert rows["pion_correlator[1]"][0].startswith(("-1.99", "-2.00"))
    found = report(negative)
    assert found["derived"]["pion_effective_mass[1]"]["mean"] is None
    assert any("pion_effective_mass" in name for name in found["derived"])
    with Ensemble.open(negative / "ensemble.h5") as ensemble:
        assert np.isnan(ensemble.analysis()["pion_effective_mass"]["mean"]).all()
    compared = program("compare", negative, other, "--out", tmp_path / "c.png")
    assert compared.code == 0
    assert compared.rows["pion_effective_mass[1]"] == ["undefined", "undefined"]


def test_a_constant_observable_is_named(small_run, program, tmp_path):
    """Without fermions the condensate is a constant."""
    folder = small_run(tmp_path / "run", "action.kind=schwinger", "action.kappa=0.0")
    outcome = program("analyse", folder)
    assert outcome.rows["condensate"][0] == "2"
    assert "warning: condensate: the series is constant: its error cannot be estimated" in outcome.out
    assert program("plot", folder).code == 0


@pytest.fixture(scope="module")
def holed(runs, tmp_path_factory):
    """A run with one stored value that is not a number."""
    folder = shutil.copytree(runs["independence"], tmp_path_factory.mktemp("holed") / "run")
    with Ensemble.open(folder / "ensemble.h5", "a") as ensemble:
        values = ensemble.observable("plaquette")
        values[3, 17] = np.nan
        ensemble.write_observable("plaquette", values)
    return folder


@pytest.mark.parametrize("command", ["analyse", "plot"])
def test_a_value_that_is_not_finite_is_bad_data(holed, program, command):
    message = program(command, holed).refused(65)
    assert all(words in message for words in ("plaquette", "3", "17", "nan"))


@pytest.mark.parametrize("draws", [1, 3])
def test_a_chain_too_short_for_errors_is_refused_before_it_is_run(program, tmp_path, draws):
    (tmp_path / "a.toml").write_text('lattice.shape = [4, 4]\naction = {kind = "u1", beta = 2.0}\n')
    outcome = program("run", tmp_path / "a.toml", "--set", f"chain.draws={draws}", "--set", "chain.replica=2")
    assert outcome.code in (2, 78)
    assert "4" in outcome.err


@pytest.mark.parametrize("draws", [4, 5])
def test_a_very_short_chain_has_warnings(small_run, program, tmp_path, draws):
    folder = small_run(tmp_path / "run", f"chain.draws={draws}", "chain.replica=2")
    assert "the error is too small" in program("analyse", folder).out
    assert program("plot", folder).code == 0


@pytest.fixture
def diverging(tmp_path):
    """A configuration whose trajectories all diverge."""
    text = 'lattice.shape = [4, 4]\naction = {kind = "scalar", m2 = 1.0, lam = 50.0}\n'
    text += 'sampler.prior = {kind = "normal", scale = 3.0}\n'
    text += 'chain = {kernels = ["hmc"], replica = 4, draws = 8, thermalisation = 0}\n'
    (tmp_path / "scalar.toml").write_text(text)
    return tmp_path / "scalar.toml"


def test_trajectories_that_diverge_end_the_run(program, diverging):
    outcome = program("run", diverging)
    assert outcome.refused(1).startswith("latticeflow: 32 of 32 proposals had a non-finite action")


def test_an_ensemble_without_draws_cannot_be_measured(program, diverging):
    assert program("run", diverging).code == 1
    assert "no draws" in program("measure", diverging.with_suffix("")).refused(2)


def reference_run(program, path, reference, *changes):
    text = 'run.threads = 1\nlattice.shape = [4, 4]\naction = {kind = "u1", beta = 2.0}\n'
    text += "chain = {replica = 4, draws = 8}\nbaseline = {samples = 64, beta = 2.0}\n"
    path.write_text(text + f"analysis.reference = '{reference}'\n")
    return program("run", path, *(word for change in changes for word in ("--set", change)))


def test_a_reference_of_another_theory_is_bad_data(program, runs, tmp_path):
    outcome = reference_run(program, tmp_path / "a.toml", runs["winding"], "action.beta=2.5")
    assert outcome.code == 65
    message = outcome.err.splitlines()[-1]
    assert message.startswith(f"latticeflow: analysis.reference: {runs['winding']}")
    assert "action.beta" in message


def test_a_missing_reference_is_found_before_anything_runs(program, tmp_path):
    outcome = reference_run(program, tmp_path / "a.toml", tmp_path / "none")
    assert outcome.code == 78
    assert "analysis.reference" in outcome.err
    assert str(tmp_path / "none") in outcome.err
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("kind", ["another theory", "no ensemble", "not HDF5", "no draws"])
def test_a_useless_reference_is_found_before_anything_runs(program, runs, diverging, tmp_path, kind):
    reference = {"another theory": runs["winding"], "not HDF5": diverging}.get(kind, tmp_path / "reference")
    if kind == "no ensemble":
        reference.mkdir()
    if kind == "no draws":
        assert main(["run", str(diverging), "--out", str(reference)]) == 1
    outcome = reference_run(program, tmp_path / "a.toml", reference, "action.beta=2.5")
    assert outcome.code != 0
    assert not (tmp_path / "a").exists()


def test_a_wrong_reference_can_be_corrected(program, runs, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    assert reference_run(program, tmp_path / "a.toml", wrong).code == 2
    text = (tmp_path / "a.toml").read_text().replace(str(wrong), str(runs["winding"]))
    (tmp_path / "a.toml").write_text(text)
    assert program("run", tmp_path / "a.toml", "--resume").code == 0
