"""Base distributions: independent normals, student-t variables, the free field, links exactly drawn, learned rejection.

Each has `sample(n, generator=None)` in float64 and `log_prob(x) -> (n,)`; link densities refer to Haar measure, the
others to Lebesgue measure.
"""

from latticeflow.priors.base import Prior
from latticeflow.priors.gauge import HaarUniform, QuenchedU1, links_from_plaquettes, von_mises
from latticeflow.priors.resampled import Resampled
from latticeflow.priors.scalar import FreeField, Normal
from latticeflow.priors.sectors import QuenchedSectors
from latticeflow.priors.student_t import StudentT

__all__ = [
    "FreeField",
    "HaarUniform",
    "Normal",
    "Prior",
    "QuenchedSectors",
    "QuenchedU1",
    "Resampled",
    "StudentT",
    "links_from_plaquettes",
    "von_mises",
]
