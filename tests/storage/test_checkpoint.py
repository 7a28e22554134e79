import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch

from latticeflow.storage import DataError, DiskFullError, atomic, load_checkpoint, save_checkpoint


def state(step):
    return {
        "model": {"weight": torch.full((3, 2), float(step)), "bias": torch.arange(2, dtype=torch.int64)},
        "optimizer": {
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.99), "foreach": None}],
            "state": {0: {"step": 1.0}},
        },
        "stream": {"key": 2**127 + 1, "name": "philox", "exhausted": False},
    }


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def newest(folder):
    return max(folder.glob("*.pt"))


def test_a_state_comes_back_as_it_was(tmp_path):
    path = save_checkpoint(tmp_path / "checkpoint", state(7), 7)
    found, step, notes = load_checkpoint(tmp_path / "checkpoint")
    assert (step, notes, path.name) == (7, [], "step-000000000007.pt")
    assert torch.equal(found["model"].pop("weight"), torch.full((3, 2), 7.0))
    assert torch.equal(found["model"].pop("bias"), torch.arange(2))
    assert found == state(7) | {"model": {}}


def test_what_torch_keeps_of_a_training_comes_back(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    generator = torch.Generator().manual_seed(5)
    full = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "generator": generator.get_state()}
    save_checkpoint(tmp_path, full, 1)
    found = load_checkpoint(tmp_path).state
    torch.optim.Adam(model.parameters()).load_state_dict(found["optimizer"])
    assert torch.equal(found["model"]["weight"], model.weight)
    assert torch.equal(found["generator"], generator.get_state())


def test_a_checkpoint_stores_a_slice_and_not_what_it_was_cut_from(tmp_path):
    path = save_checkpoint(tmp_path, {"slice": torch.zeros(10**6)[:3], "parameters": OrderedDict(a=torch.ones(1))}, 0)
    assert path.stat().st_size < 10_000


def test_the_newest_two_are_kept(tmp_path):
    for step in (1, 2, 5, 10):
        save_checkpoint(tmp_path, state(step), step)
    kept = ["step-000000000005.pt", "step-000000000010.pt"]
    assert names(tmp_path) == sorted(kept + [f"{name}.sha256" for name in kept])


def test_the_sum_is_one_that_sha256sum_reads(tmp_path):
    path = save_checkpoint(tmp_path, state(1), 1)
    digest, name = path.with_name(path.name + ".sha256").read_text().split()
    assert (len(digest), name) == (64, path.name)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "no sum", "bad sum"])
def test_a_damaged_newest_falls_back_and_says_so(tmp_path, damage):
    for step in (1, 2):
        save_checkpoint(tmp_path, state(step), step)
    path = newest(tmp_path)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    if damage in ("flip", "truncate", "empty"):
        path.write_bytes({"flip": data, "truncate": data[:-1], "empty": b""}[damage])
    sums = path.with_name(path.name + ".sha256")
    if damage == "no sum":
        sums.unlink()
    if damage == "bad sum":
        sums.write_bytes(b"\xff\xfe")
    found, step, notes = load_checkpoint(tmp_path)
    assert step == 1
    assert found["model"]["weight"][0, 0] == 1.0
    assert len(notes) == 1
    assert path.name in notes[0]
    assert "damaged" in notes[0]


def test_a_damaged_one_does_not_count_among_the_two(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, state(step), step)
    newest(tmp_path).write_bytes(b"")
    save_checkpoint(tmp_path, state(3), 3)
    assert [name for name in names(tmp_path) if name.endswith(".pt")] == [
        "step-000000000001.pt",
        "step-000000000003.pt",
    ]


