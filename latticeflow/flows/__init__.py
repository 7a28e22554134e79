"""Bijections: splines, couplings of links and of real fields, autoregressive, linear and elementwise layers, Glow."""

from latticeflow.flows.activations import Cubic, SmoothLeakyReLU
from latticeflow.flows.autoregressive import MaskedAutoregressive, autoregressive_flow
from latticeflow.flows.bijection import Bijection, LinearBijection, Sequential, SingularWeightsError
from latticeflow.flows.channels import ChannelCoupling, InvertibleConvolution
from latticeflow.flows.clamps import Clamp
from latticeflow.flows.compiling import compile_couplings
from latticeflow.flows.coupling import AffineMap, Coupling, SplineMap, coupling_flow
from latticeflow.flows.elementwise import ActNorm, ElementwiseAffine, Logit, Permutation, Reflection, Softplus
from latticeflow.flows.gauge import PlaquetteCoupling, SectorCoupling, gauge_flow, weights_for
from latticeflow.flows.glow import AtLevel, glow, glow_blocks
from latticeflow.flows.holonomy import HolonomyCoupling
from latticeflow.flows.linear import Dense, LUDense, PeriodicConvolution, linear_flow
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
    "Cubic",
    "Dense",
    "ElementwiseAffine",
    "HolonomyCoupling",
    "InvertibleConvolution",
    "LUDense",
    "LinearBijection",
    "Logit",
    "MaskedAutoregressive",
    "PeriodicConvolution",
    "Permutation",
    "PlaquetteCoupling",
    "Reflection",
    "SectorCoupling",
    "Sequential",
    "SingularWeightsError",
    "SmoothLeakyReLU",
    "Softplus",
    "SplineMap",
    "autoregressive_flow",
    "compile_couplings",
    "coupling_flow",
    "gauge_flow",
    "glow",
    "glow_blocks",
    "linear_flow",
    "weights_for",
]
