"""Parts on two or three processes: bit for bit the training of one, failures included, and nobody waits forever.

This file, run as a script by torchrun, is one of the processes; the first one saves how the trainings ended.
"""

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import latticeflow
from latticeflow.actions import Action, ScalarAction
from latticeflow.flows import coupling_flow
from latticeflow.priors import Normal
from latticeflow.samplers import FlowSampler, PartwiseSampler
from latticeflow.training import (
    LostProcessError,
    Trainer,
    TrainingError,
    TrainingSettings,
    make_estimator,
    run_pipeline,
)
from latticeflow.training.pipeline import shares, split

PATIENCE = 120.0  # seconds
BASE = {"steps": 11, "batch": 8, "warmup": 2, "window": 3, "schedule": "simultaneous", "fine_tuning": 0.2}
CASES = {
    "reparametrisation": {"estimator": "reparametrisation"},
    "path": {"estimator": "path", "accumulate": 2, "learning_rates": (1e-3, 3e-3)},
    "reinforce": {"estimator": "reinforce", "fine_tuning": 0.0},
    "three": {"estimator": "path", "sizes": (2, 2, 2), "dtype": "float32"},
    "resumed": {"estimator": "path", "resume_at": 4},
    "tuned_by_another": {"estimator": "path", "fine_tuner": "reinforce"},
    "only_end_to_end": {"estimator": "path", "fine_tuning": 1.0},
    "skipped": {"estimator": "reparametrisation", "above": 1.2, "steps": 22, "learning_rate": 3e-2},
    "hopeless": {"estimator": "reparametrisation", "above": -1.0, "steps": 60, "window": 50, "sync_every": 50},
}
"""Trainings; they come together at every multiple of the window and of `sync_every`."""


class FailingAction(Action):
    """phi^4, but no number for a configuration that is larger than it may be at its first site."""

    def __init__(self, above):
        self.above = above

    def __call__(self, field):
        return torch.where(field[:, 0, 0] > self.above, torch.nan, ScalarAction(-4.0, 8.0)(field))

    def field_shape(self, shape):
        return shape


def make_trainer(*, estimator="path", sizes=(2, 2), dtype="float64", above=None, target=None, **settings):
    torch.manual_seed(1)
    flow, others = coupling_flow((4, 4), layers=sum(sizes), hidden=(4,)), {"resume_at", "sync_every", "fine_tuner"}
    sampler = PartwiseSampler(Normal((4, 4)), flow, sizes).to(getattr(torch, dtype))
    action = ScalarAction(-4.0, 8.0) if above is None else FailingAction(above)
    chosen = TrainingSettings(**{**BASE, **{name: settings[name] for name in settings.keys() - others}})
    tuner = make_estimator(settings["fine_tuner"]) if "fine_tuner" in settings else None
    return Trainer(sampler, action, make_estimator(estimator, target=target), chosen, fine_tuner=tuner)


def begun(case):
    """Return the trainer of a case; one that is resumed is where an earlier life left it."""
    trainer, stop_at = make_trainer(**CASES[case]), CASES[case].get("resume_at", 0)
    while trainer.step < stop_at:
        trainer.records.append(trainer._take_step())
    return trainer


def ended(trainer, run):
    """Return the state that a training ended in, its failure, and at which steps `on_step` saw which records."""
    seen, failure = [], ""
    try:
        run(lambda trainer, record: seen.append((trainer.step, record.step)))
    except TrainingError as error:
        failure = str(error)
    now = {name: weight.clone() for name, weight in trainer.sampler.state_dict().items()}
    return trainer.state_dict() | {"sampler": now, "failure": failure, "seen": seen}


def train_cases(out):
    """Three processes train the parts of one case, of which there are three; two train all cases."""
    for name, case in CASES.items() if dist.get_world_size() == 2 else [("three", CASES["three"])]:
        first = dist.get_rank() == 0
        trainer = begun(name) if first else make_trainer(**case)
        every = case.get("sync_every", 4)
        state = ended(trainer, lambda on_step, own=trainer, every=every: run_pipeline(own, on_step, sync_every=every))
        assert first or trainer.step <= trainer.schedule.local_steps
        if first:
            torch.save(state, f"{out}/{name}.pt")


def lose_the_silent(out):
    """Let the second process say nothing until the first one has given it up."""
    lost, end = Path(out, "lost"), time.monotonic() + PATIENCE / 2
    while dist.get_rank() == 1 and not lost.exists() and time.monotonic() < end:
        time.sleep(0.05)
    lose(out)


def lose_the_dead(out):
    """Let the second process end without a word in its third step, while the first waits for nothing less."""
    trainer, action = make_trainer(), FailingAction(1e9)
    if dist.get_rank() == 1:
        calls = iter(range(2))
        trainer.action = lambda field: action(field) if next(calls, None) is not None else os._exit(3)
    lose(out, trainer)


def lose(out, trainer=None):
    try:
        run_pipeline(trainer or make_trainer())
    except LostProcessError as error:
        if dist.get_rank() == 0:
            Path(out, "lost").write_text(str(error))


