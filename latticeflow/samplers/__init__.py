"""Samplers: everything that draws `(x, log q)` and evaluates `log q(x)`."""

from latticeflow.samplers.flow import FlowSampler

__all__ = ["FlowSampler"]
