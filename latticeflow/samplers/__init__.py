"""Samplers: everything that draws `(x, log q)` and evaluates `log q(x)`."""

from latticeflow.samplers.baseline import Baseline, quenched_baseline, tune_quenched
from latticeflow.samplers.flow import FlowSampler
from latticeflow.samplers.stabilised import StabilisedSampler

__all__ = ["Baseline", "FlowSampler", "StabilisedSampler", "quenched_baseline", "tune_quenched"]
