"""Markov chains on lattice actions."""

from latticeflow.mcmc.independence import IndependenceMetropolis
from latticeflow.mcmc.kernel import ChainState, Kernel, StepInfo

__all__ = ["ChainState", "IndependenceMetropolis", "Kernel", "StepInfo"]
