"""Actions: everything that can be sampled."""

from latticeflow.actions.base import Action, ModifiedAction
from latticeflow.actions.holonomy import HolonomyMarginal
from latticeflow.actions.scalar import ScalarAction
from latticeflow.actions.schwinger import SchwingerAction
from latticeflow.actions.u1 import U1Action

__all__ = ["Action", "HolonomyMarginal", "ModifiedAction", "ScalarAction", "SchwingerAction", "U1Action"]
