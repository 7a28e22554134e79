"""Markov chains on lattice actions."""

from latticeflow.mcmc.composite import Composite
from latticeflow.mcmc.flow_hmc import FlowHMC, PulledBack
from latticeflow.mcmc.hmc import HMC
from latticeflow.mcmc.independence import IndependenceMetropolis
from latticeflow.mcmc.integrators import Integrator, integrate
from latticeflow.mcmc.kernel import ChainState, Kernel, SamplerDraws, StepInfo
from latticeflow.mcmc.winding import Winding, unit_flux

__all__ = [
    "HMC",
    "ChainState",
    "Composite",
    "FlowHMC",
    "IndependenceMetropolis",
    "Integrator",
    "Kernel",
    "PulledBack",
    "SamplerDraws",
    "StepInfo",
    "Winding",
    "integrate",
    "unit_flux",
]
