"""Objects from a configuration: actions, samplers, training, chains."""

import math
from collections.abc import Callable
from typing import Any

import torch

from latticeflow.actions import (
    Action,
    CircleOfGaussians,
    Funnel,
    GaussianMixture,
    HolonomyMarginal,
    MultivariateStudentT,
    ScalarAction,
    SchwingerAction,
    TwoMoons,
    TwoRings,
    U1Action,
    breast_cancer_horseshoe,
    synthetic_horseshoe,
    synthetic_regression,
)
from latticeflow.config import theories
from latticeflow.config.samplers import (
    AutoregressiveFlowSettings,
    CouplingFlowSettings,
    Couplings,
    EBFlowSamplerSettings,
    FreeFieldSettings,
    GaugeFlowSettings,
    GlowFlowSettings,
    HaarSettings,
    LinearFlowSettings,
    NormalSettings,
    PiecewiseSamplerSettings,
    StabilisedSamplerSettings,
    StudentTSettings,
)
from latticeflow.config.samples import random_choice, training_fields
from latticeflow.config.schema import Config
from latticeflow.flows import (
    Bijection,
    Clamp,
    ElementwiseAffine,
    Sequential,
    autoregressive_flow,
    compile_couplings,
    coupling_flow,
    gauge_flow,
    glow,
    linear_flow,
)
from latticeflow.mcmc import HMC, Composite, FlowHMC, IndependenceMetropolis, Kernel, SamplerDraws, Winding
from latticeflow.priors import FreeField, HaarUniform, Normal, Prior, QuenchedSectors, QuenchedU1, StudentT
from latticeflow.samplers import (
    EBFlowSampler,
    FlowSampler,
    PartwiseSampler,
    Sampler,
    SectorSampler,
    StabilisedSampler,
    mirrored,
)
from latticeflow.training import Trainer, TrainingSettings, make_estimator


def build_bare_action(config: Config) -> Action:
    """Return the action without any holonomy average."""
    settings, dimension = config.action, config.lattice.shape[0]
    match settings:
        case theories.ScalarSettings():
            return ScalarAction(settings.m2, settings.lam)
        case theories.U1Settings():
            return U1Action(settings.beta)
        case theories.SchwingerSettings():
            return SchwingerAction(settings.beta, settings.kappa, settings.flavours)
        case theories.FunnelSettings():
            return Funnel(dimension, scale=settings.scale)
        case theories.StudentTDensitySettings():
            return MultivariateStudentT(dimension, degrees_of_freedom=settings.degrees_of_freedom)
        case theories.MixtureSettings():
            return GaussianMixture(dimension, radius=settings.radius)
        case theories.TwoMoonsSettings():
            return TwoMoons()
        case theories.CircleOfGaussiansSettings():
            return CircleOfGaussians(settings.modes, radius=settings.radius)
        case theories.TwoRingsSettings():
            return TwoRings()
        case theories.RegressionSettings():
            return synthetic_regression(dimension, observations=settings.observations, seed=settings.data_seed)
        case theories.HorseshoeSettings(data="breast_cancer"):
            return breast_cancer_horseshoe()
        case theories.HorseshoeSettings():
            return synthetic_horseshoe(dimension, observations=settings.observations, seed=settings.data_seed)


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
    match settings:
        case NormalSettings():
            return Normal(shape, scale=settings.scale)
        case FreeFieldSettings():
            return FreeField(shape, settings.m2)
        case StudentTSettings():
            per_site = settings.sites == "own"
            return StudentT(shape, degrees_of_freedom=settings.degrees_of_freedom, per_site=per_site)
        case HaarSettings():
            return HaarUniform(shape)
    beta = config.action.beta if settings.beta is None else settings.beta
    if isinstance(config.sampler, PiecewiseSamplerSettings):
        return QuenchedSectors(beta, shape)
    return QuenchedU1(beta, shape, sector=settings.sector, smooth_sector=settings.smooth_sector)


def build_flow(config: Config) -> Bijection:
    """Return the untrained flow of a sampler of kind "flow" or "piecewise"."""
    settings, shape = config.sampler.flow, config.lattice.shape
    match settings:
        case GaugeFlowSettings():
            keep_charge = isinstance(config.sampler, PiecewiseSamplerSettings)
            return gauge_flow(shape, keep_charge=keep_charge, **settings.model_dump(exclude={"kind"}))
        case CouplingFlowSettings():
            return coupling_flow(shape, **_couplings(settings))
        case AutoregressiveFlowSettings():
            return autoregressive_flow(shape, **settings.model_dump(exclude={"kind"}))
        case LinearFlowSettings():
            odd = settings.symmetry == "z2"
            return linear_flow(shape, odd=odd, **settings.model_dump(exclude={"kind", "symmetry"}))
        case GlowFlowSettings():
            return glow(shape, periodic=True, **settings.model_dump(exclude={"kind"}))
    return Sequential()