def test_only_damaged_ones_are_bad_data_and_none_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_checkpoint(tmp_path / "nowhere")
    save_checkpoint(tmp_path, state(1), 1).write_bytes(b"")
    with pytest.raises(DataError, match="no valid checkpoint") as caught:
        load_checkpoint(tmp_path)
    assert caught.value.exit_code == 65


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_hostile_pickle_runs_nothing(tmp_path, form):
    from latticeflow.storage.checkpoint import _write

    folder, target = tmp_path / "checkpoint", tmp_path / "created"
    save_checkpoint(folder, state(1), 1)
    payload = {"format_version": 1, "step": 2, "state": Hostile(target)}
    path = folder / "step-000000000002.pt"
    if form == "torch":
        torch.save(payload, path)
    _write(path, path.read_bytes() if form == "torch" else pickle.dumps(payload))
    _, step, notes = load_checkpoint(folder)
    assert step == 1
    assert "refused" in notes[0]
    assert not target.exists()
    (folder / "step-000000000001.pt").unlink()
    with pytest.raises(DataError, match="refused"):
        load_checkpoint(folder)
    assert not target.exists()
    pickle.loads(pickle.dumps(Hostile(target)))
    assert target.exists(), "the pickle was a hostile one"


@pytest.mark.parametrize("payload", [{"format_version": 2, "step": 2, "state": {}}, {"step": 2}, [1, 2], 3])
def test_another_content_is_refused(tmp_path, payload):
    from latticeflow.storage.checkpoint import _write

    path = tmp_path / "step-000000000002.pt"
    torch.save(payload, path)
    _write(path, path.read_bytes())
    with pytest.raises(DataError, match=r"format version 2|refused"):
        load_checkpoint(tmp_path)


def test_a_checkpoint_under_another_name_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, state(1), 1)
    for suffix in ("", ".sha256"):
        path.with_name(path.name + suffix).rename(tmp_path / f"step-000000000009.pt{suffix}")
    with pytest.raises(DataError, match="step 1, expected format version 1 and step 9"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [1, {"b": np.zeros(3)}]}, r"state\['a'\]\[1\]\['b'\] is a numpy.ndarray"),
        ({"a": np.float64(1)}, r"state\['a'\] is a numpy.float64"),
        ({"a": len}, "builtin_function_or_method"),
        ({"a": {1, 2}}, "builtins.set"),
        ({"a": b"x"}, "builtins.bytes"),
        ({(1, 2): 3}, r"key \(1, 2\), a builtins.tuple"),
    ],
)
def test_anything_else_is_refused_by_name(tmp_path, value, message):
    with pytest.raises(TypeError, match=message):
        save_checkpoint(tmp_path / "checkpoint", value, 1)
    assert not (tmp_path / "checkpoint").exists()


def test_steps_go_forward(tmp_path):
    save_checkpoint(tmp_path, state(5), 5)
    with pytest.raises(ValueError, match="step 4 is behind"):
        save_checkpoint(tmp_path, state(4), 4)
    for step in (-1, 1.0, True):
        with pytest.raises(ValueError, match="expected an integer"):
            save_checkpoint(tmp_path, state(1), step)
    newest(tmp_path).write_bytes(b"")
    save_checkpoint(tmp_path, state(4), 4)
    assert load_checkpoint(tmp_path).step == 4


def test_a_full_disk_leaves_the_last_checkpoint_valid(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, state(1), 1)

    def no_space(descriptor):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patched:
        patched.setattr(atomic.os, "fsync", no_space)
        with pytest.raises(DiskFullError, match="bytes are needed"):
            save_checkpoint(tmp_path, state(2), 2)
    assert load_checkpoint(tmp_path).step == 1
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("dies_at", range(4))
def test_a_death_while_saving_leaves_a_valid_checkpoint(tmp_path, monkeypatch, dies_at):
    """The process ends at the n-th synchronisation of a file or folder: before, between and after the two renames."""
    save_checkpoint(tmp_path, state(1), 1)
    left = iter(range(dies_at))

    def dies(descriptor):
        if next(left, None) is None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(atomic.os, "fsync", dies)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, state(2), 2)
    assert load_checkpoint(tmp_path).step == (2 if dies_at == 3 else 1)
    save_checkpoint(tmp_path, state(2), 2)
    found, step, notes = load_checkpoint(tmp_path)
    assert (step, notes) == (2, [])
    assert found["model"]["weight"][0, 0] == 2.0
