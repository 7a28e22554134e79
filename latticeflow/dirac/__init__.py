"""Wilson-Dirac operators and their determinants."""

from latticeflow.dirac.determinant import log_abs_det
from latticeflow.dirac.wilson import apply_wilson, wilson_matrix

__all__ = ["apply_wilson", "log_abs_det", "wilson_matrix"]
