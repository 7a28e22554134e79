"""The architecture: imports go one way, modules are short and named after their subject, public names explained.

The arrows (DESIGN, section 2), as ranks: a module imports its own subpackage and what has a smaller rank, nothing else.
Function-level imports count like those at the top.
"""

import ast
import importlib
import inspect
import textwrap
from pathlib import Path

import pytest

import latticeflow

PACKAGE = Path(latticeflow.__file__).parent
RANKS = (
    {"lattice", "streams", "stats", "storage"},
    {"u1", "plots"},
    {"exact", "dirac"},
    {"actions", "priors"},
    {"observables", "flows"},
    {"samplers"},
    {"training", "mcmc"},
    {"config"},
    {"cli"},
    {"__main__"},
)
RANK = {unit: rank for rank, units in enumerate(RANKS) for unit in units}
ONLY = {"plots": {"stats", "storage"}, "exact": set(), "lattice": set(), "streams": set(), "u1": {"lattice"}}
"""What may be imported at most, where that is less than the rank allows."""
NOT_FOR = {"torch": {"stats", "exact", "plots"}}
"""Which units a foreign package is kept out of."""
MATPLOTLIB = {"plots"}
BAGS = {"utils", "util", "common", "helpers", "helper", "misc", "tools"}
LONGEST = 400


def unit_of(path):
    """Return the top-level part of the package that a module belongs to, `""` for its `__init__`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imported(tree, package):
    """Yield the dotted names that a module of this package imports, relative ones resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "latticeflow":
            yield f"latticeflow.{node.attr}"  # `import latticeflow; latticeflow.actions`


def violations(source, unit, package="latticeflow"):
    """Return what is wrong with the imports of a module of this unit, one sentence each."""
    found = []
    for name in imported(ast.parse(source), package):
        root, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if root == "latticeflow":
            found += inner_violations(unit, other)
        elif unit in NOT_FOR.get(root, ()):
            found.append(f"{unit} imports {root}")
        elif root == "matplotlib" and unit not in MATPLOTLIB:
            found.append(f"{unit} imports matplotlib")
    return found


def inner_violations(unit, other):
    if other in ("", unit, "__version__", "__file__"):
        return []
    if other not in RANK:
        return [f"{unit} imports {other}, which has no rank"]
    if unit == "" or RANK[other] >= RANK[unit] or other not in ONLY.get(unit, {other}):
        return [f"{unit or 'latticeflow'} imports {other}"]
    return []


MODULES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in MODULES]


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_imports_go_one_way(path):
    package = ".".join(["latticeflow", *path.relative_to(PACKAGE).parts[:-1]])
    assert violations(path.read_text(), unit_of(path), package) == []


def test_every_part_of_the_package_has_a_rank():
    assert {unit_of(path) for path in MODULES} - {""} <= RANK.keys()
    assert len(MODULES) > 60


@pytest.mark.parametrize(
    ("unit", "source", "expected"),
    [
        ("actions", "from latticeflow.flows import Sequential", "actions imports flows"),
        ("lattice", "import latticeflow.u1", "lattice imports u1"),
        ("lattice", "from latticeflow import u1", "lattice imports u1"),
        ("exact", "from latticeflow.dirac.wilson import wilson_matrix", "exact imports dirac"),
        ("training", "from latticeflow.mcmc import ChainState", "training imports mcmc"),
        ("flows", "from ..samplers import FlowSampler", "flows imports samplers"),
        ("flows", "from .. import samplers", "flows imports samplers"),
        ("samplers", "def f():\n    from latticeflow.cli.stages import train", "samplers imports cli"),
        ("priors", "if TYPE_CHECKING:\n    from latticeflow.config import Config", "priors imports config"),
        ("mcmc", "import latticeflow\nlatticeflow.config.load_config('x')", "mcmc imports config"),
        ("stats", "from latticeflow.lattice import shift", "stats imports lattice"),
        ("stats", "import torch.nn as nn", "stats imports torch"),
        ("stats", "def f():\n    from torch import Tensor", "stats imports torch"),
        ("exact", "import torch", "exact imports torch"),
        ("storage", "from latticeflow.actions import Action", "storage imports actions"),
        ("storage", "from latticeflow.stats import ess", "storage imports stats"),
        ("cli", "from matplotlib.figure import Figure", "cli imports matplotlib"),
        ("mcmc", "import matplotlib.pyplot as plt", "mcmc imports matplotlib"),
        ("plots", "from latticeflow.u1 import wrap", "plots imports u1"),
        ("config", "from latticeflow.newcomer import thing", "config imports newcomer, which has no rank"),
        ("", "from latticeflow.lattice import shift", "latticeflow imports lattice"),
    ],
)
def test_the_checker_catches_planted_violations(unit, source, expected):
    package = f"latticeflow.{unit}" if unit else "latticeflow"
    assert expected in violations(source, unit, package)


