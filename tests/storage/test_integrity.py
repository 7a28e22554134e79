import zlib

import h5py
import numpy as np
import pytest

from latticeflow.storage import DataError, Ensemble
from latticeflow.storage.integrity import checksums


def flip(path, offset, bit=0):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def chunk(path, name, row, chain=0):
    with h5py.File(path) as file:
        dataset = file[name]
        return dataset.id.get_chunk_info_by_coord((chain, row, *(0,) * (dataset.ndim - 2))).byte_offset


def test_a_checksum_covers_the_fields_in_alphabetical_order(path, kit):
    settings = kit.settings(fields={"b": ((3,), "float32"), "a": ((2,), "int16")}, history={})
    a, b = np.arange(32, dtype="int16").reshape(2, 8, 2), np.arange(48, dtype="float32").reshape(2, 8, 3)
    with Ensemble.create(path, **settings) as ensemble:
        ensemble.append(fields={"b": b, "a": a})
    with h5py.File(path) as file:
        assert file["checksum/crc32"][1, 5] == zlib.crc32(a[1, 5].tobytes() + b[1, 5].tobytes())
    np.testing.assert_array_equal(checksums([b]), [[zlib.crc32(row.tobytes()) for row in chain] for chain in b])


@pytest.mark.parametrize("name", ["fields/links", "history/action", "history/accepted", "checksum/crc32"])
def test_verify_names_the_draws_of_a_flipped_bit(full, name):
    flip(full, chunk(full, name, 8, chain=1) + 3, bit=6)
    with Ensemble.open(full) as ensemble:
        assert ensemble.verify() == [(1, draw) for draw in range(8, 16)]


def test_a_flip_that_hdf5_cannot_see_is_found_by_the_crc32(full):
    """Swapping a word 0x0000 for 0xffff leaves fletcher32 as it is."""
    place = chunk(full, "fields/links", 0) + 256
    data = bytearray(full.read_bytes())
    with h5py.File(full, "r+") as file:
        file["fields/links"][0, 1, 0, 0, 0] = 0.0
    data = bytearray(full.read_bytes())
    data[place : place + 2] = b"\xff\xff"
    full.write_bytes(data)
    with Ensemble.open(full) as ensemble:
        assert ensemble.verify() == [(0, 1)]
        with pytest.raises(DataError, match="fields are damaged at chain 0 draw 1 "):
            ensemble.field("links", slice(1, 2))


def test_reading_flipped_data_names_the_draws(full, kit):
    flip(full, chunk(full, "fields/links", 16, chain=1) + 40)
    expected = kit.block(0, 20)["fields"]["links"]
    with Ensemble.open(full) as ensemble:
        with pytest.raises(DataError, match="fields/links is damaged at chain 1 draws 16 to 19 ") as caught:
            ensemble.field("links")
        assert caught.value.exit_code == 65
        np.testing.assert_array_equal(ensemble.field("links", slice(0, 16)), expected[:, :16])
        np.testing.assert_array_equal(ensemble.field("links", chains=slice(0, 1)), expected[:1])


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_bad_data(full, fraction):
    data = full.read_bytes()
    full.write_bytes(data[: int(fraction * len(data))])
    with pytest.raises(DataError, match=r"truncated|not an HDF5 file"):
        Ensemble.open(full)


def test_a_wrong_beginning_is_bad_data(full):
    flip(full, 1)
    with pytest.raises(DataError, match="not an HDF5 file"):
        Ensemble.open(full)


def test_another_hdf5_file_is_bad_data(path):
    with h5py.File(path, "w") as file:
        file["x"] = 1
    with pytest.raises(DataError, match="format is None, expected 'latticeflow-ensemble'"):
        Ensemble.open(path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("format", "something", "format is 'something'"),
        ("format_version", 3, "format_version is 3, expected 2"),
        ("config", "beta = 3", "config_sha256"),
        ("draws", 21, r"shape of .* is \(2, 20.*\), expected \(2, 21"),
        ("block", 0, "block is 0"),
    ],
)
def test_a_header_that_contradicts_itself_is_bad_data(full, name, value, message):
    with h5py.File(full, "r+") as file:
        file.attrs[name] = value
    with pytest.raises(DataError, match=message):
        Ensemble.open(full)


@pytest.mark.parametrize("count", [-1, 7, 24])
def test_an_impossible_marker_is_bad_data(full, count):
    set_marker(full, count, ~count)
    with pytest.raises(DataError, match=f"n_committed is {count}, expected 20 or a smaller multiple of 8"):
        Ensemble.open(full)


@pytest.mark.parametrize(("count", "other"), [(8, 20), (0, 16), (20, 0), (20, 8)])
def test_a_marker_that_its_complement_contradicts_is_bad_data(full, count, other):
    set_marker(full, count, ~other)
    with pytest.raises(DataError, match=f"is {count}, by its complement {other}"):
        Ensemble.open(full)


@pytest.mark.parametrize(("count", "other"), [(24, 16), (16, 24), (13, 20), (20, 12)])
def test_a_marker_that_is_no_end_of_a_block_is_bad_data(full, count, other):
    set_marker(full, count, ~other)
    with pytest.raises(DataError, match="expected 20 or a smaller multiple of 8"):
        Ensemble.open(full)


@pytest.mark.parametrize(("count", "other"), [(0, 8), (8, 16), (16, 20), (8, 0), (20, 16)])
def test_one_block_between_marker_and_complement_is_a_death_between_the_two(full, kit, count, other):
    set_marker(full, count, ~other)
    with Ensemble.open(full) as ensemble:
        assert ensemble.n_committed == max(count, other)
        kit.check(ensemble)
    Ensemble.open(full, "a").close()
    with h5py.File(full) as file:
        assert file["state/n_committed"][()] == ~file["state/complement"][()] == max(count, other)


def test_the_marker_is_within_a_sector(full):
    with h5py.File(full) as file:
        assert all(file[name].id.get_offset() % 8 == 0 for name in ("state/n_committed", "state/complement"))


def set_marker(path, count, complement):
    with h5py.File(path, "r+") as file:
        file["state/n_committed"][()] = count
        file["state/complement"][()] = complement


def test_a_missing_file_is_missing_and_not_damaged(tmp_path):
    with pytest.raises(FileNotFoundError):
        Ensemble.open(tmp_path / "none.h5")
