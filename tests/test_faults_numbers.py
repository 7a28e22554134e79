"""NaN and infinite actions, log q and losses through the command line: rejected, counted, and no run is lost by them.

Whether an action is bad depends on the field alone, through digits of its first number that look random: then no bad
configuration can be in a chain, and a run without the fault is the same run.
"""

import importlib
import json
import math
import re
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from latticeflow.actions import SchwingerAction, U1Action
from latticeflow.cli import chains as chains_stage
from latticeflow.cli import main
from latticeflow.cli import sampling as sampling_stage
from latticeflow.samplers import FlowSampler, tune_quenched
from latticeflow.storage import Ensemble, load_checkpoint

FAILED = 1
LIMIT = r"latticeflow: (\d+) of (\d+) proposals had a non-finite action or log q \(limit 1%\)"
FIGURES = "latticeflow.cli.commands.draw_figures"

CONFIG = """
[run]
seed = 5
threads = 1
[lattice]
shape = [4, 4]
[action]
kind = "u1"
beta = 1.0
[sampler.prior]
kind = "haar"
[sampler.flow]
kind = "gauge"
layers = 1
bins = 2
hidden = [4]
[training]
steps = 6
batch = 4
window = 2
checkpoint_every = 1
[chain]
replica = 16
draws = 64
block = 32
candidates = 64
thermalisation = 8
[chain.hmc]
step_size = 0.5
[chain.flow_hmc]
trajectory_length = 0.5
step_size = 0.5
[baseline]
samples = 64
beta = 1.0
[analysis]
observables = ["plaquette", "topological_charge"]
"""

SCHWINGER = ("action.kind=schwinger", "action.kappa=0.2", "action.holonomies=[2, 2]", "training.steps=0")
FOUR_BLOCKS = ("chain.draws=32", "chain.block=8")

KERNELS = {
    "independence": (["independence"], math.nan),
    "hmc": (["hmc"], math.nan),
    "flow_hmc": (["flow_hmc"], math.inf),
    "winding": (["hmc", "winding"], -math.inf),
    "composite": (["hmc", "winding", "independence"], math.nan),
}


# ---------------------------------------------------------------- runs with a fault


