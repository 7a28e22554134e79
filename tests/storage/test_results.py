import numpy as np
import pytest

from latticeflow.storage import DataError, Ensemble


@pytest.fixture
def ensemble(path, kit):
    with kit.fill(Ensemble.create(path, **kit.settings()), 16) as ensemble:
        yield ensemble


@pytest.mark.parametrize(
    "values",
    [
        np.arange(32.0).reshape(2, 16),
        np.arange(20, dtype="int64").reshape(2, 10),
        np.linspace(0, 1, 2 * 16 * 3 * 2).astype("float32").reshape(2, 16, 3, 2),
        np.arange(32).reshape(2, 16) % 2 == 0,
        np.exp(1j * np.arange(32.0)).reshape(2, 16),
    ],
    ids=["float64", "part of the draws", "float32", "bool", "complex"],
)
def test_an_observable_is_read_as_it_was_written(ensemble, path, kit, values):
    ensemble.write_observable("plaquette", np.zeros((2, 5, 4)))
    ensemble.write_observable("plaquette", values)
    kit.check(ensemble)
    ensemble.close()
    with Ensemble.open(path) as reader:
        found = reader.observable("plaquette")
        assert (found.dtype, found.shape) == (values.dtype, values.shape)
        np.testing.assert_array_equal(found, values)
        assert reader.observable_names == ["plaquette"]


def test_replacing_takes_no_further_space(ensemble, path):
    sizes = []
    for _ in range(4):
        ensemble.write_observable("charge", np.zeros((2, 16, 50)))
        sizes.append(path.stat().st_size)
    assert sizes[-1] == sizes[1]


@pytest.mark.parametrize("shape", [(3, 16), (2, 17), (2, 0), (2,)])
def test_an_observable_that_does_not_fit_is_refused(ensemble, shape):
    with pytest.raises(ValueError, match=r"expected \(2, 1 to 16, \.\.\.\)"):
        ensemble.write_observable("charge", np.zeros(shape))
    with pytest.raises(ValueError, match="'a/b' cannot name"):
        ensemble.write_observable("a/b", np.zeros((2, 16)))
    assert ensemble.observable_names == []


def test_analysis_keeps_numbers_and_arrays(ensemble, path):
    numbers = {
        "mean": 0.75,
        "error": np.float64(1e-3),
        "window": 7,
        "n": np.int64(16),
        "converged": True,
        "ess": np.nan,
    }
    rho = np.exp(-np.arange(9.0))
    ensemble.write_analysis("plaquette", {"old": 1}, {"gone": [1.0]})
    ensemble.write_analysis("plaquette", numbers, {"rho": rho})
    ensemble.write_analysis("charge", {"mean": 0.0})
    ensemble.close()
    with Ensemble.open(path) as reader:
        found = reader.analysis()
    assert set(found) == {"plaquette", "charge"}
    assert {name: found["plaquette"][name] for name in numbers if name != "ess"} == {
        name: value for name, value in numbers.items() if name != "ess"
    }
    assert np.isnan(found["plaquette"]["ess"])
    assert set(found["plaquette"]) == {*numbers, "rho"}
    np.testing.assert_array_equal(found["plaquette"]["rho"], rho)


def test_analysis_refuses_what_is_no_number(ensemble):
    with pytest.raises(TypeError, match=r"mean is '0\.75', expected a number"):
        ensemble.write_analysis("plaquette", {"mean": "0.75"})
    with pytest.raises(ValueError, match="rho is given as a number and as an array"):
        ensemble.write_analysis("plaquette", {"rho": 1.0}, {"rho": [1.0]})
    with pytest.raises(ValueError, match="plaquette/rho has shape"):
        ensemble.write_analysis("plaquette", {}, {"rho": []})
    assert ensemble.analysis() == {}


def test_training_is_replaced_whole(ensemble):
    assert ensemble.training() == {}
    ensemble.write_training({"step": [1], "loss": [9.0], "seconds": [0.5]})
    record = {"step": np.arange(5), "loss": np.linspace(2, 1, 5), "ess": np.linspace(0, 1, 5).astype("float32")}
    ensemble.write_training(record)
    found = ensemble.training()
    assert set(found) == set(record)
    for name, values in record.items():
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize("record", [{"loss": [1.0]}, {"step": [1, 2], "loss": [1.0]}, {"step": 1}, {}, {"step": []}])
def test_a_ragged_training_record_is_refused(ensemble, record):
    with pytest.raises(ValueError, match="shape"):
        ensemble.write_training(record)


def test_a_set_of_proposals_is_stored_beside_those_of_the_chain(path, kit):
    with Ensemble.create(path, **kit.settings(proposals={"log_weight": 1})) as ensemble:
        ensemble.append(**kit.block(0, 8), proposals={"log_weight": np.ones((2, 8))})
        ensemble.write_proposals("independent", np.arange(1000.0))
        ensemble.write_proposals("independent", np.arange(6.0).reshape(2, 3))
        assert sorted(ensemble.proposal_names) == ["independent", "log_weight"]
        assert ensemble.proposals("independent").tolist() == [[0, 1, 2], [3, 4, 5]]
        with pytest.raises(ValueError, match="pass them to append"):
            ensemble.write_proposals("log_weight", np.ones(3))
        with pytest.raises(ValueError, match=r"shape \(1, 1, 1\)"):
            ensemble.write_proposals("independent", np.ones((1, 1, 1)))
        ensemble.append(**kit.block(8, 8), proposals={"log_weight": np.zeros((2, 8))})
    with Ensemble.open(path) as reader:
        assert reader.proposals("log_weight").shape == (2, 16)


def test_damage_in_results_is_named(ensemble, path):
    mark = np.full((2, 16), 1.2345678)
    ensemble.write_observable("plaquette", mark)
    ensemble.close()
    path.write_bytes(path.read_bytes().replace(mark[0, :1].tobytes(), b"\x01" * 8, 1))
    with Ensemble.open(path) as reader, pytest.raises(DataError, match="observables/plaquette cannot be read"):
        reader.observable("plaquette")
