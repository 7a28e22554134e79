"""What is wrong with a configuration: one problem, the error that carries all, and values as a user writes them."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

WIDTH = 80


class Problem(NamedTuple):
    """One thing to correct: the dotted path of the key, what was expected, what was found, what may be meant."""

    path: str
    expected: str
    found: str
    suggestion: str = ""

    def __str__(self) -> str:
        hint = f"; {self.suggestion}" if self.suggestion else ""
        return f"{self.path}: expected {self.expected}, found {self.found}{hint}"


class ConfigError(Exception):
    """A configuration that cannot be used: every problem at once in `problems`, `source` naming the file.

    Not a ValueError, so that pydantic passes it on unchanged.
    """

    def __init__(self, problems: Sequence[Problem], source: str = "configuration") -> None:
        super().__init__(list(problems), source)
        self.problems = list(problems)
        self.source = source

    def __str__(self) -> str:
        count = len(self.problems)
        header = f"{self.source}: {count} problem{'s' if count != 1 else ''}"
        lines = [header, *(f"  {problem}" for problem in self.problems)]
        return "\n".join(lines).encode("utf-8", "backslashreplace").decode("utf-8")


def written(value: object) -> str:
    """Return a value as TOML writes it, in ASCII and cut to one line's length."""
    text = _literal(value)
    return text if len(text) <= WIDTH else f"{text[:WIDTH]}..."


def dotted(parts: Sequence[str]) -> str:
    """Return a path as TOML writes it, with quotes around parts that are not bare words."""
    return ".".join(part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else written(part) for part in parts)


def alternatives(options: Sequence[object]) -> str:
    """Return `"a", "b" or "c"`."""
    *others, last = map(written, options)
    return f"{', '.join(others)} or {last}" if others else last


def refused(values: Mapping[str, Any], section: str, keys: Sequence[str], expected: str) -> Iterator[Problem]:
    """Yield a problem for each of these keys of a section that is given."""
    found = {f"{section}.{key}": values.get(f"{section}.{key}") for key in keys}
    yield from (Problem(path, expected, written(value)) for path, value in found.items() if value is not None)


def _literal(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return _integer(value)
        case float():
            return repr(value) if math.isfinite(value) else f"{value:f}"
        case str():
            return json.dumps(value)
        case dict():
            return "a section"
        case list() | tuple():
            return f"[{', '.join(map(_literal, value))}]"
        case _:
            return str(value)


def _integer(value: int) -> str:
    """Name the size of an integer that TOML cannot hold: Python refuses to print the very long ones."""
    return str(value) if value.bit_length() < 64 else f"an integer of {value.bit_length()} bits (more than TOML holds)"