def build_sampler(config: Config) -> Sampler:
    """Return the untrained sampler in its training precision, on the run's device; its weights derive from the seed.

    Before they are fitted, clusters of samples are no pieces: their prior alone is what chains can start from.
    """
    settings, prior = config.sampler, build_prior(config)
    dtype = getattr(torch, config.training.dtype) if config.training else torch.float64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        match settings:
            case StabilisedSamplerSettings():
                own = {"tau": settings.tau, "shared": settings.sites == "shared"}
                sampler = StabilisedSampler(config.lattice.shape, prior=prior, **own, **_couplings(settings))
            case EBFlowSamplerSettings():
                sampler = EBFlowSampler(prior, build_flow(config))
            case PiecewiseSamplerSettings(pieces="charge"):
                sampler = SectorSampler(prior, build_flow(config))
            case PiecewiseSamplerSettings(pieces="clusters"):
                sampler = FlowSampler(prior, Sequential())
            case PiecewiseSamplerSettings():
                sampler = mirrored(FlowSampler(prior, Sequential([build_flow(config), _vacuum(config)])))
            case _:
                sampler = FlowSampler(prior, build_flow(config))
    if config.training is not None and config.training.parts is not None:
        sampler = PartwiseSampler(sampler.prior, sampler.flow, config.training.parts)
    return sampler.to(config.run.device, dtype)


def _vacuum(config: Config) -> ElementwiseAffine:
    """Return the map that puts fluctuations on top of the vacuum, by default the minimum of `m2 phi^2 + lam phi^4`."""
    well, vacuum = ElementwiseAffine(config.lattice.shape, shared=True), config.sampler.vacuum
    if vacuum is None:
        vacuum = math.sqrt(-config.action.m2 / (2 * config.action.lam))
    torch.nn.init.constant_(well.shift, vacuum)
    return well


def _couplings(settings: Couplings) -> dict[str, Any]:
    """Return the settings of `coupling_flow`."""
    clamp = Clamp(settings.clamp, positive=settings.clamp_positive, negative=settings.clamp_negative)
    names = ("layers", "mask", "transform", "bins", "bound", "conditioner", "hidden", "kernel", "inner_kernel")
    chosen = {name: getattr(settings, name) for name in names}
    return chosen | {"clamp": clamp, "odd": settings.symmetry == "z2"}


def build_trainer(config: Config, sampler: Sampler) -> Trainer:
    """Return the trainer of a configuration that has a training section.

    Raises FileNotFoundError or DataError for the ensemble that is learned from.
    """
    settings, target = config.training, None
    if settings.samples is not None or settings.draws is not None:
        target = random_choice(training_fields(config, build_bare_action(config)))
    own = settings.model_dump(include={"signal_clip", "noise", "difference"})
    estimator = make_estimator(settings.estimator, target=target, **own)
    last = settings.fine_tuning_estimator
    names = TrainingSettings.__dataclass_fields__.keys() - {"seed"}
    chosen = TrainingSettings(seed=config.run.seed, **settings.given(names))
    for module in sampler.modules():
        if isinstance(module, Sequential):
            module.recompute = settings.recompute
    if settings.compile:
        compile_couplings(sampler)
    tuner = None if last is None else make_estimator(last)
    return Trainer(sampler, build_action(config, training=True), estimator, chosen, fine_tuner=tuner)


def build_kernel(config: Config, sampler: Sampler) -> Kernel:
    """Return the Markov kernel, or the composite of several; the sampler is cast to float64."""
    action, chain = build_action(config), config.chain
    draws = sampler.prior if isinstance(sampler, FlowSampler) else SamplerDraws(sampler)
    kernels: dict[str, Callable[[], Kernel]] = {
        "independence": lambda: IndependenceMetropolis(sampler, action, candidates=chain.candidates),
        "hmc": lambda: HMC(action, draws, **chain.hmc.model_dump()),
        "flow_hmc": lambda: FlowHMC(action, sampler, **chain.flow_hmc.model_dump()),
        "winding": lambda: Winding(action, draws),
    }
    chosen = [kernels[name]() for name in chain.kernels]
    return chosen[0] if len(chosen) == 1 else Composite(chosen)