@pytest.mark.parametrize(
    ("unit", "source"),
    [
        ("actions", "from latticeflow.u1 import wrap\nfrom latticeflow.actions.base import Action\nimport torch"),
        ("actions", "from .base import Action\nfrom ..dirac import log_abs_det\nfrom .. import u1"),
        ("training", "from latticeflow.stats import ess\nfrom latticeflow.streams import stream"),
        ("storage", "import latticeflow\nprint(latticeflow.__version__)\nimport torch"),
        ("plots", "from matplotlib.figure import Figure\nfrom latticeflow import stats"),
        ("cli", "from latticeflow.config import Config\nfrom latticeflow import plots"),
        ("lattice", "import torchvision_of_another_name, matplotlib_inline"),
    ],
)
def test_the_checker_allows_the_arrows(unit, source):
    assert violations(source, unit, f"latticeflow.{unit}") == []


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_modules_are_named_after_their_subject(path):
    parts = {part.strip("_") for part in path.relative_to(PACKAGE).with_suffix("").parts}
    assert not parts & BAGS


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_modules_are_short(path):
    assert len(path.read_text().splitlines()) <= LONGEST


# ---------------------------------------------------------------- docstrings


def is_explained(thing):
    """Return whether the source has a docstring: dataclasses and tuples get one made up, base classes lend theirs."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
    return bool(ast.get_docstring(definition))


def public_things(module):
    """Return by name the functions and classes in `__all__`, or without one those that the module itself defines."""
    listed = getattr(module, "__all__", None)
    names = [name for name in vars(module) if not name.startswith("_")] if listed is None else listed
    things = {name: getattr(module, name) for name in names}
    return {
        name: thing
        for name, thing in things.items()
        if inspect.isroutine(thing) or inspect.isclass(thing)
        if listed is not None or thing.__module__ == module.__name__
    }


def dotted(path):
    return ".".join(["latticeflow", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


PUBLIC_MODULES = [
    dotted(path)
    for path in MODULES
    if path.name == "__init__.py" or (path.parent == PACKAGE and not path.name.startswith("_"))
]


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_public_names_have_docstrings(name):
    things = public_things(importlib.import_module(name))
    assert [thing for thing in things if not is_explained(things[thing])] == []


def test_public_names_are_found():
    found = {f"{name}.{thing}" for name in PUBLIC_MODULES for thing in public_things(importlib.import_module(name))}
    expected = {
        "latticeflow.lattice.shift",
        "latticeflow.u1.wrap",
        "latticeflow.priors.QuenchedU1",
        "latticeflow.actions.SchwingerAction",
        "latticeflow.flows.gauge_flow",
        "latticeflow.stats.gamma_method",
        "latticeflow.mcmc.ChainState",
        "latticeflow.storage.Ensemble",
    }
    assert expected <= found
    assert "latticeflow.u1.shift" not in found


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_names_in_an_all_exist_once(name):
    module = importlib.import_module(name)
    names = getattr(module, "__all__", [])
    assert len(names) == len(set(names))
    assert all(hasattr(module, listed) for listed in names)


def test_a_missing_docstring_is_noticed():
    class Silent:
        pass

    class Heir(dict):
        pass

    def explained():
        """Return nothing."""

    assert not is_explained(Silent)
    assert not is_explained(Heir)
    assert is_explained(explained)


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_modules_begin_with_a_docstring(path):
    assert ast.get_docstring(ast.parse(path.read_text()))
