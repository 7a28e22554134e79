import hashlib
import io

import h5py
import numpy as np
import pytest

import latticeflow
from latticeflow.storage import DataError, Ensemble


def test_round_trip_with_a_shorter_last_block(path, kit):
    with Ensemble.create(path, **kit.settings()) as ensemble:
        kit.fill(ensemble)
        assert ensemble.n_committed == 20
        kit.check(ensemble)
    with Ensemble.open(path) as ensemble:
        assert (ensemble.theory, ensemble.lattice_shape) == ("u1", (4, 4))
        assert (ensemble.chains, ensemble.draws, ensemble.block) == (2, 20, 8)
        assert ensemble.config == kit.settings()["config"]
        assert (ensemble.field_names, sorted(ensemble.history_names)) == (["links"], ["accepted", "action"])
        kit.check(ensemble)


def test_only_committed_rows_exist(path, kit):
    with kit.fill(Ensemble.create(path, **kit.settings()), 8) as ensemble:
        assert ensemble.field("links").shape == (2, 8, 2, 4, 4)
        assert ensemble.field("links", slice(6, 12)).shape[1] == 2
        assert ensemble.field("links", slice(8, 12)).shape[1] == 0
        assert ensemble.history("action", slice(None, None, 3)).tolist() == [[0, 3, 6], [1000, 1003, 1006]]
        assert ensemble.history("action", slice(-1, None), chains=slice(1, 2)).tolist() == [[1007]]


def test_appending_goes_on_after_reopening(path, kit):
    kit.fill(Ensemble.create(path, **kit.settings()), 8).close()
    with Ensemble.open(path, "a") as ensemble:
        kit.check(kit.fill(ensemble, 16))
    with Ensemble.open(path, "a") as ensemble:
        kit.check(kit.fill(ensemble))


def test_an_open_reader_keeps_its_view_while_a_run_appends(path, kit):
    with Ensemble.create(path, **kit.settings()) as writer, Ensemble.open(path) as early:
        kit.fill(writer, 8)
        with Ensemble.open(path) as late:
            kit.fill(writer)
            assert (early.n_committed, late.n_committed, writer.n_committed) == (0, 8, 20)
            kit.check(late)


@pytest.mark.parametrize("dtype", ["bool", "int8", "int32", "uint16", "int64", "float32", "float64", "complex128"])
def test_types_survive_bit_for_bit(path, kit, dtype):
    values = np.random.default_rng(5).integers(0, 100, size=(3, 5, 7)).astype(dtype)
    settings = kit.settings(chains=3, draws=5, block=2, fields={"phi": ((7,), dtype), "one": ((), dtype)})
    with Ensemble.create(path, **settings | {"history": {"h": dtype}}) as ensemble:
        for rows in (slice(0, 2), slice(2, 4), slice(4, 5)):
            one = values[:, rows, 0]
            ensemble.append(fields={"phi": values[:, rows], "one": one}, history={"h": one})
        for found, expected in (("phi", values), ("one", values[:, :, 0])):
            assert ensemble.field(found).dtype == dtype
            assert ensemble.field(found).tobytes() == expected.tobytes()
        assert ensemble.history("h").tobytes() == values[:, :, 0].tobytes()
        assert ensemble.verify() == []


def test_proposals_grow_with_the_chain(path, kit):
    with Ensemble.create(path, **kit.settings(proposals={"log_weight": 3})) as ensemble:
        for first, count in ((0, 8), (8, 8), (16, 4)):
            weights = np.arange(3 * first, 3 * (first + count)) + np.array([[0.0], [0.5]])
            ensemble.append(**kit.block(first, count), proposals={"log_weight": weights})
            assert ensemble.proposals("log_weight").shape == (2, 3 * ensemble.n_committed)
        np.testing.assert_array_equal(ensemble.proposals("log_weight"), np.arange(60) + np.array([[0.0], [0.5]]))


def test_blocks_can_be_read_one_at_a_time(full, kit):
    expected = kit.block(0, 20)["fields"]["links"]
    with Ensemble.open(full) as ensemble:
        assert [(draws.start, draws.stop) for draws, _ in ensemble.iter_blocks("links")] == [(0, 8), (8, 16), (16, 20)]
        for size in (1, 7, 100):
            pieces = [links for _, links in ensemble.iter_blocks("links", size=size)]
            np.testing.assert_array_equal(np.concatenate(pieces, axis=1), expected)


