"""Several workers share the cores: each takes one thread, before torch is loaded."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
