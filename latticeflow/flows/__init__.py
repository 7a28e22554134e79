"""Bijections: splines, couplings of links and of real fields, autoregressive and elementwise layers, their networks."""

from latticeflow.flows.autoregressive import MaskedAutoregressive, autoregressive_flow
from latticeflow.flows.bijection import Bijection, Sequential
from latticeflow.flows.clamps import Clamp
from latticeflow.flows.coupling import AffineMap, Coupling, SplineMap, coupling_flow
from latticeflow.flows.elementwise import ActNorm, ElementwiseAffine, Permutation, Reflection, Softplus
from latticeflow.flows.gauge import PlaquetteCoupling, SectorCoupling, gauge_flow
from latticeflow.flows.loft import LOFT

__all__ = [
    "LOFT",
    "ActNorm",
    "AffineMap",
    "Bijection",
    "Clamp",
    "Coupling",
    "ElementwiseAffine",
    "MaskedAutoregressive",
    "Permutation",
    "PlaquetteCoupling",
    "Reflection",
    "SectorCoupling",
    "Sequential",
    "Softplus",
    "SplineMap",
    "autoregressive_flow",
    "coupling_flow",
    "gauge_flow",
]
