"""The benchmark of piecewise flows: its divergences against closed forms, its rows from the command line."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch

from latticeflow.actions.densities import CircleOfGaussians
from latticeflow.flows import ElementwiseAffine
from latticeflow.priors import Normal, Resampled
from latticeflow.samplers import FlowSampler, PiecewiseSampler

FOLDER = Path(__file__).parents[1] / "runs" / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("piecewise")


def normal(mean, width):
    affine = ElementwiseAffine((2,))
    with torch.no_grad():
        affine.shift.copy_(torch.tensor(mean))
        affine.log_scale.fill_(math.log(width))
    return FlowSampler(Normal((2,)), affine)


def exact_kl(difference, a, b):
    """Return KL of the normals of width a and b in the plane whose means differ by this vector."""
    ratio, distance = a**2 / b**2, sum(d**2 for d in difference)
    return ratio - 1 - math.log(ratio) + distance / (2 * b**2)


def test_divergences_of_normals(benchmark):
    mean, a, b = (0.3, -0.4), 0.5, 0.7
    p, q = normal((0.0, 0.0), a), normal(mean, b)
    log_p, log_q = (benchmark.on_grid(sampler.log_prob, 200) for sampler in (p, q))
    found = benchmark.divergences(log_p, log_q, (2 * benchmark.SIDE / 200) ** 2)
    assert found["kl_pq"] == pytest.approx(exact_kl(mean, a, b), abs=1e-3)
    assert found["kl_qp"] == pytest.approx(exact_kl(mean, b, a), abs=1e-3)
    assert found["mass"] == pytest.approx(1, abs=1e-3)


def test_a_density_that_vanishes_somewhere_has_one_infinite_divergence(benchmark):
    log_p, log_q = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log()
    found = benchmark.divergences(log_p, log_q, 1.0)
    assert found == {"kl_qp": pytest.approx(math.log(2)), "kl_pq": math.inf, "mass": pytest.approx(1)}


def test_a_mixture_judged(benchmark):
    """The circle's own mixture has no divergence, one with other weights that of the weights."""
    target = CircleOfGaussians()
    pieces = [normal(mean, target.width) for mean in target.means.tolist()]
    found = benchmark.judged(PiecewiseSampler(pieces, [1.0] * 8), target, points=200, seed=1)
    assert [found[name] for name in ("kl_qp", "kl_pq", "mass", "ess")] == pytest.approx([0, 0, 1, 1], abs=1e-3)
    weights = [0.9 / 4] * 4 + [0.1 / 4] * 4
    uneven = benchmark.judged(PiecewiseSampler(pieces, weights), target, points=200, seed=1)
    forward, reverse = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5), 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    assert [uneven[name] for name in ("kl_qp", "kl_pq")] == pytest.approx([reverse, forward], abs=5e-3)
    assert uneven["coarse"]["kl_qp"] == pytest.approx(uneven["kl_qp"], abs=1e-3)


def test_a_resampled_base_is_normalised_by_the_grid(benchmark):
    torch.manual_seed(1)
    base = Resampled(Normal((2,)), hidden=(8,))
    with torch.no_grad():
        base.network[-1].weight.mul_(300)
    affine = ElementwiseAffine((2,))
    found = benchmark.judged(FlowSampler(base, affine), CircleOfGaussians(), points=200, seed=1)
    assert found["mass"] == pytest.approx(1, abs=1e-4)
    by_grid = -torch.expm1(base.log_rejection)
    relative_error = base.normalise(2**17)
    by_draws = -torch.expm1(base.log_rejection)
    assert abs(by_grid / by_draws - 1) < 5 * relative_error


@pytest.fixture
def run(benchmark, tmp_path, capsys):
    """Run the script with little to do and return the rows that it prints."""
    threads = torch.get_num_threads()

    def rows(*arguments):
        small = ["--trainings", "1", "--samples", "1500", "--grid", "40", "--steps", "6", "--out", str(tmp_path)]
        benchmark.main([*small, *arguments])
        return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]

    yield rows
    torch.set_num_threads(threads)


def test_rows_merge_and_are_not_made_twice(run, tmp_path):
    words = ("--part", "table", "--only", "moons", "--methods", "MAF")
    rows = run(*words)
    assert [row["method"] for row in rows] == ["piecewise MAF", "single MAF"]
    assert [row["k"] for row in rows] == [2, 1]
    assert all(0 < row["taken"] <= 6 and row["kl_pq"] > 0 and 0 < row["ess"] <= 1 for row in rows)
    assert run(*words) == []
    assert [row["training"] for row in run(*words, "--first", "2")] == [2, 2]
    stored = json.loads((tmp_path / "piecewise.json").read_text())
    kept = [(row["method"], row["training"]) for row in stored["table"]]
    assert kept == [(method, training) for method in ("piecewise MAF", "single MAF") for training in (1, 2)]
    text = (tmp_path / "piecewise.md").read_text()
    assert "| two_moons | piecewise MAF | 2 |" in text
    assert "| two_moons | piecewise MAF, published | 2 | 0.0096 | 0.012 |" in text


def test_clusterers_that_fail_have_a_row(run, tmp_path):
    rows = run("--part", "clusterers", "--only", "moons", "--methods", "DBSCAN")
    assert len(rows) == 1
    assert rows[0]["k"] >= 2
    failed = run("--part", "clusterers", "--only", "moons", "--methods", "DBSCAN", "--samples", "150")
    assert "DensityClusters" in failed[0]["failed"]
    assert failed[0]["failed"] in (tmp_path / "piecewise.md").read_text()
