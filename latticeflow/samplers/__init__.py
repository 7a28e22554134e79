"""Samplers: everything that draws `(x, log q)` and evaluates `log q(x)`."""

from latticeflow.samplers.baseline import Baseline, quenched_baseline, tune_quenched
from latticeflow.samplers.flow import FlowSampler

__all__ = ["Baseline", "FlowSampler", "quenched_baseline", "tune_quenched"]
