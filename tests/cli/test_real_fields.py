"""Real fields from the command line: the whole road of stabilised flows and densities, and its exact continuation."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from latticeflow.cli import folder as folder_module
from latticeflow.exact import scalar_free_log_z, scalar_free_phi_squared

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
symmetry = "z2"
sites = "shared"
[sampler.prior]
kind = "free_field"
m2 = 0.67
[training]
steps = 8
batch = 32
warmup = 0
window = 4
learning_rate = 1e-2
checkpoint_every = 3
[chain]
replica = 16
draws = 32
block = 8
candidates = 64
"""

DENSITY = """
[run]
seed = 2
threads = 1
[lattice]
shape = [4]
[action]
kind = "funnel"
[sampler]
kind = "stabilised"
layers = 2
conditioner = "dense"
hidden = [8]
[training]
steps = 4
batch = 16
dtype = "float64"
[chain]
replica = 8
draws = 32
candidates = 64
[analysis]
observables = ["first_coordinate", "coordinates", "coordinates_squared"]
"""

FREE = ["action.m2=0.5", "action.lam=0.0", 'sampler.prior={kind = "free_field", m2 = 0.6}']
FIGURES = "latticeflow.cli.commands.draw_figures"


def changing(*changes):
    return [word for change in changes for word in ("--set", change)]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def without_figures(monkeypatch):
    monkeypatch.setattr(FIGURES, lambda folder: [])


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "phi4.toml"
    path.write_text(PHI4)
    return path


@pytest.fixture
def density(tmp_path) -> Path:
    path = tmp_path / "density.toml"
    path.write_text(DENSITY)
    return path


@pytest.fixture(scope="module")
def finished(program, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("road") / "phi4.toml"
    path.write_text(PHI4)
    assert program("run", path).code == 0
    return path.with_suffix("")


# ---------------------------------------------------------------- the whole road


def test_phi4_makes_the_whole_folder(finished):
    for name in ("config.toml", "ensemble.h5", "metrics.jsonl", "checkpoint"):
        assert (finished / name).exists()
    assert {path.name for path in finished.glob("figures/*")} == {"training.png", "weights.png", "autocorrelation.png"}
    assert [record["step"] for record in metrics(finished)] == list(range(1, 9))
    with h5py.File(finished / "ensemble.h5") as file:
        assert file["fields/phi"].shape == (16, 32, 4, 4)
        assert np.isfinite(file["history/log_weight"][:]).all()


def test_the_report_of_phi4_has_the_schwinger_dyson_identity(program, finished, report):
    """It is 0 in any exact ensemble, and the only closed form of the interacting theory."""
    found = report(finished)
    assert found["exact"] == {"schwinger_dyson": 0.0}
    identity = found["derived"]["schwinger_dyson"]
    row = program("analyse", finished).rows["schwinger_dyson"]
    assert row[-2:] == ["0", f"{identity['mean'] / identity['error']:+.1f}"]


@pytest.mark.usefixtures("without_figures")
def test_the_schwinger_dyson_identity_holds(program, config, report):
    """Five standard deviations, without long rejections: once in two million runs, were the seed not fixed."""
    changes = ("chain.kernels=['hmc']", "chain.replica=64", "chain.draws=64", "chain.thermalisation=60")
    assert program("run", config, *changing(*changes)).code == 0
    identity = report(config.with_suffix(""))["derived"]["schwinger_dyson"]
    assert identity["error"] < 0.05
    assert abs(identity["mean"]) < 5 * identity["error"]


@pytest.mark.usefixtures("without_figures")
def test_the_free_field_has_its_closed_forms(program, config, report):
    """Five standard deviations: once in two million runs each, were the seed not fixed."""
    assert program("run", config, *changing(*FREE)).code == 0
    found = report(config.with_suffix(""))
    assert found["exact"] == {
        "schwinger_dyson": 0.0,
        "phi_squared": pytest.approx(scalar_free_phi_squared(0.5, (4, 4))),
        "log_z": pytest.approx(scalar_free_log_z(0.5, (4, 4))),
    }
    squared, weights = found["observables"]["phi_squared"], found["proposals"]
    assert abs(squared["mean"] - found["exact"]["phi_squared"]) < 5 * squared["error"]
    assert abs(weights["log_z"] - found["exact"]["log_z"]) < 5 * weights["log_z_error"]
    assert abs(found["derived"]["schwinger_dyson"]["mean"]) < 5 * found["derived"]["schwinger_dyson"]["error"]


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize(
    ("shape", "changes"),
    [("[4, 2, 4]", []), ("[6]", []), ("[3, 5]", ['sampler.conditioner="dense"']), ("[2, 2, 2, 2]", [])],
)
def test_other_dimensions_go_the_same_road(program, config, report, shape, changes):
    short = ("training.steps=2", "chain.draws=8", f"lattice.shape={shape}", *changes)
    assert program("run", config, *changing(*short)).code == 0
    found = report(config.with_suffix(""))
    assert found["exact"] == {"schwinger_dyson": 0.0}
    with h5py.File(config.with_suffix("") / "ensemble.h5") as file:
        assert list(file["fields/phi"].shape[2:]) == json.loads(shape)


@pytest.mark.usefixtures("without_figures")
def test_a_coupling_flow_goes_the_same_road(program, config):
    (head, _, rest), flow = PHI4.partition("[sampler]"), '[sampler.flow]\nkind = "coupling"\nlayers = 2\nhidden = [4]'
    config.write_text(f"{head}{flow}\n[training]{rest.partition('[training]')[2]}")
    assert program("run", config, *changing('sampler.flow.transform="spline"', "chain.draws=8")).code == 0
    assert 'kind = "coupling"' in (config.with_suffix("") / "config.toml").read_text()


def test_a_funnel_goes_the_whole_road(program, density, report):
    outcome = program("run", density)
    assert outcome.code == 0
    found = report(density.with_suffix(""))
    arrays = {f"{name}[{i}]" for name in ("coordinates", "coordinates_squared") for i in range(4)}
    assert set(found["observables"]) == {"first_coordinate", *arrays}
    assert found["observables"]["coordinates[0]"]["mean"] == found["observables"]["first_coordinate"]["mean"]
    assert found["exact"] == {"log_z": 0.0}
    assert found["derived"] == {}
    with h5py.File(density.with_suffix("") / "ensemble.h5") as file:
        assert file["fields/x"].shape == (8, 32, 4)
        stored = file["fields/x"][:]
        np.testing.assert_array_equal(file["observables/coordinates_squared"][:], stored**2)


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize(
    ("kind", "exact"), [("student_t", True), ("mixture", True), ("linear_regression", True), ("horseshoe", False)]
)
def test_log_z_of_a_density_is_compared_where_it_is_known(program, density, report, kind, exact):
    text = DENSITY.replace('"funnel"', f'"{kind}"').partition("[analysis]")[0]
    density.write_text(text)
    assert program("run", density, *changing("chain.draws=8", "training.steps=1")).code == 0
    found = report(density.with_suffix(""))
    assert set(found["exact"]) == ({"log_z"} if exact else set())
    assert set(found["observables"]) == {"first_coordinate", "coordinate_mean"}


@pytest.mark.usefixtures("without_figures")
def test_a_density_by_hmc_needs_no_sampler(program, density, report):
    head = DENSITY.replace('"funnel"', '"horseshoe"').partition("[sampler]")[0]
    density.write_text(f"{head}[chain]\nkernels = ['hmc']\nreplica = 8\ndraws = 16\nthermalisation = 20\n")
    assert program("run", density).code == 0
    found = report(density.with_suffix(""))
    assert found["exact"] == {}
    assert found["proposals"] is None
    assert 0.3 < found["kernels"]["hmc"]["acceptance"] <= 1
    assert not (density.with_suffix("") / "metrics.jsonl").exists()


@pytest.mark.usefixtures("without_figures")
def test_flow_hmc_moves_in_the_latent_space_of_a_stabilised_flow(program, density):
    short = ("chain.kernels=['flow_hmc']", "chain.draws=8", "chain.thermalisation=8", "training.steps=2")
    assert program("run", density, *changing(*short)).code == 0
    with h5py.File(density.with_suffix("") / "ensemble.h5") as file:
        assert file["history/accepted"][:].any()


def test_check_says_what_proposes(program, config, density):
    rows = {path: program("check", path).out.splitlines() for path in (config, density)}
    (line,) = (line for line in rows[config] if line.startswith("sampler"))
    assert line.split(maxsplit=1)[1].startswith("prior free_field, flow stabilised of 4 layers, ")
    assert line.endswith(" parameters")
    assert "theory          Funnel(dimension=4, scale=3.0)" in rows[density]
    assert any(line.startswith("training        path, 4 steps of 16") for line in rows[density])
    assert not config.with_suffix("").exists()


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("linear_regression", [], "LinearRegression(dimension=4, observations=100)"),
        ("horseshoe", ["action.observations=30"], "HorseshoeLogistic(dimension=4, observations=30)"),
    ],
)
def test_check_shows_the_size_of_the_data(program, density, kind, changes, words):
    head = DENSITY.replace('"funnel"', f'"{kind}"').partition("[analysis]")[0]
    density.write_text(head)
    assert f"theory          {words}" in program("check", density, *changing(*changes)).out.splitlines()


