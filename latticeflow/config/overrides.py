"""Settings from the command line, `section.key=value`, put into the tables that a file gave."""

import re
import tomllib
from collections.abc import Sequence
from typing import Any

from latticeflow.config.problems import ConfigError, Problem, written

KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)+")
BARE_WORD = re.compile(r"""[^\s"'\[\]{},#=]+""")


def apply_overrides(tables: dict[str, Any], overrides: Sequence[str]) -> list[Problem]:
    """Set each `section.key=value` in `tables`, in turn; return what could not be set.

    A value is TOML; a bare word is a string. Sections that do not exist are made: whether they are known is seen later.
    """
    problems: list[Problem] = []
    for override in overrides:
        try:
            _set(tables, override)
        except ConfigError as error:
            problems += error.problems
    return problems


def _set(tables: dict[str, Any], override: str) -> None:
    key, equals, text = (part.strip() for part in override.partition("="))
    if not equals or not KEY.fullmatch(key):
        raise _refusal(override, "section.key=value", written(override))
    *parents, name = key.split(".")
    for depth, parent in enumerate(parents, start=1):
        tables = tables.setdefault(parent, {})
        if not isinstance(tables, dict):
            raise _refusal(override, f"a section [{'.'.join(parents[:depth])}]", written(tables))
    tables[name] = _value(override, text)


def _value(override: str, text: str) -> object:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        parsed = {}
    if list(parsed) == ["value"]:
        return parsed["value"]
    if not BARE_WORD.fullmatch(text):
        raise _refusal(override, "a TOML value or a bare word after =", written(text) if text else "nothing")
    return text


def _refusal(override: str, expected: str, found: str) -> ConfigError:
    return ConfigError([Problem(f"override {written(override)}", expected, found)])
