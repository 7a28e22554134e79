"""Two processes that share every batch: the training of one up to rounding, by all estimators and kinds of sampler.

This file, run as a script by torchrun, is one of the processes; the first one saves how the trainings ended.
"""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import latticeflow
from latticeflow.actions import Action, ScalarAction, U1Action
from latticeflow.flows import coupling_flow, gauge_flow, glow, linear_flow
from latticeflow.priors import Normal, QuenchedSectors, StudentT
from latticeflow.samplers import EBFlowSampler, FlowSampler, PartwiseSampler, SectorSampler, mirrored
from latticeflow.streams import SharedStream, stream
from latticeflow.training import Team, Trainer, TrainingError, TrainingSettings, make_estimator, run_data_parallel
from latticeflow.training.exchange import Exchange

PATIENCE = 240.0  # seconds
ROUNDING = {"float64": 1e-10, "float32": 2e-5}
BASE = {"steps": 7, "batch": 8, "warmup": 2, "window": 3}
CASES = {
    "reinforce": {"estimator": "reinforce"},
    "reinforce_float32": {"estimator": "reinforce", "dtype": "float32"},
    "clipped": {"estimator": "reinforce", "signal_clip": 2.0, "accumulate": 2},
    "reparametrisation": {"estimator": "reparametrisation", "ema": 0.9},
    "path": {"estimator": "path", "accumulate": 2, "gradient_clip": 0.5},
    "path_float32": {"estimator": "path", "dtype": "float32"},
    "forward_kl": {"estimator": "forward_kl"},
    "explicit": {"estimator": "explicit", "sampler": "ebflow"},
    "sliced": {"estimator": "sliced", "sampler": "ebflow"},
    "denoising": {"estimator": "denoising", "sampler": "ebflow"},
    "finite_difference": {"estimator": "finite_difference", "sampler": "ebflow"},
    "tuned_by_another": {"estimator": "path", "fine_tuner": "reinforce", "fine_tuning": 0.4},
    "alternate": {"estimator": "path", "sampler": "parts", "schedule": "alternate"},
    "sequential": {"estimator": "reinforce", "sampler": "parts", "schedule": "sequential"},
    "parts_on_data": {"estimator": "forward_kl", "sampler": "parts", "schedule": "simultaneous"},
    "mirrored": {"estimator": "path", "sampler": "mirrored"},
    "sectors": {"estimator": "reinforce", "sampler": "sectors"},
    "first_batch": {"estimator": "reinforce", "sampler": "glow"},
    "resumed": {"estimator": "path", "resume_at": 4},
    "skipped": {"estimator": "reparametrisation", "above": 1.4, "steps": 12},
    "hopeless": {"estimator": "reparametrisation", "above": -1.0, "steps": 30},
}


class FailingAction(Action):
    """phi^4, but no number for a configuration that is larger than it may be at its first site."""

    def __init__(self, above):
        self.above = above

    def __call__(self, field):
        return torch.where(field[:, 0, 0] > self.above, torch.nan, ScalarAction(-4.0, 8.0)(field))

    def field_shape(self, shape):
        return shape


def make_sampler(kind):
    couplings = coupling_flow((4, 4), layers=4, hidden=(4,))
    return {
        "flow": lambda: FlowSampler(StudentT((4, 4)), couplings),
        "parts": lambda: PartwiseSampler(Normal((4, 4)), couplings, (2, 2)),
        "mirrored": lambda: mirrored(FlowSampler(Normal((4, 4)), couplings)),
        "ebflow": lambda: EBFlowSampler(Normal((4, 4)), linear_flow((4, 4), layers=1)),
        "glow": lambda: FlowSampler(Normal((4, 4)), glow((4, 4), levels=1, steps=1, hidden=4, periodic=True)),
        "sectors": lambda: SectorSampler(
            QuenchedSectors(2.0, (4, 4)), gauge_flow((4, 4), layers=2, hidden=(4,), keep_charge=True)
        ),
    }[kind]()


def target(n, generator=None):
    return 0.3 + 0.5 * torch.randn(n, 4, 4, generator=generator, dtype=torch.float64)


def make_trainer(*, estimator, sampler="flow", dtype="float64", above=None, signal_clip=None, **settings):
    torch.manual_seed(1)
    own = make_sampler(sampler).to(getattr(torch, dtype))
    action = (
        U1Action(1.5) if sampler == "sectors" else ScalarAction(-4.0, 8.0) if above is None else FailingAction(above)
    )
    learns = estimator in ("forward_kl", "sliced", "denoising", "finite_difference")
    chosen = TrainingSettings(**{**BASE, **{k: v for k, v in settings.items() if k not in ("resume_at", "fine_tuner")}})
    tuner = make_estimator(settings["fine_tuner"]) if "fine_tuner" in settings else None
    made = make_estimator(estimator, signal_clip=signal_clip, target=target if learns else None)
    return Trainer(own, action, made, chosen, fine_tuner=tuner)


