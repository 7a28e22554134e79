"""Configurations to start from, and a way to see all the problems of a text."""

from collections.abc import Callable

import pytest

from latticeflow.config import ConfigError
from latticeflow.config.loading import parse_config
from latticeflow.config.problems import Problem

GAUGE = """\
[run]
seed = 7
device = "cpu"

[lattice]
shape = [8, 8]

[action]
kind = "schwinger"
beta = 2.0
kappa = 0.276
holonomies = [12, 6]

[sampler.prior]
kind = "quenched"
beta = 2.35
sector = 0.6

[sampler.flow]
kind = "gauge"
layers = 8
hidden = [32, 32]
dilations = [1, 1, 2]

[training]
estimator = "reinforce"
steps = 2000
learning_rate = 1e-3
signal_clip = 8
holonomies = [12, 1]

[chain]
replica = 16
draws = 128

[baseline]
samples = 1000

[analysis]
observables = ["plaquette", "topological_charge2"]
"""

SCALAR = """\
[lattice]
shape = [4, 4, 8]

[action]
kind = "scalar"
m2 = -4
lam = 8.0

[sampler.prior]
kind = "normal"
scale = 0.5
"""


@pytest.fixture
def gauge() -> str:
    return GAUGE


@pytest.fixture
def scalar() -> str:
    return SCALAR


@pytest.fixture
def problems() -> Callable[..., dict[str, Problem]]:
    """Return a function from a text and overrides to its problems by path; none twice."""

    def problems_of(text: str, *overrides: str) -> dict[str, Problem]:
        with pytest.raises(ConfigError) as caught:
            parse_config(text, overrides)
        found = caught.value.problems
        assert len({problem.path for problem in found}) == len(found)
        assert all(str(problem) in str(caught.value) for problem in found)
        return {problem.path: problem for problem in found}

    return problems_of
