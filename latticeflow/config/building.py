"""Objects from a configuration: actions, samplers, training, chains."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from latticeflow.actions import Action, HolonomyMarginal, ScalarAction, SchwingerAction, U1Action
from latticeflow.config.schema import (
    Config,
    GaugeFlowSettings,
    HaarSettings,
    NormalSettings,
    ScalarSettings,
    U1Settings,
)
from latticeflow.flows import Bijection, Sequential, gauge_flow
from latticeflow.mcmc import HMC, Composite, FlowHMC, IndependenceMetropolis, Kernel, Winding
from latticeflow.priors import HaarUniform, Normal, Prior, QuenchedU1
from latticeflow.samplers import FlowSampler
from latticeflow.storage import Ensemble
from latticeflow.training import Trainer, TrainingSettings, make_estimator


def build_bare_action(config: Config) -> ScalarAction | U1Action | SchwingerAction:
    """Return the action without any holonomy average."""
    settings = config.action
    if isinstance(settings, ScalarSettings):
        return ScalarAction(settings.m2, settings.lam)
    if isinstance(settings, U1Settings):
        return U1Action(settings.beta)
    return SchwingerAction(settings.beta, settings.kappa, settings.flavours)


def build_action(config: Config, *, training: bool = False) -> Action:
    """Return the action that is accepted and rejected with, or the one trained on, which may have a coarser grid."""
    action = build_bare_action(config)
    grid = getattr(config.action, "holonomies", (1, 1))
    if training and config.training is not None and config.training.holonomies is not None:
        grid = config.training.holonomies
    return action if grid == (1, 1) else HolonomyMarginal(action, grid)


def build_prior(config: Config) -> Prior:
    """Return the sampler's base distribution."""
    settings, shape = config.sampler.prior, config.lattice.shape
    if isinstance(settings, NormalSettings):
        return Normal(shape, scale=settings.scale)
    if isinstance(settings, HaarSettings):
        return HaarUniform(shape)
    beta = config.action.beta if settings.beta is None else settings.beta
    return QuenchedU1(beta, shape, sector=settings.sector, smooth_sector=settings.smooth_sector)


def build_flow(config: Config) -> Bijection:
    """Return the untrained flow; its initial weights derive from the seed."""
    settings = config.sampler.flow
    if not isinstance(settings, GaugeFlowSettings):
        return Sequential()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        return gauge_flow(config.lattice.shape, **settings.model_dump(exclude={"kind"}))


def build_sampler(config: Config) -> FlowSampler:
    """Return the untrained sampler in its training precision, on the run's device."""
    dtype = getattr(torch, config.training.dtype) if config.training else torch.float64
    return FlowSampler(build_prior(config), build_flow(config)).to(config.run.device, dtype)


def build_trainer(config: Config, sampler: FlowSampler) -> Trainer:
    """Return the trainer of a configuration that has a training section.

    Raises FileNotFoundError or DataError for the ensemble that forward_kl learns from.
    """
    settings = config.training
    target = None if settings.samples is None else ensemble_target(settings.samples, build_action(config))
    estimator = make_estimator(settings.estimator, signal_clip=settings.signal_clip, target=target)
    names = TrainingSettings.__dataclass_fields__.keys() - {"seed"}
    chosen = TrainingSettings(seed=config.run.seed, **settings.model_dump(include=names))
    return Trainer(sampler, build_action(config, training=True), estimator, chosen)


def build_kernel(config: Config, sampler: FlowSampler) -> Kernel:
    """Return the Markov kernel, or the composite of several; the sampler is cast to float64."""
    action, chain = build_action(config), config.chain
    kernels: dict[str, Callable[[], Kernel]] = {
        "independence": lambda: IndependenceMetropolis(sampler, action, candidates=chain.candidates),
        "hmc": lambda: HMC(action, sampler.prior, **chain.hmc.model_dump()),
        "flow_hmc": lambda: FlowHMC(action, sampler, **chain.flow_hmc.model_dump()),
        "winding": lambda: Winding(action, sampler.prior),
    }
    chosen = [kernels[name]() for name in chain.kernels]
    return chosen[0] if len(chosen) == 1 else Composite(chosen)


def ensemble_target(path: str | Path, action: Action) -> Callable[[int, Generator | None], Tensor]:
    """Return `target(n, generator)`, which picks configurations of a stored ensemble at random, with replacement."""
    with Ensemble.open(path, theory=action.theory) as ensemble:
        stored = ensemble.field(action.field_name)
    fields = torch.from_numpy(np.ascontiguousarray(stored)).flatten(0, 1)

    def target(n: int, generator: Generator | None = None) -> Tensor:
        device = generator.device if generator is not None else "cpu"
        return fields[torch.randint(len(fields), (n,), generator=generator, device=device).cpu()].to(device)

    return target
