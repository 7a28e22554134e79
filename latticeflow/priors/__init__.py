"""Base distributions: independent normals and student-t variables, the free field, and links exactly drawn.

Each has `sample(n, generator=None)` in float64 and `log_prob(x) -> (n,)`; link densities refer to Haar measure, the
others to Lebesgue measure.
"""

from latticeflow.priors.base import Prior
from latticeflow.priors.gauge import HaarUniform, QuenchedU1, links_from_plaquettes, von_mises
from latticeflow.priors.scalar import FreeField, Normal
from latticeflow.priors.student_t import StudentT

__all__ = [
    "FreeField",
    "HaarUniform",
    "Normal",
    "Prior",
    "QuenchedU1",
    "StudentT",
    "links_from_plaquettes",
    "von_mises",
]
