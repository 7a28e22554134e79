import ast
from pathlib import Path

from latticeflow import stats


def test_every_public_name_exists_and_is_documented():
    for name in stats.__all__:
        assert getattr(stats, name).__doc__


def test_only_arrays_are_known_here():
    """NumPy, SciPy and the standard library: no torch, no physics."""
    allowed = {"numpy", "scipy", "collections", "dataclasses", "itertools", "latticeflow.stats"}
    for path in Path(stats.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                assert module.split(".")[0] in allowed or module.startswith("latticeflow.stats"), (path, module)
