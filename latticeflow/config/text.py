"""TOML text: reading it with problems that name the line, and writing it."""

import re
import tomllib
from collections.abc import Mapping
from typing import Any

import tomli_w

from latticeflow.config.problems import ConfigError, Problem, written

EXPECTED = "TOML"


def decode(content: bytes, source: str) -> str:
    """Return a file's text; raise ConfigError, naming the line, where it is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        problem = Problem(
            f"line {line}", "text in UTF-8", f"byte 0x{content[error.start]:02x}", "save the file as UTF-8"
        )
        raise ConfigError([problem], source) from None


def read_toml(text: str, source: str) -> dict[str, Any]:
    """Return the tables of a TOML text; raise ConfigError, naming the line, where it is none."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        problem = _located(text, str(error))
    except RecursionError:
        problem = Problem("the file", EXPECTED, "lists or tables nested too deeply")
    except ValueError:
        problem = Problem(f"line {_line_of_digits(text)}", EXPECTED, "an integer with too many digits")
    raise ConfigError([problem], source)


def write_toml(tables: Mapping[str, Any]) -> str:
    """Return nested tables as TOML text."""
    return tomli_w.dumps(tables)


def _located(text: str, message: str) -> Problem:
    """Turn the parser's message into a problem that shows the line."""
    lines = re.split(r"\r?\n", text.removesuffix("\n"))
    place = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", message)
    number = int(place[1]) if place and place[1] else len(lines)
    reason = message[: place.start()] if place else message
    if reason.startswith("Cannot "):
        reason = "a key or section is given twice"
    return Problem(f"line {number}", EXPECTED, written(lines[number - 1]), _lower(reason))


def _lower(reason: str) -> str:
    return reason[:1].lower() + reason[1:]


def _line_of_digits(text: str) -> int:
    return text.count("\n", 0, max(re.finditer(r"[\d_]+", text), key=lambda run: len(run[0])).start()) + 1