def torchrun(*words, processes=2):
    """Run processes to their end, at most for PATIENCE."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    package = Path(latticeflow.__file__).parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(package)}
    words = [*command, *map(str, words)]
    return subprocess.run(words, timeout=PATIENCE, capture_output=True, text=True, env=environment, cwd=package)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """Return the folder of what two processes made of the cases."""
    out = tmp_path_factory.mktemp("pipeline")
    outcome = torchrun(__file__, "train_cases", out, 60)
    assert outcome.returncode == 0, outcome.stderr
    return out


@pytest.fixture(scope="module")
def by_one():
    """Return a function from a case to how one process ends it."""
    threads, found = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    yield lambda case: found.get(case) or found.setdefault(case, ended(trainer := begun(case), trainer.run))
    torch.set_num_threads(threads)


def differences(one, other, path="state"):
    """Yield the paths at which two states are not bitwise the same; the seconds may differ."""
    if isinstance(one, torch.Tensor):
        if one.dtype != other.dtype or not torch.equal(one, other):
            yield path
    elif isinstance(one, dict):
        yield from ([path] if one.keys() != other.keys() else [])
        for name in (one.keys() & other.keys()) - {"seconds", "seen"}:
            yield from differences(one[name], other[name], f"{path}.{name}")
    elif isinstance(one, list):
        yield from ([path] if len(one) != len(other) else [])
        for place, (left, right) in enumerate(zip(one, other, strict=False)):
            yield from differences(left, right, f"{path}[{place}]")
    elif repr(one) != repr(other):
        yield path


@pytest.mark.parametrize("case", CASES)
def test_two_processes_end_as_one(by_two, by_one, case):
    """Weights, optimizers, windows, best weights and records, bit for bit."""
    state = torch.load(by_two / f"{case}.pt", weights_only=True)
    assert list(differences(by_one(case), state)) == []
    assert [record for _, record in state["seen"]] == [
        record["step"] for record in state["records"][CASES[case].get("resume_at", 0) :][: len(state["seen"])]
    ]


@pytest.mark.long
def test_three_processes_end_as_one(by_one, tmp_path):
    """The one in the middle takes from one and passes on to the other."""
    outcome = torchrun(__file__, "train_cases", tmp_path, 60, processes=3)
    assert outcome.returncode == 0, outcome.stderr
    assert list(differences(by_one("three"), torch.load(tmp_path / "three.pt", weights_only=True))) == []


def test_records_come_where_the_states_come_together(by_two):
    seen = torch.load(by_two / "path.pt", weights_only=True)["seen"]
    assert [step for step, _ in seen] == [3, 3, 3, 4, 6, 6, 8, 8, 9, 10, 11]
    seconds = [record["seconds"] for record in torch.load(by_two / "path.pt", weights_only=True)["records"]]
    assert seconds[0] > 0
    assert seconds[:9] == sorted(seconds[:9])


def test_the_cases_are_what_they_are_named_for(by_one):
    """Each part skips steps of its own, and a training that cannot go on ends before the states come together."""
    skipped = [record["skipped"] for record in by_one("skipped")["records"]]
    assert 0 < sum(skipped[:18]) < 18
    optimizers = by_one("skipped")["optimizers"]
    assert len({int(optimizer["state"][0]["step"]) for optimizer in optimizers}) == 2
    assert by_one("hopeless")["step"] % 50
    assert "20 steps in a row" in by_one("hopeless")["failure"]
    assert by_one("path")["best_ess"] > 0


@pytest.mark.long
def test_a_silent_process_is_given_up(tmp_path):
    """After the seconds that the group was told to wait, for ever otherwise."""
    torchrun(__file__, "lose_the_silent", tmp_path, 5)
    assert (tmp_path / "lost").read_text().startswith("another process of this training ended or does not answer")


def test_a_dead_process_ends_all(tmp_path):
    """At once, long before the time is over that the group was told to wait."""
    outcome = torchrun(__file__, "lose_the_dead", tmp_path, 1000)
    assert outcome.returncode != 0
    assert "exitcode  : 3" in outcome.stderr
    assert (tmp_path / "lost").read_text().startswith("another process of this training ended or does not answer")


def test_parts_are_shared_in_order():
    assert split(5, 2) == [range(2), range(2, 5)]
    assert split(3, 3) == [range(1), range(1, 2), range(2, 3)]
    with pytest.raises(ValueError, match="2 parts cannot be shared by 3 processes; start 2 at most"):
        split(2, 3)


def test_what_cannot_be_shared_is_refused():
    for schedule in ("alternate", "sequential", "end_to_end"):
        with pytest.raises(ValueError, match=f"need parts and schedule 'simultaneous', got schedule '{schedule}'"):
            shares(make_trainer(schedule=schedule), 2)
    whole = FlowSampler(Normal((4, 4)), coupling_flow((4, 4), layers=2, hidden=(4,)))
    with pytest.raises(ValueError, match="several processes need parts"):
        shares(Trainer(whole, ScalarAction(-4.0, 8.0), make_estimator("path"), TrainingSettings()), 2)
    samples = {"estimator": "forward_kl", "target": lambda n, generator: torch.zeros(n, 4, 4)}
    with pytest.raises(ValueError, match="forward_kl"):
        shares(make_trainer(**samples), 2)
    with pytest.raises(ValueError, match="ema needs all weights in every step"):
        shares(make_trainer(ema=0.9), 2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    task, out, seconds = sys.argv[1:]
    dist.init_process_group("gloo", timeout=timedelta(seconds=int(seconds)))
    {"train_cases": train_cases, "lose_the_silent": lose_the_silent, "lose_the_dead": lose_the_dead}[task](out)
    dist.destroy_process_group()