def begun(case):
    """Return the trainer of a case; one that is resumed is where an earlier life of one process left it."""
    trainer = make_trainer(**CASES[case])
    while trainer.step < CASES[case].get("resume_at", 0):
        trainer.records.append(trainer._take_step())
    return trainer


def ended(trainer, run):
    """Return the state that a training ended in, and its failure."""
    failure = ""
    try:
        run()
    except TrainingError as error:
        failure = str(error)
    return trainer.state_dict() | {"failure": failure}


def train_cases(out):
    for name, case in CASES.items():
        first, team = dist.get_rank() == 0, Team(torch.device("cpu"))
        trainer = begun(name) if first else make_trainer(**case)
        state = ended(trainer, lambda own=trainer, team=team: run_data_parallel(own, team))
        assert team.waiting or not first
        states = Exchange(torch.device("cpu")).collect(state)
        if first:
            assert all(torch.equal(states[0]["weights"][k], states[1]["weights"][k]) for k in state["weights"])
            torch.save(state | {"elsewhere": trainer.cpu_elsewhere + team.elsewhere}, f"{out}/{name}.pt")


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """Return the folder of what two processes made of the cases."""
    out = tmp_path_factory.mktemp("data_parallel")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    package = Path(latticeflow.__file__).parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(package)}
    words = [*launcher, __file__, str(out)]
    outcome = subprocess.run(words, timeout=PATIENCE, capture_output=True, text=True, env=environment, cwd=package)
    assert outcome.returncode == 0, outcome.stderr
    return out


@pytest.mark.parametrize("case", CASES)
def test_two_processes_end_as_one(by_two, case):
    """Weights, best weights, windows and records agree to the rounding of sums; what is counted agrees exactly."""
    trainer, two = begun(case), torch.load(by_two / f"{case}.pt", weights_only=True)
    one, limit = ended(trainer, trainer.run), ROUNDING[CASES[case].get("dtype", "float64")]
    assert (one["step"], one["failure"]) == (two["step"], two["failure"])
    for weights in ("weights", "best_weights"):
        assert one[weights].keys() == two[weights].keys()
        for name, value in one[weights].items():
            assert torch.allclose(value.double(), two[weights][name].double(), rtol=limit, atol=limit, equal_nan=True)
    for mine, other in zip(one["records"], two["records"], strict=True):
        assert (mine["step"], mine["skipped"], mine["part"]) == (other["step"], other["skipped"], other["part"])
        assert other["loss"] == pytest.approx(mine["loss"], rel=10 * limit, nan_ok=True)
        assert other["ess"] == pytest.approx(mine["ess"], rel=1e3 * limit)
    assert [tuple(each.shape) for each in one["recent"][0]] == [tuple(each.shape) for each in two["recent"][0]]
    assert two["elsewhere"] > 0


def test_steps_were_skipped_and_some_were_not(by_two):
    records = torch.load(by_two / "skipped.pt", weights_only=True)["records"]
    assert 0 < sum(record["skipped"] for record in records) < len(records)


@pytest.mark.parametrize("kind", ["flow", "mirrored"])
def test_rows_of_two_make_the_batch_of_one(kind):
    sampler = make_sampler(kind).double()
    x, log_q = sampler.sample(10, stream(3, "rows"))
    shares = [sampler.sample(5, SharedStream(stream(3, "rows"), slice(first, first + 5), 10)) for first in (0, 5)]
    assert torch.equal(torch.cat([own for own, _ in shares]), x)
    torch.testing.assert_close(torch.cat([own for _, own in shares]), log_q, rtol=1e-13, atol=1e-13)


def test_rows_that_a_process_does_not_have():
    with pytest.raises(ValueError, match="4 rows are asked for, this process has slice"):
        make_sampler("flow").sample(4, SharedStream(stream(3, "rows"), slice(0, 5), 10))


def test_processes_have_streams_of_their_own():
    """That of one process is without a number, as before there were several."""
    first = {
        process: int(torch.randint(2**62, (1,), generator=stream(1, "chain", process=process)))
        for process in (None, 0, 1)
    }
    assert len(set(first.values())) == 3
    assert stream(1, "chain").initial_seed() == stream(1, "chain", process=None).initial_seed() == 8202018563305655048


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    train_cases(sys.argv[1])
    dist.destroy_process_group()
