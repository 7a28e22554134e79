"""The configuration: every section and key, with its type, range, default and meaning.

The descriptions are the reference (`latticeflow.config.reference`); each states the meaning and the unit. An integer is
accepted where a number is expected; NaN and infinity nowhere.
"""

from collections.abc import Set
from typing import Annotated, Any, Literal, Self

from pydantic import Field, Strict, model_validator

from latticeflow.config.checks import cross_problems
from latticeflow.config.defaults import with_theory_defaults
from latticeflow.config.keys import differing_paths, known_values
from latticeflow.config.part_checks import OF_PARTS
from latticeflow.config.problems import ConfigError, dotted
from latticeflow.config.samplers import (
    EBFlowSamplerSettings,
    FlowSamplerSettings,
    PiecewiseSamplerSettings,
    StabilisedSamplerSettings,
)
from latticeflow.config.text import write_toml
from latticeflow.config.theories import Density, LatticeTheory
from latticeflow.config.types import (
    Beta,
    Count,
    Counts,
    Decay,
    Extent,
    Fraction,
    Grid,
    Natural,
    NonNegative,
    Positive,
    Rate,
    Rates,
    Settings,
    Several,
    Share,
    SmoothSector,
)
from latticeflow.config.words import LARGEST_INTEGER

THERMALISATION = 100
SHORTEST_CHAIN = 4
"""Draws that an error analysis needs."""


class RunSettings(Settings):
    """How the run is carried out."""

    seed: Natural = Field(0, description="seed from which all random streams derive")
    device: str = Field("cpu", min_length=1, description='torch device, for instance "cpu" or "cuda:0"')
    threads: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        None, description="CPU threads of torch (absent: torch's default)"
    )


class LatticeSettings(Settings):
    """The periodic lattice."""

    shape: Annotated[tuple[Extent, ...], Strict(False)] = Field(
        min_length=1,
        max_length=4,
        description="extents in lattice units, time first; gauge theories have two, densities one, their dimension",
    )