def test_check_counts_the_layers_of_a_coupling_flow(program, config):
    head, _, tail = PHI4.partition("[sampler]")
    flow = '[sampler.flow]\nkind = "coupling"\nlayers = 6\nhidden = [4]\n[training]' + tail.partition("[training]")[2]
    config.write_text(head + flow)
    assert ", flow coupling of 6 layers, " in program("check", config).out
    config.write_text(f"{head}[chain]{tail.partition('[chain]')[2]}")
    assert ", flow identity, 0 parameters" in program("check", config).out


# ---------------------------------------------------------------- continuing


@pytest.mark.parametrize("stage", ["training", "chain"])
@pytest.mark.usefixtures("without_figures")
def test_resume_of_a_stabilised_run_is_the_same_run(program, finished, config, stage, monkeypatch):
    """Interrupted at the second checkpoint of a stage, resumed, and compared bit for bit with the undisturbed run."""
    calls, save = [], folder_module.save_checkpoint

    def failing(path, *arguments):
        calls.extend([1] if path.name == stage else [])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return save(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "save_checkpoint", failing)
        assert program("run", config).code == 130
    assert program("run", config, "--resume").code == 0
    assert_same(finished, config.with_suffix(""))


def assert_same(one, other):
    """Assert that two runs are bitwise the same but for the seconds."""
    strip = [[record | {"seconds": 0} for record in metrics(folder)] for folder in (one, other)]
    assert strip[0] == strip[1]
    with h5py.File(one / "ensemble.h5") as left, h5py.File(other / "ensemble.h5") as right:
        for name in ("fields/phi", "history/log_weight", "training/loss", "checksum/crc32"):
            np.testing.assert_array_equal(left[name][:], right[name][:])


@pytest.mark.usefixtures("without_figures")
def test_stages_one_by_one_give_the_same_as_run(program, finished, config):
    assert program("train", config).code == 0
    for stage in ("sample", "measure", "analyse"):
        assert program(stage, config.with_suffix("")).code == 0
    assert_same(finished, config.with_suffix(""))