@dataclass
class Fault:
    """Which actions are bad while it is `armed`: a fraction `rate` of all fields, or the first row of one call."""

    rate: float = 0.0
    value: float = math.nan
    armed: bool = False
    once: bool = False
    counted: list[int] = field(default_factory=list)

    def rows(self, fields: torch.Tensor) -> torch.Tensor:
        digits = torch.remainder(fields.detach().double().flatten(1)[:, 0] * 1e4, 1.0)
        bad = (digits < self.rate) & self.armed
        if self.once and self.armed:
            bad[0], self.armed = True, False
        return bad

    def spoil(self, fields: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        bad = self.rows(fields).reshape(-1, *[1] * (values.dim() - 1))
        return torch.where(bad, torch.full_like(values, self.value), values)

    def spoiling(self, function: Callable) -> Callable:
        """Return a method of one field, spoilt."""
        return lambda owner, fields: self.spoil(fields, function(owner, fields))


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    def refused(self) -> str:
        """Return the one plain line at the end of standard error; progress may come before it."""
        assert self.code == FAILED, self.err
        *progress, message = self.err.splitlines()
        assert message.startswith("latticeflow: ")
        assert not any(line.startswith("latticeflow: ") or "Traceback" in line for line in progress)
        return message


def call(*words: object) -> Outcome:
    """Return the outcome of a command; an exception that it lets through fails the test."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = main([str(word) for word in words])
    return Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture
def figures() -> None:
    """Asks for the figures of a run, which take most of its time."""


@pytest.fixture(autouse=True)
def without_figures(request, monkeypatch) -> None:
    if "figures" not in request.fixturenames:
        monkeypatch.setattr(FIGURES, lambda folder: [])


@pytest.fixture
def fault(monkeypatch) -> Fault:
    """A fault of the pure gauge action, not armed yet."""
    made = Fault()
    monkeypatch.setattr(U1Action, "__call__", made.spoiling(U1Action.__call__))
    return made


def in_block(monkeypatch, fault: Fault, blocks: Callable[[int], bool]) -> None:
    """Arm the fault in the chosen blocks of the sampling, counted from 0, and count the bad proposals of each step."""
    run_block, calls = chains_stage.run_block, []

    def run(kernel, state, size, generator):
        step = kernel.step

        def counted(*arguments):
            after, info = step(*arguments)
            fault.counted.append(info.bad)
            return after, info

        kernel.step = counted
        fault.armed = blocks(len(calls))
        calls.append(size)
        try:
            return run_block(kernel, state, size, generator)
        finally:
            fault.armed, kernel.step = False, step

    monkeypatch.setattr(chains_stage, "run_block", run)


def write(folder: Path, *changes: str, kernels: list[str]) -> tuple[Path, list[str]]:
    """Return a configuration file in a folder and the words that change it."""
    path = folder / "run.toml"
    path.write_text(CONFIG)
    return path, [word for change in (f"chain.kernels={kernels}", *changes) for word in ("--set", change)]


def arrays(folder: Path, *groups: str) -> dict[str, np.ndarray]:
    """Return the data sets of some groups of the ensemble, without the scales of their axes."""
    with h5py.File(folder / "ensemble.h5") as file:
        found = {f"{group}/{name}": values for group in groups for name, values in file[group].items()}
        return {name: values[:] for name, values in found.items() if "_dim_" not in name}


def column(folder: Path, name: str, kernel: str) -> np.ndarray:
    history = arrays(folder, "history")
    return history.get(f"history/{name}_{kernel}", history.get(f"history/{name}"))


def has_nan(folder: Path, *groups: str) -> bool:
    return any(np.isnan(values).any() for values in arrays(folder, *groups).values())


# ---------------------------------------------------------------- a bad proposal now and then


@dataclass(frozen=True)
class Disturbed:
    """A run with a few bad proposals."""

    folder: Path
    kernels: list[str]
    fault: Fault
    outcome: Outcome
    bad: int


@pytest.fixture(scope="module", params=KERNELS)
def disturbed(request, tmp_path_factory) -> Disturbed:
    kernels, value = KERNELS[request.param]
    fault = Fault(rate=0.004 / len(kernels), value=value)
    path, changes = write(tmp_path_factory.mktemp(request.param), kernels=kernels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(U1Action, "__call__", fault.spoiling(U1Action.__call__))
        if request.param != "composite":
            patch.setattr(FIGURES, lambda folder: [])
        in_block(patch, fault, lambda block: True)
        outcome = call("run", path, *changes)
    return Disturbed(path.with_suffix(""), kernels, fault, outcome, sum(fault.counted))


def test_a_run_with_few_bad_proposals_finishes(disturbed):
    assert disturbed.outcome.code == 0, disturbed.outcome.err
    assert 0 < disturbed.bad < 0.01 * 16 * 64
    assert json.loads((disturbed.folder / "status.json").read_text())["stage"] == "done"
    drawn = {path.name for path in disturbed.folder.glob("figures/*.png")}
    assert drawn >= {"weights.png", "autocorrelation.png"} or len(disturbed.kernels) < 3


def test_no_bad_configuration_is_ever_accepted(disturbed):
    """Each is known by its field; one that had been accepted would be stored."""
    with Ensemble.open(disturbed.folder / "ensemble.h5") as ensemble:
        links = torch.from_numpy(ensemble.field("links")).flatten(0, 1)
        assert ensemble.verify() == []
        assert np.isfinite(ensemble.history("action")).all()
    disturbed.fault.armed = True
    bad = disturbed.fault.rows(links)
    disturbed.fault.armed = False
    assert not bad.any()
    torch.testing.assert_close(U1Action(1.0)(links).numpy(), column(disturbed.folder, "action", "").ravel())


def test_no_nan_is_stored(disturbed):
    assert not has_nan(disturbed.folder, "fields", "history", "proposals", "observables")
    for name, values in arrays(disturbed.folder, "fields", "history", "proposals", "observables").items():
        if not name.startswith(("history/delta_h", "proposals/log_weight")):
            assert np.isfinite(values).all(), name


def test_bad_proposals_are_rejected_and_marked(disturbed):
    """A weight of zero, or an infinite violation of the energy; winding steps store neither."""
    marked = []
    if "independence" in disturbed.kernels:
        marked.append(("independence", np.isneginf(arrays(disturbed.folder, "proposals")["proposals/log_weight"])))
    for kernel in {"hmc", "flow_hmc"} & set(disturbed.kernels):
        marked.append((kernel, np.isposinf(column(disturbed.folder, "delta_h", kernel))))
    for kernel, bad in marked:
        assert not column(disturbed.folder, "accepted", kernel)[bad].any()
    total = sum(int(bad.sum()) for _, bad in marked)
    assert total <= disturbed.bad if "winding" in disturbed.kernels else total == disturbed.bad


def test_the_report_of_a_disturbed_run_has_numbers(disturbed):
    outcome = call("analyse", disturbed.folder, "--json")
    assert outcome.code == 0
    report = json.loads(outcome.out)
    assert all(0 < kernel["acceptance"] <= 1 for kernel in report["kernels"].values())
    assert None not in [report["kernels"][name]["exp_minus_delta_h"] for name in disturbed.kernels if "hmc" in name]
    assert report["observables"]["plaquette"]["mean"] is not None
    if "independence" in disturbed.kernels:
        assert None not in (report["proposals"]["log_z"], report["proposals"]["ess"])
    if len(disturbed.kernels) == 3:
        assert None not in (report["forward"]["log_z"], report["forward"]["ess"])


def test_bad_proposals_are_counted_where_a_user_sees_them(disturbed):
    shown = disturbed.outcome.out + call("analyse", disturbed.folder, "--json").out
    assert re.search(rf"\b{disturbed.bad}\b[^\n]*(non-finite|not finite)", shown)


# ---------------------------------------------------------------- too many bad proposals


@pytest.fixture(scope="module", params=KERNELS)
def undisturbed(request, tmp_path_factory) -> tuple[list[str], Path]:
    kernels, _ = KERNELS[request.param]
    path, changes = write(tmp_path_factory.mktemp(f"whole-{request.param}"), *FOUR_BLOCKS, kernels=kernels)
    assert call("train", path, *changes).code == 0
    assert call("sample", path.with_suffix("")).code == 0
    return kernels, path.with_suffix("")


def test_a_run_with_many_bad_proposals_stops_and_can_go_on(undisturbed, tmp_path, fault, monkeypatch):
    """After two of four blocks; once more while the fault lasts; to the end, bit for bit, when it is gone."""
    kernels, whole = undisturbed
    path, changes = write(tmp_path, *FOUR_BLOCKS, kernels=kernels)
    folder, fault.rate = path.with_suffix(""), 0.2
    with monkeypatch.context() as patch:
        in_block(patch, fault, lambda block: block >= 2)
        message = call("run", path, *changes).refused()
    bad, total = map(int, re.fullmatch(LIMIT, message).groups())
    assert bad == sum(fault.counted[-8:]) > 0.01 * total
    assert_intact(folder, whole, 16)
    with monkeypatch.context() as patch:
        in_block(patch, fault, lambda block: block >= 1)  # the first one is computed again and compared
        assert call("sample", folder).refused() == message
    assert_intact(folder, whole, 16)
    assert call("run", path, "--resume", *changes).code == 0
    assert_intact(folder, whole, 32)


def assert_intact(folder: Path, whole: Path, draws: int) -> None:
    """Assert that the first draws are committed and those of the undisturbed run, bit for bit."""
    with Ensemble.open(folder / "ensemble.h5") as ensemble:
        assert ensemble.n_committed == draws
        assert ensemble.verify() == []
    groups = ("fields", "history", "checksum")
    expected = arrays(whole, *groups)
    for name, values in arrays(folder, *groups).items():
        np.testing.assert_array_equal(values[:, :draws], expected[name][:, :draws], err_msg=name)


def test_the_limit_of_a_composite_is_of_all_its_proposals(tmp_path, fault, monkeypatch):
    """Half a percent of what three kernels propose is bad, and the run stops as if it were one and a half."""
    path, changes = write(tmp_path, kernels=["hmc", "winding", "independence"])
    fault.rate = 0.005
    in_block(monkeypatch, fault, lambda block: True)
    outcome = call("run", path, *changes)
    assert sum(fault.counted) < 0.01 * 3 * 16 * len(fault.counted)
    assert outcome.code == 0, outcome.err


def test_one_bad_proposal_in_a_short_block_does_not_stop_a_run(tmp_path, fault, monkeypatch):
    """One of 1040; a resumed run proposes the same again, so that this one could never be finished."""
    path, changes = write(tmp_path, "chain.draws=65", "chain.block=64", kernels=["independence"])
    fault.once = True
    in_block(monkeypatch, fault, lambda block: block == 1)
    outcome = call("run", path, *changes)
    assert sum(fault.counted) == 1
    assert outcome.code == 0, outcome.err


# ---------------------------------------------------------------- what is bad beside the proposals


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_bad_weights_of_the_baseline_do_not_spoil_the_run(tmp_path, fault, monkeypatch, value):
    """The chain is whole by then: the report must come, with a baseline or without."""
    path, changes = write(tmp_path, "chain.draws=32", kernels=["hmc"])
    fault.rate, fault.value = 0.05, value
    write_baseline = sampling_stage._write_baseline

    def with_fault(*arguments):
        fault.armed = True
        write_baseline(*arguments)

    monkeypatch.setattr(sampling_stage, "_write_baseline", with_fault)
    outcome = call("run", path, *changes)
    assert outcome.code == 0, outcome.err
    assert not has_nan(path.with_suffix(""), "proposals")


def test_bad_weights_do_not_spoil_the_tuning_of_the_baseline(fault):
    """A baseline without beta is tuned on reweighted draws; a bad one among them should count nothing."""
    laws = []
    for fault.rate in (0.0, 0.02):
        fault.armed, draws = True, torch.Generator().manual_seed(1)
        laws.append(tune_quenched(U1Action(1.2), (4, 4), beta=1.0, generator=draws, pilot=512))
    assert laws[1].beta == pytest.approx(laws[0].beta, abs=0.1)


def test_a_bad_element_of_an_orbit_is_survived(tmp_path, monkeypatch):
    """HMC decides by the action where it is; the other elements of its holonomy orbit may be bad then."""
    path, changes = write(tmp_path, *SCHWINGER, "chain.draws=32", kernels=["hmc"])
    fault, at_holonomies = Fault(rate=0.005), SchwingerAction.at_holonomies

    def spoilt(action, links, grid):
        orbit = at_holonomies(action, links, grid).clone()
        orbit[:, 1, 1] = fault.spoil(links, orbit[:, 1, 1])
        return orbit

    monkeypatch.setattr(SchwingerAction, "at_holonomies", spoilt)
    in_block(monkeypatch, fault, lambda block: True)
    outcome = call("run", path, *changes)
    assert outcome.code == 0, outcome.err
    assert not has_nan(path.with_suffix(""), "fields", "history")


@pytest.mark.parametrize(
    ("theory", "kernel", "value"),
    [("u1", "hmc", math.inf), ("u1", "flow_hmc", math.nan), ("schwinger", "hmc", math.nan)]
    + [("schwinger", "flow_hmc", math.inf)],
)
def test_bad_forces_end_in_rejections(tmp_path, monkeypatch, theory, kernel, value):
    """The trajectory carries NaN to the flow, to the determinant and to the energy."""
    changes = SCHWINGER if theory == "schwinger" else ("training.steps=0",)
    path, changes = write(tmp_path, *changes, "chain.draws=16", "chain.thermalisation=2", kernels=[kernel])
    fault, module = Fault(once=True, value=value), importlib.import_module("latticeflow.mcmc.hmc")
    integrate = module.integrate

    def spoilt(force, *arguments, **settings):
        return integrate(lambda position: fault.spoil(position, force(position)), *arguments, **settings)

    monkeypatch.setattr(module, "integrate", spoilt)
    in_block(monkeypatch, fault, lambda block: True)
    outcome = call("run", path, *changes)
    assert outcome.code == 0, outcome.err
    folder = path.with_suffix("")
    bad = np.isposinf(column(folder, "delta_h", kernel))
    assert bad.sum() == sum(fault.counted) == 1
    assert not column(folder, "accepted", kernel)[bad].any()
    assert not has_nan(folder, "fields", "history")


def test_a_bad_log_q_of_the_current_field_is_not_stored(tmp_path, monkeypatch):
    """Where HMC has moved the field, independence weighs it anew, and its flow may fail to invert there."""
    path, changes = write(tmp_path, kernels=["hmc", "independence"])
    fault = Fault(rate=0.004)
    monkeypatch.setattr(FlowSampler, "log_prob", fault.spoiling(FlowSampler.log_prob))
    in_block(monkeypatch, fault, lambda block: True)
    outcome = call("run", path, *changes)
    assert outcome.code == 0, outcome.err
    assert not has_nan(path.with_suffix(""), "fields", "history")


# ---------------------------------------------------------------- the start


@pytest.mark.parametrize("kernel", ["independence", "hmc", "flow_hmc", "composite"])
@pytest.mark.parametrize("start", ["draws", "cold"])
def test_a_start_without_a_finite_weight_is_refused(tmp_path, fault, kernel, start):
    """After two steps of thermalisation; for what comes of the default see below."""
    short = ("chain.thermalisation=2", "chain.draws=4", f"chain.start={start}", "training.steps=0")
    path, changes = write(tmp_path, *short, kernels=KERNELS[kernel][0])
    assert call("train", path, *changes).code == 0
    fault.rate, fault.armed = 2.0, True
    folder = path.with_suffix("")
    assert re.search("finite", call("sample", folder).refused())
    assert not (folder / "ensemble.h5").exists() or no_draws(folder)


def no_draws(folder: Path) -> bool:
    with Ensemble.open(folder / "ensemble.h5") as ensemble:
        return ensemble.n_committed == 0


@pytest.mark.parametrize("kernel", ["independence", "composite", "hmc", "flow_hmc"])
def test_check_of_a_theory_without_finite_weights_has_no_traceback(tmp_path, fault, kernel):
    path, changes = write(tmp_path, kernels=KERNELS[kernel][0])
    fault.rate, fault.armed = 2.0, True
    assert call("check", path, *changes).code in (0, FAILED)


class TooLong(Exception):
    """More steps than the trajectories of a whole run have."""


@pytest.mark.parametrize("bad", [2.0, 0.5], ids=["all", "half"])
def test_a_thermalisation_of_bad_proposals_ends(tmp_path, fault, monkeypatch, bad):
    """Every rejection halves HMC's step: a hundred bad steps would leave one that takes years to cross a trajectory."""
    path, changes = write(tmp_path, "chain.thermalisation=100", "chain.draws=4", kernels=["hmc"])
    forces, force = [], U1Action.force

    def counted(action, links):
        forces.append(1)
        if len(forces) > 5_000:
            raise TooLong
        return force(action, links)

    monkeypatch.setattr(U1Action, "force", counted)
    fault.rate, fault.armed = bad, True
    call("run", path, *changes).refused()


# ---------------------------------------------------------------- training


def saved_weights(monkeypatch) -> dict[int, dict[str, torch.Tensor]]:
    """Return what will hold the weights at every checkpoint of the training, by step."""
    module, kept = importlib.import_module("latticeflow.cli.folder"), {}
    save = module.save_checkpoint

    def keep(folder, state, step):
        kept[step] = {name: tensor.clone() for name, tensor in state["weights"].items()}
        save(folder, state, step)

    monkeypatch.setattr(module, "save_checkpoint", keep)
    return kept


def in_step(monkeypatch, fault: Fault, steps: Callable[[int], bool]) -> None:
    """Arm the fault in the chosen steps of the training, counted from 1."""
    module = importlib.import_module("latticeflow.training.trainer")
    take_step = module.Trainer._take_step

    def taken(trainer):
        fault.armed = steps(trainer.step + 1)
        try:
            return take_step(trainer)
        finally:
            fault.armed = False

    monkeypatch.setattr(module.Trainer, "_take_step", taken)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def finite(weights: dict[str, torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())


def skipped(folder: Path) -> list[bool]:
    return [json.loads(line)["skipped"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("estimator", ["reinforce", "reparametrisation", "path"])
def test_a_bad_step_of_the_training_is_skipped_and_recorded(tmp_path, fault, monkeypatch, estimator, value):
    path, changes = write(tmp_path, f"training.estimator={estimator}", kernels=["independence"])
    fault.once, fault.value = True, value
    in_step(monkeypatch, fault, lambda step: step == 3)
    weights = saved_weights(monkeypatch)
    assert call("train", path, *changes).code == 0
    assert skipped(path.with_suffix("")) == [False, False, True, False, False, False]
    assert same(weights[3], weights[2])
    assert not same(weights[4], weights[3])
    assert all(map(finite, weights.values()))


@pytest.mark.usefixtures("figures")
def test_a_run_with_a_bad_step_of_the_training_goes_to_its_end(tmp_path, fault, monkeypatch):
    """The loss of that step is stored as it was, and the figure is drawn."""
    path, changes = write(tmp_path, kernels=["independence"])
    fault.once = True
    in_step(monkeypatch, fault, lambda step: step == 3)
    assert call("run", path, *changes).code == 0
    loss = arrays(path.with_suffix(""), "training")["training/loss"]
    assert np.isnan(loss).nonzero()[0].tolist() == [2]
    assert (path.with_suffix("") / "figures" / "training.png").exists()


def test_persistent_bad_steps_stop_the_training_and_keep_the_last_good_weights(tmp_path, fault, monkeypatch):
    path, changes = write(tmp_path, "training.steps=40", "training.learning_rate=0.25", kernels=["independence"])
    folder, fault.rate = path.with_suffix(""), 2.0
    weights = saved_weights(monkeypatch)
    with monkeypatch.context() as patch:
        in_step(patch, fault, lambda step: step > 3)
        message = call("run", path, *changes).refused()
    assert re.fullmatch(r"latticeflow: step 23: 20 steps in a row .*non-finite.*learning_rate \(0\.25\).*", message)
    assert not (folder / "ensemble.h5").exists()
    assert skipped(folder) == [False] * 3 + [True] * 20
    newest = load_checkpoint(folder / "checkpoint" / "training").state
    assert same(newest["weights"], weights[3])
    assert finite(newest["weights"])
    assert call("sample", folder).code == 2
    assert call("train", path, "--resume", *changes).code == 0
    assert len(skipped(folder)) == 40


@pytest.mark.parametrize("rate", ["1", "10"])
def test_a_training_that_diverges_is_no_traceback(tmp_path, rate):
    """No fault is put in: the weights themselves leave all bounds, and what is kept must be the finite ones."""
    changes = ("training.steps=30", "training.warmup=0", f"training.learning_rate={rate}")
    path, changes = write(tmp_path, *changes, kernels=["independence"])
    outcome = call("train", path, *changes)
    assert outcome.code in (0, FAILED)
    if outcome.code == FAILED:
        assert "learning_rate" in outcome.refused()
    newest = load_checkpoint(path.with_suffix("") / "checkpoint" / "training").state
    assert finite(newest["weights"])
    assert finite(newest["best_weights"])
