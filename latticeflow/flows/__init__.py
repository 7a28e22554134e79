"""Bijections: splines, couplings of links and of real fields, autoregressive and elementwise layers, Glow."""

from latticeflow.flows.autoregressive import MaskedAutoregressive, autoregressive_flow
from latticeflow.flows.bijection import Bijection, Sequential
from latticeflow.flows.channels import ChannelCoupling, InvertibleConvolution
from latticeflow.flows.clamps import Clamp
from latticeflow.flows.coupling import AffineMap, Coupling, SplineMap, coupling_flow
from latticeflow.flows.elementwise import ActNorm, ElementwiseAffine, Permutation, Reflection, Softplus
from latticeflow.flows.gauge import PlaquetteCoupling, SectorCoupling, gauge_flow
from latticeflow.flows.glow import AtLevel, glow, glow_blocks
from latticeflow.flows.loft import LOFT

__all__ = [
    "LOFT",
    "ActNorm",
    "AffineMap",
    "AtLevel",
    "Bijection",
    "ChannelCoupling",
    "Clamp",
    "Coupling",
    "ElementwiseAffine",
    "InvertibleConvolution",
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
    "glow",
    "glow_blocks",
]
