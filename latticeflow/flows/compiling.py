"""Couplings through torch.compile: many small operations become a few, one compilation for all layers of a kind."""

import os
import shutil
from types import MethodType

import torch
from torch import nn

from latticeflow.flows.coupling import SplineMap
from latticeflow.flows.gauge import PlaquetteCoupling
from latticeflow.flows.spline import compiled

VERSIONS = 64
STEPS = ("_seen", "_sweep")
"""What gauge couplings see of the links, and all that they do where their derivatives are written out."""


def compile_couplings(model: nn.Module) -> None:
    """Compile, at their first use, the splines of all couplings in a model and the `STEPS` of gauge couplings.

    Results change by rounding alone. Raises ValueError for a model without anything to compile.
    """
    gauge = [module for module in model.modules() if isinstance(module, PlaquetteCoupling)]
    maps = [module for module in model.modules() if isinstance(module, SplineMap)]
    if not gauge and not maps:
        raise ValueError("there are no gauge couplings or splines of real fields to compile")
    dynamo = torch._dynamo.config  # one version for each direction, with gradients and without, precision and mask
    dynamo.recompile_limit = max(dynamo.recompile_limit, VERSIONS)
    for module in (*gauge, *maps):
        module.compiled = True
    for coupling in gauge:
        for name in STEPS:
            setattr(coupling, name, MethodType(compiled(getattr(type(coupling), name)), coupling))


def compiler() -> str | None:
    """Return the C++ compiler that compiling for the CPU takes, None where there is none."""
    return next(
        (found for name in (os.environ.get("CXX"), "g++", "clang++") if name and (found := shutil.which(name))), None
    )
