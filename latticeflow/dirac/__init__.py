"""Wilson-Dirac operators, their determinants and their inverses."""

from latticeflow.dirac.determinant import log_abs_det
from latticeflow.dirac.solver import WilsonSolver, propagator
from latticeflow.dirac.wilson import apply_wilson, wilson_matrix

__all__ = ["WilsonSolver", "apply_wilson", "log_abs_det", "propagator", "wilson_matrix"]
