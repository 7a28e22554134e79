"""Densities of D real variables as actions: benchmark targets whose normalisation is known, and Bayesian posteriors."""

from latticeflow.actions.densities.base import Density
from latticeflow.actions.densities.drawing import Drawable
from latticeflow.actions.densities.funnel import Funnel
from latticeflow.actions.densities.horseshoe import HorseshoeLogistic, breast_cancer_horseshoe, synthetic_horseshoe
from latticeflow.actions.densities.mixture import GaussianMixture
from latticeflow.actions.densities.planar import CircleOfGaussians, TwoMoons, TwoRings
from latticeflow.actions.densities.regression import LinearRegression, synthetic_regression
from latticeflow.actions.densities.student import MultivariateStudentT

__all__ = [
    "CircleOfGaussians",
    "Density",
    "Drawable",
    "Funnel",
    "GaussianMixture",
    "HorseshoeLogistic",
    "LinearRegression",
    "MultivariateStudentT",
    "TwoMoons",
    "TwoRings",
    "breast_cancer_horseshoe",
    "synthetic_horseshoe",
    "synthetic_regression",
]