class TrainingSettings(Settings):
    """Stochastic gradient training of the sampler, or fits of its pieces to samples."""

    estimator: Literal[
        "reinforce",
        "reparametrisation",
        "path",
        "forward_kl",
        "explicit",
        "sliced",
        "denoising",
        "finite_difference",
    ] = Field(
        "path",
        description="gradient estimator; the first three are of reverse KL and draw from the sampler, the last four "
        "match scores, explicit that of the action, the others that of samples",
    )
    steps: Natural = Field(1000, description="optimiser steps")
    batch: Several = Field(128, description="configurations per batch")
    accumulate: Count = Field(1, description="batches whose gradients are averaged for one step")
    learning_rate: Rate = Field(1e-3, description="largest learning rate of Adam")
    betas: Annotated[tuple[Decay, Decay], Strict(False)] = Field(
        (0.9, 0.99), description="Adam's decay rates of the first and second moment"
    )
    warmup: Natural = Field(50, description="steps over which the learning rate rises linearly from 0")
    decay: Literal["cosine", "none"] = Field("cosine", description="learning rate after the warm-up")
    gradient_clip: Positive | None = Field(None, description="largest norm of the gradient (absent: not clipped)")
    signal_clip: Positive | None = Field(
        None,
        description="bound on abs(signal - baseline) of the reinforce estimator, dimensionless (absent: not clipped)",
    )
    dtype: Literal["float32", "float64"] = Field("float32", description="precision of the flow")
    window: Count = Field(
        50,
        description="batches pooled into the running ESS, which also selects the best weights: the last whose window "
        "is not below the highest by more than two errors",
    )
    noise: Positive | None = Field(
        None, description="width sigma of denoising, in units of the field (absent: 0.1); denoising only"
    )
    difference: Positive | None = Field(
        None,
        description="step eps of finite differences, in units of the field (absent: 0.1); finite_difference only",
    )
    ema: Decay | None = Field(
        None, description="decay of a moving average of the weights, which is what is kept (absent: no average)"
    )
    holonomies: Grid | None = Field(
        None, description="coarser grid of holonomy shifts while training, gauge theories only (absent: the action's)"
    )
    checkpoint_every: Count = Field(200, description="steps between checkpoints")
    recompute: bool = Field(
        False,
        description="keep the input of every layer alone and compute the rest again for the gradient: less memory "
        "for one more pass through every layer",
    )
    compile: bool = Field(
        False,
        description="compile splines and the sweeps of gauge couplings with torch.compile, which takes a minute or two "
        "and a C++ compiler (on a GPU Triton)",
    )
    start_from: str | None = Field(
        None,
        min_length=1,
        description="folder of a trained run, on another lattice for instance, with whose weights to begin",
    )
    samples: str | None = Field(
        None,
        min_length=1,
        description="HDF5 ensemble of the theory to learn from, at any couplings; forward_kl and scores of samples "
        "need it or draws, explicit draws from the sampler without",
    )
    draws: Several | None = Field(
        None, description="exact independent draws to learn from instead, of densities that have them"
    )
    validation: Fraction | None = Field(
        None, description='fraction of the samples held out, which choose the weights (absent: 0.2); "clusters" only'
    )
    patience: Count | None = Field(
        None, description='evaluations without a better one that end a fit (absent: 10); "clusters" only'
    )
    evaluate_every: Count | None = Field(
        None, description='steps between evaluations on the held-out samples (absent: 50); "clusters" only'
    )
    processes: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        None, description='processes that share the fits, with the same result (absent: 1); "clusters" only'
    )
    parts: Counts | None = Field(
        None,
        description="layers of the parts that the flow is trained by, the first next to the prior (absent: as a whole)",
    )
    schedule: Literal["end_to_end", "sequential", "alternate", "simultaneous"] | None = Field(
        None,
        description="order in which parts learn: all as one, each to its end, in turn step by step, or each in every "
        'step (absent: "alternate"); with parts only',
    )
    fine_tuning_estimator: Literal["reinforce", "reparametrisation", "path"] | None = Field(
        None, description="gradient estimator of the last steps (absent: the same in all)"
    )
    fine_tuning: Share | None = Field(
        None,
        description="fraction of the steps, at the end, that are end to end, or by fine_tuning_estimator (absent: "
        "1/3); with parts or that estimator only",
    )
    fine_tuning_rate: Rate | None = Field(
        None,
        description="largest learning rate of those steps, which then have a warm-up and decay of their own (absent: "
        "those of all steps go on); as fine_tuning",
    )
    learning_rates: Rates | None = Field(
        None, description="largest learning rate of each part (absent: learning_rate for all); with parts only"
    )

    def given(self, names: Set[str]) -> dict[str, Any]:
        """Return the values of these keys, without those of training by parts that are not given."""
        values = self.model_dump(include={*names})
        return {name: value for name, value in values.items() if value is not None or name not in OF_PARTS}


class HMCSettings(Settings):
    """Hybrid Monte Carlo."""

    trajectory_length: Positive = Field(1.0, description="length of a trajectory, in molecular-dynamics time")
    step_size: Positive = Field(0.1, description="step of the integrator before it is tuned, in the same unit")
    integrator: Literal["leapfrog", "omelyan", "omelyan4"] = Field(
        "omelyan", description="leapfrog, second-order minimum norm, or fourth-order minimum norm"
    )
    jitter: Decay = Field(0.0, description="largest relative change of a replica's step from trajectory to trajectory")
    target_acceptance: Fraction = Field(0.8, description="acceptance that the step is tuned to in the thermalisation")


class ChainSettings(Settings):
    """The exact Markov chains."""

    kernels: Annotated[
        tuple[Literal["independence", "hmc", "flow_hmc", "winding"], ...], Field(min_length=1), Strict(False)
    ] = Field(
        ("independence",),
        description="kernels applied in turn for every draw: Metropolis with the sampler's proposals, HMC, HMC in the "
        "flow's latent space, steps of one unit of topological charge",
    )
    replica: Annotated[int, Field(ge=1, le=10**7)] = Field(64, description="independent chains")
    draws: Annotated[int, Field(ge=SHORTEST_CHAIN, le=LARGEST_INTEGER)] = Field(
        256, description="configurations per replica; a larger number with --resume extends the ensemble"
    )
    block: Count = Field(32, description="draws committed to the file at a time")
    start: Literal["draws", "cold"] = Field(
        "draws", description="start from draws of the sampler, chosen by their weights, or from zero fields"
    )
    candidates: Annotated[int, Field(ge=1, le=10**7)] = Field(
        1024, description="proposals from which the starting states are resampled"
    )
    thermalisation: Natural | None = Field(
        None,
        description="steps left out at the start, in which HMC is tuned "
        '(absent: 0 for kernels = ["independence"] from draws, else 100)',
    )
    hmc: HMCSettings = Field(HMCSettings(), description='The kernel "hmc". May be absent.')
    flow_hmc: HMCSettings = Field(HMCSettings(), description='The kernel "flow_hmc". May be absent.')

    @property
    def thermalisation_steps(self) -> int:
        """Return the steps left out, the default filled in."""
        if self.thermalisation is not None:
            return self.thermalisation
        return 0 if self.kernels == ("independence",) and self.start == "draws" else THERMALISATION

    @property
    def uses_sampler(self) -> bool:
        """Return whether a kernel needs a trained sampler."""
        return bool({"independence", "flow_hmc"} & set(self.kernels))


