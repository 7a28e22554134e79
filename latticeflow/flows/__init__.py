"""Bijections: splines, couplings, gauge-equivariant layers, and their networks."""

from latticeflow.flows.bijection import Bijection, Sequential
from latticeflow.flows.gauge import PlaquetteCoupling, gauge_flow

__all__ = ["Bijection", "PlaquetteCoupling", "Sequential", "gauge_flow"]
