"""What the benchmarks of speed share: turns, memory, rows, and where the time of a step goes."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from latticeflow.streams import stream

FOLDER = Path(__file__).parents[1] / "runs" / "benchmarks"
TINY = ["sampler.flow.layers=2", "sampler.flow.hidden=[4,4]", "training.batch=2", "training.dtype=float64"]


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


class Steps:
    """A clock by which every work takes the seconds that it returns."""

    def seconds(self, work):
        return work()


def test_works_take_turns_until_their_time_is_up(module):
    calls = []

    def taking(name, seconds):
        def work():
            calls.append(name)
            return seconds

        return work

    works = {"quick": taking("quick", 1.0), "slow": taking("slow", 4.0), "endless": taking("endless", 90.0)}
    found = module("timing").in_turns(works, Steps(), repeats=3, limit=10.0)
    assert found == {"quick": [1.0] * 3, "slow": [4.0], "endless": [90.0]}
    assert calls == ["quick", "slow", "endless", "quick", "slow", "quick", "quick"]
    assert module("timing").exponent([1, 2, 4], [3.0, 24.0, 192.0]) == pytest.approx(3)


def test_a_peak_counts_what_is_given_back(module):
    def work():
        for _ in range(3):
            torch.ones(25_000_000 // 4)

    work()
    found = [module("timing").peak_megabytes(work) for _ in range(5)]  # a busy machine may take pages away meanwhile
    assert min(abs(peak - 25) for peak in found) < 2


def test_rows_are_found_again_and_replaced(module, tmp_path, capsys):
    keys, machine = {"part": ("L", "name")}, {"torch": "x"}
    results = module("rows").Results("name", keys, lambda tables: f"{len(tables['part'])} rows", machine, tmp_path)
    assert not results.has("part", L=8, name="a")
    for value, name in ((1, "a"), (2, "b"), (3, "a")):
        results.keep("part", {"L": 8, "name": name, "value": value})
    assert results.has("part", L=8, name="b")
    assert not results.has("part", L=4, name="b")
    assert [row["value"] for row in results.tables()["part"]] == [3, 2]
    assert results.tables()["provenance"] == machine
    assert (tmp_path / "name.md").read_text() == "2 rows"
    assert [json.loads(line)["value"] for line in capsys.readouterr().out.splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("estimator", ["reinforce", "reparametrisation", "path", "path, two passes"])
def test_the_parts_of_a_step(module, estimator):
    """The parts are those of the step that is taken, which the marks leave as it is; only REINFORCE needs no force."""
    models, clock = module("training_models"), module("timing").Clock()
    trainer = models.trainer_of(models.paper_config(4, estimator, TINY), estimator)
    results = []
    for timed in (False, True):
        trainer.sampler.zero_grad()
        split = models.Split(trainer, clock) if timed else None
        surrogate, _ = trainer.estimator(trainer.sampler, trainer.action, 2, stream(1, "benchmark"))
        surrogate.backward()
        results.append(torch.cat([p.grad.flatten() for p in trainer.sampler.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    parts = split.step()
    assert (parts["action_gradient"] > 0) == (estimator != "reinforce")
    assert min(parts["flow"], parts["action"], parts["backward"]) > 0


def test_ratios_against_what_was_asked_for(module):
    seconds = {"reinforce, package": 1.0, "reinforce, elements": 5.0, "reparametrisation, package": 2.0}
    rows = [{"L": size, "dtype": "float32", "device": "cpu", "seconds": seconds} for size in (8, 16)]
    lines = module("training_tables").verdicts({"plain": rows})
    assert [line.rsplit(": ", 1)[1] for line in lines] == ["met", "not met", "not met"]
    assert lines[0] == "* REINFORCE, plain of ours, package, 8x8, float32, cpu: 5.00, asked >= 4: met"