class BaselineSettings(Settings):
    """Quenched draws without a flow, reweighted: what no training at all gives."""

    samples: Several = Field(4096, description="independent draws")
    beta: Beta | None = Field(
        None,
        description="gauge coupling of the draws (absent: coupling and sector factor closest to the target are found)",
    )
    sector: NonNegative = Field(0.0, description="c in the sector factor exp(-c Q^2), where beta is given")
    smooth_sector: SmoothSector = Field((), description="smooth sector factor as in the prior, where beta is given")


class AnalysisSettings(Settings):
    """From ensembles to numbers with errors."""

    s: Positive = Field(2.0, description="window parameter S of the Gamma method: tau / tau_int")
    observables: Annotated[tuple[str, ...], Strict(False)] | None = Field(
        None, description="names of the observables to measure (absent: the theory's standard ones)"
    )
    reference: str | None = Field(
        None,
        min_length=1,
        description="run folder or ensemble of the same theory, by HMC for instance, that sectors and weights are "
        "compared with",
    )


class Config(Settings):
    """A whole run. Raises ConfigError for keys that do not fit together; `load_config` reads and explains files."""

    run: RunSettings = Field(RunSettings(), description="How the run is carried out. May be absent.")
    lattice: LatticeSettings = Field(description="The periodic lattice. Required.")
    action: LatticeTheory | Density = Field(discriminator="kind", description="The theory to be sampled. Required.")
    sampler: FlowSamplerSettings | StabilisedSamplerSettings | PiecewiseSamplerSettings | EBFlowSamplerSettings = Field(
        discriminator="kind", description='What proposes configurations. May be absent; kind is "flow" if not given.'
    )
    training: TrainingSettings | None = Field(None, description="Training of the sampler. Absent: nothing is trained.")
    chain: ChainSettings = Field(ChainSettings(), description="The Markov chains. May be absent.")
    baseline: BaselineSettings | None = Field(
        None, description="The training-free baseline, gauge theories only. May be absent."
    )
    analysis: AnalysisSettings = Field(AnalysisSettings(), description="The statistical analysis. May be absent.")

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        tables = {
            name: section.model_dump(exclude_none=True) if isinstance(section, Settings) else section
            for name, section in data.items()
        }
        return with_theory_defaults(tables)

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        problems = cross_problems(known_values(type(self), self.model_dump(exclude_none=True)))
        if problems:
            raise ConfigError(problems)
        return self

    @property
    def clustered(self) -> bool:
        """Return whether the sampler's pieces are clusters of samples, known once it is trained."""
        return isinstance(self.sampler, PiecewiseSamplerSettings) and self.sampler.pieces == "clusters"

    def to_toml(self) -> str:
        """Return the configuration with all defaults filled in, as TOML that loads to an equal one."""
        return write_toml(self.model_dump(exclude_none=True))

    def differences(self, other: "Config") -> list[str]:
        """Return the dotted keys whose values differ, a section that only one of them has as one key."""
        return [dotted(path) for path in differing_paths(self.model_dump(), other.model_dump())]

    def theory_differences(self, other: "Config") -> list[str]:
        """Return the dotted keys that make the two sample different distributions."""
        dumps = [config.model_dump(include={"lattice", "action"}) for config in (self, other)]
        for dump in dumps:
            dump["action"].pop("holonomies", None)
        return [dotted(path) for path in differing_paths(*dumps)]
