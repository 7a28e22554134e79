"""Reading configurations: TOML text, overrides, validation, and every problem at once."""

from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from latticeflow.config.checks import cross_problems
from latticeflow.config.defaults import with_theory_defaults
from latticeflow.config.diagnosis import field_problems, guess_kinds
from latticeflow.config.keys import known_values
from latticeflow.config.overrides import apply_overrides
from latticeflow.config.problems import ConfigError, Problem, written
from latticeflow.config.schema import Config
from latticeflow.config.text import decode, read_toml


def load_config(path: str | PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Return the configuration in a TOML file, with `section.key=value` overrides applied in turn.

    Raises ConfigError with every problem: a file that cannot be read or is not TOML, unknown keys, values of the wrong
    type or range, keys that do not fit together.
    """
    source = fspath(path)
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError([Problem("the file", "a readable TOML file", reason)], source) from None
    return parse_config(decode(content, source), overrides, source)


def parse_config(text: str, overrides: Sequence[str] = (), source: str = "<string>") -> Config:
    """Return the configuration in a TOML text; `source` names it in messages. Otherwise as `load_config`."""
    data = read_toml(text, source)
    problems = apply_overrides(data, overrides)
    problems += guess_kinds(data)
    where = f"{source} (with {', '.join(map(written, overrides))})" if overrides else source
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        problems += field_problems(error, data)
    except ConfigError:
        pass  # the keys do not fit together: listed below with the rest
    else:
        if not problems:
            return config
    raise ConfigError([*problems, *_cross_problems(data, problems)], where)


def _cross_problems(data: dict[str, Any], problems: Sequence[Problem]) -> list[Problem]:
    """Return what does not fit together among the keys that have no problem of their own."""
    broken = {problem.path for problem in problems}
    values = known_values(Config, with_theory_defaults(data))
    sound = {path: value for path, value in values.items() if not _within(path, broken)}
    return cross_problems(sound)


def _within(path: str, broken: set[str]) -> bool:
    parts = path.split(".")
    return any(".".join(parts[:depth]) in broken for depth in range(1, len(parts) + 1))
