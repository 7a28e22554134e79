"""A small ensemble, and blocks of it whose numbers depend on their place alone."""

import numpy as np
import pytest

from latticeflow.storage import Ensemble

SHAPE = (2, 4, 4)


def settings(**changes):
    defaults = {
        "theory": "u1",
        "lattice_shape": (4, 4),
        "config": '[action]\nname = "u1"\nbeta = 2.0\n',
        "fields": {"links": (SHAPE, "float64")},
        "history": {"action": "float64", "accepted": "bool"},
        "chains": 2,
        "draws": 20,
        "block": 8,
    }
    return defaults | changes


def block(first, count, *, chains=2):
    """Rows `first` to `first + count` of every column of the small ensemble."""
    chain, draw = np.meshgrid(np.arange(chains), np.arange(first, first + count), indexing="ij")
    action = 1000.0 * chain + draw
    site = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    links = np.sin(action[..., None, None, None] + 0.1 * site)
    return {"fields": {"links": links}, "history": {"action": action, "accepted": (chain + draw) % 3 == 0}}


def fill(ensemble, stop=None):
    """Append blocks up to a number of draws, or to the end."""
    stop = ensemble.draws if stop is None else stop
    while ensemble.n_committed < stop:
        count = min(ensemble.block, ensemble.draws - ensemble.n_committed)
        ensemble.append(**block(ensemble.n_committed, count, chains=ensemble.chains))
    return ensemble


def check(ensemble):
    """Every committed row is what `block` says, and nothing more is visible."""
    expected = block(0, ensemble.n_committed, chains=ensemble.chains)
    np.testing.assert_array_equal(ensemble.field("links"), expected["fields"]["links"])
    for name, values in expected["history"].items():
        np.testing.assert_array_equal(ensemble.history(name), values)
    assert ensemble.verify() == []


class Kit:
    """The functions above, for tests that import nothing from one another."""

    settings = staticmethod(settings)
    block = staticmethod(block)
    fill = staticmethod(fill)
    check = staticmethod(check)


@pytest.fixture
def kit():
    return Kit


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ensemble.h5"


@pytest.fixture
def full(path):
    """A closed file with all of its 20 draws in blocks of 8, 8 and 4."""
    with Ensemble.create(path, **settings()) as ensemble:
        fill(ensemble)
    return path
