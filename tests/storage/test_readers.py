"""Readers that come and go while a run appends blocks and replaces an observable as fast as it can."""

import subprocess
import sys

import numpy as np
import pytest

from latticeflow.storage import Ensemble

RUN = """
import sys
import numpy as np
from latticeflow.storage import Ensemble

with Ensemble.open(sys.argv[1], "a") as ensemble:
    while ensemble.n_committed < ensemble.draws:
        values = np.arange(ensemble.n_committed, ensemble.n_committed + 8.0) + np.array([[0.0], [0.5]])
        ensemble.append(fields={"phi": values[..., None]}, history={"action": values})
        ensemble.write_observable("constant", np.full((2, ensemble.n_committed), float(ensemble.n_committed)))
"""


def test_every_reader_sees_a_consistent_prefix(path, kit):
    settings = kit.settings(fields={"phi": ((1,), float)}, history={"action": float}, draws=1600)
    Ensemble.create(path, **settings).close()
    seen = []
    with subprocess.Popen([sys.executable, "-c", RUN, str(path)]) as run:
        while run.poll() is None:
            with Ensemble.open(path) as reader:
                seen.append(reader.n_committed)
                check_prefix(reader)
    assert run.returncode == 0
    assert seen == sorted(seen)
    assert len(set(seen)) > 5, "the reader came while the run went on"


def check_prefix(reader):
    draws = np.arange(reader.n_committed) + np.array([[0.0], [0.5]])
    np.testing.assert_array_equal(reader.field("phi")[..., 0], draws)
    np.testing.assert_array_equal(reader.history("action"), draws)
    for name in reader.observable_names:
        values = reader.observable(name)
        assert len(np.unique(values)) == 1
        assert values[0, 0] >= values.shape[1]


def test_a_reader_looks_again_when_the_file_changed_behind_it(path, kit):
    """The change is made by another process, as one of this process is refused while a reader is open."""
    kit.fill(Ensemble.create(path, **kit.settings()), 8).close()
    code = RUN.replace("while ensemble.n_committed < ensemble.draws:", "for values in [np.ones((2, 8))]:")
    code = code.split("        values")[0] + "        ensemble.write_observable('late', values)\n"
    with Ensemble.open(path) as reader:
        with pytest.raises(KeyError, match="it has none"):
            reader.observable("late")
        subprocess.run([sys.executable, "-c", code, str(path)], check=True)
        assert reader.observable("late").tolist() == np.ones((2, 8)).tolist()
        assert reader.n_committed == 8
