"""Samplers: everything that draws `(x, log q)` and evaluates `log q(x)`."""

from latticeflow.samplers.base import Sampler
from latticeflow.samplers.baseline import Baseline, quenched_baseline, tune_quenched
from latticeflow.samplers.ebflow import EBFlowSampler
from latticeflow.samplers.flow import FlowSampler
from latticeflow.samplers.partition import Partition, from_labels, partition
from latticeflow.samplers.partwise import GivenDraws, Part, PartwiseSampler
from latticeflow.samplers.piecewise import PiecewiseSampler, mirrored, standardised
from latticeflow.samplers.sectors import SectorSampler
from latticeflow.samplers.stabilised import StabilisedSampler

__all__ = [
    "Baseline",
    "EBFlowSampler",
    "FlowSampler",
    "GivenDraws",
    "Part",
    "Partition",
    "PartwiseSampler",
    "PiecewiseSampler",
    "Sampler",
    "SectorSampler",
    "StabilisedSampler",
    "from_labels",
    "mirrored",
    "partition",
    "quenched_baseline",
    "standardised",
    "tune_quenched",
]
