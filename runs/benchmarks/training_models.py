"""The models of training_step.py: the paper's, from the package and in plain form, and the README's."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from plain_flow import PLAIN_ESTIMATORS, Assembly, PlainAction, plain_flow
from timing import Clock, Work
from torch import Tensor

from latticeflow.actions.base import Action, ModifiedAction
from latticeflow.config import load_config
from latticeflow.config.building import build_sampler, build_trainer
from latticeflow.config.schema import Config
from latticeflow.priors import HaarUniform
from latticeflow.samplers import FlowSampler
from latticeflow.streams import stream
from latticeflow.training import Trainer

FOLDER = Path(__file__).parents[1]
Result = TypeVar("Result")
HAAR = 'sampler.prior={kind="haar"}'
TWO_PASSES = "path, two passes"
"""The estimator as published, whose score comes from an inverse pass with a graph of its own."""
ESTIMATORS = ("reinforce", "reparametrisation", "path", TWO_PASSES)
QUENCHED = {8: ((0.79, 4.1), (0.21, 0.4)), 12: ((0.75, 3.6), (0.25, 0.4)), 16: ((0.7, 3.0), (0.3, 0.4))}
"""Smooth sector factors by lattice size, the larger lattices as 16."""


def paper_config(size: int, estimator: str = "path", overrides: Sequence[str] = ()) -> Config:
    """Return the paper's model on a square lattice: uniform prior, the action itself without holonomy orbits."""
    own = ["action.holonomies=[1,1]", "training.holonomies=[1,1]", "run.device=cpu", HAAR]
    return load_config(FOLDER / "schwinger-16x16.toml", [*own, *_choices(size, estimator), *overrides])


def readme_config(size: int, estimator: str = "path", overrides: Sequence[str] = ()) -> Config:
    """Return the README's 8 couplings on a square lattice, from the quenched prior, trained on holonomy orbits."""
    pairs = [list(pair) for pair in QUENCHED.get(size, QUENCHED[16])]
    own = [f"sampler.prior.smooth_sector={pairs}", *_choices(size, estimator)]
    return load_config(FOLDER / "schwinger-8x8.toml", [*own, *overrides])


def _choices(size: int, estimator: str) -> list[str]:
    name = "path" if estimator == TWO_PASSES else estimator
    return [f"lattice.shape=[{size},{size}]", f"training.estimator={name}"]


def trainer_of(config: Config, estimator: str = "path", determinant: str = "cyclic") -> Trainer:
    """Return the package's trainer, with the published path estimator or the dense determinant where asked for."""
    trainer = build_trainer(config, build_sampler(config))
    if estimator == TWO_PASSES:
        trainer.estimator = PLAIN_ESTIMATORS["path"]
    if determinant == "dense":
        trainer.action = PlainAction(config.action.beta, config.action.kappa, "vectorised")
    return trainer


def plain_step(config: Config, estimator: str, assembly: Assembly) -> Work:
    """Return the gradient of the plain implementation of a configuration: computed, and thrown away."""
    flow, shape = config.sampler.flow, config.lattice.shape
    torch.manual_seed(config.run.seed)
    settings = {name: getattr(flow, name) for name in ("layers", "bins", "hidden", "kernel", "dilations")}
    sampler = FlowSampler(HaarUniform(shape), plain_flow(shape, **settings))
    sampler.to(config.run.device, getattr(torch, config.training.dtype))
    action = PlainAction(config.action.beta, config.action.kappa, assembly)

    def step() -> None:
        generator = stream(config.run.seed, "trial", device=config.run.device)
        surrogate, _ = PLAIN_ESTIMATORS[estimator](sampler, action, config.training.batch, generator)
        surrogate.backward()
        sampler.zero_grad()

    return step


def trial_step(size: int, implementation: str, estimator: str, determinant: str, overrides: Sequence[str]) -> Work:
    """Return one training step of the paper's model; also what a process is started for that measures its memory.

    `implementation` is "package" or "compiled", with the determinant "cyclic" or "dense", or "plain", with that of an
    assembly.
    """
    if implementation == "compiled":
        overrides = [*overrides, "training.compile=true"]
    config = paper_config(size, estimator, overrides)
    if implementation == "plain":
        return plain_step(config, estimator, determinant)
    step = trainer_of(config, estimator, determinant).trial_step
    if implementation == "compiled":
        step()  # which compiles
    return step


class Split:
    """Where the time of a trainer's steps goes: flow, action, the action's gradient, and the rest of `backward`.

    The action's gradient counts by itself whether the estimator asks for it or `backward` does; `flow` is everything
    else that the estimator does.
    """

    PLACES = ("action", "action_gradient", "estimator", "asked_for")

    def __init__(self, trainer: Trainer, clock: Clock) -> None:
        self.trainer, self.clock, self.estimator = trainer, clock, trainer.estimator
        self.spent, self.began = dict.fromkeys(self.PLACES, 0.0), 0.0
        trainer.action = TimedAction(trainer.action, self)
        trainer.estimator = self._estimate

    def step(self) -> dict[str, float]:
        """Take a trial step and return the seconds of its parts."""
        self.spent = dict.fromkeys(self.PLACES, 0.0)
        total = self.clock.seconds(self.trainer.trial_step)
        action, gradient, estimator, asked_for = self.spent.values()
        return {
            "flow": estimator - action - asked_for,
            "action": action,
            "action_gradient": gradient,
            "backward": total - estimator - (gradient - asked_for),
        }

    def _estimate(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        result = self.during("estimator", lambda: self.estimator(*arguments))
        self.spent["asked_for"] = self.spent["action_gradient"]
        return result

    def during(self, name: str, work: Callable[[], Result]) -> Result:
        began = self.clock.now()
        result = work()
        self.spent[name] += self.clock.now() - began
        return result

    def begin_gradient(self) -> None:
        self.began = self.clock.now()

    def end_gradient(self) -> None:
        self.spent["action_gradient"] += self.clock.now() - self.began


class TimedAction(ModifiedAction):
    """An action whose calls are timed, and its backward passes by marks behind and before it in the graph."""

    def __init__(self, action: Action, split: Split) -> None:
        self.action, self.split = action, split

    def __call__(self, field: Tensor) -> Tensor:
        marked = Mark.apply(field, self.split.end_gradient)
        return Mark.apply(self.split.during("action", lambda: self.action(marked)), self.split.begin_gradient)

    def force(self, field: Tensor) -> Tensor:
        return self.split.during("action_gradient", lambda: self.action.force(field))


class Mark(torch.autograd.Function):
    """The identity, which calls a function when the backward pass comes by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, passing: Callable[[], None]) -> Tensor:
        ctx.passing = passing
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.passing()
        return gradient, None
