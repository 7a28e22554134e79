"""Couplings through torch.compile: many small operations become a few, one compilation for all layers of a kind."""

import os
import shutil
from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import nn

from latticeflow.flows.coupling import Coupling
from latticeflow.flows.gauge import PlaquetteCoupling

VERSIONS = 64
STEPS = ("_conditioned", "_mapped")  # apart: a score needs the derivative of the second one by itself


def compile_couplings(model: nn.Module) -> None:
    """Compile, at their first use, the maps of all couplings in a model; results change by rounding alone.

    Raises ValueError for a model without couplings that can be compiled.
    """
    couplings = [module for module in model.modules() if isinstance(module, PlaquetteCoupling | Coupling)]
    if not couplings:
        raise ValueError("there are no gauge couplings or couplings of real fields to compile")
    dynamo = torch._dynamo.config  # one version for each direction, with gradients and without, precision and mask
    dynamo.recompile_limit = max(dynamo.recompile_limit, VERSIONS)
    for coupling in couplings:
        for step in STEPS:
            setattr(coupling, step, MethodType(_compiled(getattr(type(coupling), step)), coupling))


def compiler() -> str | None:
    """Return the C++ compiler that compiling for the CPU takes, None where there is none."""
    return next(
        (found for name in (os.environ.get("CXX"), "g++", "clang++") if name and (found := shutil.which(name))), None
    )


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)
