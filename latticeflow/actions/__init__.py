"""Actions: everything that can be sampled."""

from latticeflow.actions.base import Action, ModifiedAction
from latticeflow.actions.densities import (
    CircleOfGaussians,
    Density,
    Drawable,
    Funnel,
    GaussianMixture,
    HorseshoeLogistic,
    LinearRegression,
    MultivariateStudentT,
    TwoMoons,
    TwoRings,
    breast_cancer_horseshoe,
    synthetic_horseshoe,
    synthetic_regression,
)
from latticeflow.actions.holonomy import HolonomyMarginal
from latticeflow.actions.scalar import ScalarAction
from latticeflow.actions.schwinger import SchwingerAction
from latticeflow.actions.u1 import U1Action

__all__ = [
    "Action",
    "CircleOfGaussians",
    "Density",
    "Drawable",
    "Funnel",
    "GaussianMixture",
    "HolonomyMarginal",
    "HorseshoeLogistic",
    "LinearRegression",
    "ModifiedAction",
    "MultivariateStudentT",
    "ScalarAction",
    "SchwingerAction",
    "TwoMoons",
    "TwoRings",
    "U1Action",
    "breast_cancer_horseshoe",
    "synthetic_horseshoe",
    "synthetic_regression",
]
