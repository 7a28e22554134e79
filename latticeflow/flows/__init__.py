"""Bijections: splines, couplings of links and of real fields, elementwise layers, and their networks."""

from latticeflow.flows.bijection import Bijection, Sequential
from latticeflow.flows.clamps import Clamp
from latticeflow.flows.coupling import AffineMap, Coupling, SplineMap, coupling_flow
from latticeflow.flows.elementwise import ActNorm, ElementwiseAffine, Permutation, Softplus
from latticeflow.flows.gauge import PlaquetteCoupling, gauge_flow
from latticeflow.flows.loft import LOFT

__all__ = [
    "LOFT",
    "ActNorm",
    "AffineMap",
    "Bijection",
    "Clamp",
    "Coupling",
    "ElementwiseAffine",
    "Permutation",
    "PlaquetteCoupling",
    "Sequential",
    "Softplus",
    "SplineMap",
    "coupling_flow",
    "gauge_flow",
]