def test_an_existing_file_is_not_overwritten(full, kit):
    before = full.read_bytes()
    with pytest.raises(FileExistsError, match="not overwritten"):
        Ensemble.create(full, **kit.settings())
    assert full.read_bytes() == before
    assert not list(full.parent.glob("*.partial"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draws": 0}, "draws is 0"),
        ({"chains": True}, "chains is True"),
        ({"block": 1.5}, "block is 1.5"),
        ({"lattice_shape": (4, -1)}, r"lattice_shape\[1\] is -1"),
        ({"fields": {}}, "at least one field"),
        ({"fields": {"a/b": ((2,), float)}}, "'a/b'"),
        ({"fields": {"links": ((2, 0), float)}}, r"\(2, 0\)"),
        ({"fields": {"links": ((2,), object)}}, "dtype object"),
        ({"history": {"action": "U3"}}, "dtype <U3"),
        ({"proposals": {"log_weight": 0}}, "0 per draw"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_made(path, kit, changes, message):
    with pytest.raises(ValueError, match=message):
        Ensemble.create(path, **kit.settings(**changes))
    assert list(path.parent.iterdir()) == []


def test_a_block_that_does_not_fit_is_refused_whole(path, kit):
    with kit.fill(Ensemble.create(path, **kit.settings()), 8) as ensemble:
        good = kit.block(8, 8)
        links, action = good["fields"]["links"], good["history"]["action"]
        bad = [
            (kit.block(8, 5), r"shape \(2, 5, 2, 4, 4\), expected \(2, 8, 2, 4, 4\)"),
            (
                good | {"fields": {"links": links.astype(complex)}},
                "dtype complex128, expected float64",
            ),
            (good | {"history": {"action": action}}, "missing .'history/accepted'."),
            (good | {"fields": {"links": links, "phi": 1}}, "knows no .'fields/phi'."),
        ]
        before = path.read_bytes()
        for arrays, message in bad:
            with pytest.raises(ValueError, match=message):
                ensemble.append(**arrays)
        assert path.read_bytes() == before
        kit.check(kit.fill(ensemble))
        with pytest.raises(ValueError, match="all of its 20 draws"):
            ensemble.append(**kit.block(20, 8))


def test_a_file_to_read_cannot_be_written(full, kit):
    with Ensemble.open(full) as ensemble:
        with pytest.raises(io.UnsupportedOperation, match="mode 'a'"):
            ensemble.append(**kit.block(0, 8))
        with pytest.raises(io.UnsupportedOperation, match="mode 'a'"):
            ensemble.write_analysis("action", {"mean": 1.0})
    with pytest.raises(ValueError, match="was closed"):
        ensemble.observable("plaquette")
    with pytest.raises(ValueError, match="'w'"):
        Ensemble.open(full, "w")


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"theory": "scalar"}, "theory is 'u1', expected 'scalar'"),
        ({"lattice_shape": (8, 4)}, r"lattice_shape is \(4, 4\), expected \(8, 4\)"),
        ({"fields": {"phi": ((4, 4), float)}}, "field phi is None"),
        ({"fields": {"links": ((2, 4, 4), "f4")}}, "float64.*, expected .*float32"),
        ({"fields": {"links": ((2, 8, 4), float)}}, r"\(2, 4, 4\).*, expected .*\(2, 8, 4\)"),
    ],
)
def test_a_file_of_something_else_is_refused_with_both_values(full, expected, message):
    with pytest.raises(DataError, match=message):
        Ensemble.open(full, **expected)


def test_what_is_expected_is_accepted(full, kit):
    settings = kit.settings()
    Ensemble.open(full, **{name: settings[name] for name in ("theory", "lattice_shape", "fields")}).close()


def test_unknown_names_are_answered_with_the_known_ones(full):
    with Ensemble.open(full) as ensemble:
        with pytest.raises(KeyError, match="it has links"):
            ensemble.field("phi")
        with pytest.raises(KeyError, match="it has accepted, action"):
            ensemble.history("crc32")


def test_plain_h5py_reads_the_file(full, kit):
    with h5py.File(full) as file:
        count = file["state/n_committed"][()]
        np.testing.assert_array_equal(file["fields/links"][:, :count], kit.block(0, 20)["fields"]["links"])
        assert file["history/accepted"].dtype == bool
        assert [axis.label for axis in file["history/action"].dims] == ["chain", "draw"]
        assert file["fields/links"].fletcher32
        assert file["fields/links"].compression is None
        assert {name: plain(value) for name, value in file.attrs.items()} == {
            "format": "latticeflow-ensemble",
            "format_version": 2,
            "theory": "u1",
            "lattice_shape": [4, 4],
            "config": kit.settings()["config"],
            "config_sha256": hashlib.sha256(kit.settings()["config"].encode()).hexdigest(),
            "package_version": latticeflow.__version__,
            "chains": 2,
            "draws": 20,
            "block": 8,
            "first_draw": 0,
            "continues": "",
        }


def plain(value):
    return value.decode() if isinstance(value, bytes) else value.tolist()


def test_xarray_shows_named_axes(full, kit):
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("h5netcdf")
    with Ensemble.open(full, "a") as ensemble:
        ensemble.write_observable("plaquette", np.ones((2, 20, 3)))
        ensemble.write_training({"step": [1, 2], "loss": [2.0, 1.0]})
    with xarray.open_dataset(full, group="fields", engine="h5netcdf") as fields:
        assert fields.links.dims == ("chain", "draw", "links_dim_0", "links_dim_1", "links_dim_2")
        np.testing.assert_array_equal(fields.links, kit.block(0, 20)["fields"]["links"])
    for group in ("history", "checksum", "observables"):
        with xarray.open_dataset(full, group=group, engine="h5netcdf") as dataset:
            assert all(variable.dims[:2] == ("chain", "draw") for variable in dataset.data_vars.values())
            assert dataset.sizes["draw"] == 20
    with xarray.open_dataset(full, group="training", engine="h5netcdf") as training:
        assert training.loss.sel(step=2) == 1.0
