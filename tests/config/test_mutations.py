"""Mutated configurations: each gives a valid Config or a ConfigError that names the key or the line, nothing else."""

import random
import re

import pytest

from latticeflow.config import ConfigError, load_config
from latticeflow.config.loading import parse_config

MUTATIONS = 300
VALUES = [
    *(
        "-1",
        "0",
        "1",
        "6",
        "2.5",
        "0.5",
        "nan",
        "-inf",
        "true",
        '"7"',
        '"u1"',
        '"scalar"',
        '"identity"',
        '"forward_kl"',
    ),
    *("[]", "[6, 8]", "[8]", "[0, 1]", "[nan, 0.5]", "[[1], 2]", "{}", "{a = 1}", "1979-05-27", "9" * 30, "0xffff"),
    *("", "?", "'open", "[1,", "1 2"),
]


def key_lines(lines):
    return [number for number, line in enumerate(lines) if " = " in line]


def misspell(word, rng):
    place = rng.randrange(len(word))
    return word[:place] + rng.choice(["", "q", "_x", "-", word[place] * 2, word[place].upper()]) + word[place + 1 :]


def drop_line(lines, rng):
    place = rng.choice([number for number, line in enumerate(lines) if line])
    section = "\n".join(lines[place:]).split("\n[")[0]
    return lines[:place] + lines[place + 1 :], re.findall(
        r"\w+", section.split("=")[0] if "=" in lines[place] else section
    )


def misspell_line(lines, rng):
    place = rng.choice([number for number, line in enumerate(lines) if line])
    old = rng.choice(re.findall(r"[A-Za-z_]\w+", lines[place].split("=")[0]))
    new = misspell(old, rng)
    return lines[:place] + [lines[place].replace(old, new, 1)] + lines[place + 1 :], [new or '""', old]


def duplicate_line(lines, rng):
    place = rng.choice(key_lines(lines))
    return lines[: place + 1] + lines[place:], []


def replace_value(lines, rng):
    place = rng.choice(key_lines(lines))
    key = lines[place].split(" = ")[0]
    return lines[:place] + [f"{key} = {rng.choice(VALUES)}"] + lines[place + 1 :], [key]


def move_line(lines, rng):
    place, target = rng.choice(key_lines(lines)), rng.choice(key_lines(lines))
    rest = lines[:place] + lines[place + 1 :]
    return rest[:target] + [lines[place]] + rest[target:], re.findall(r"\w+", lines[place])


def in_lines(mutate):
    def mutated(text, rng):
        lines, names = mutate(text.split("\n"), rng)
        return "\n".join(lines).encode(), names

    return mutated


def truncate(text, rng):
    return text[: rng.randrange(len(text))].encode(), ["lattice", "action", "kind", *re.findall(r"\w+", text)]


def reencode(text, rng):
    return f"# \u00fc\n{text}".encode(rng.choice(["latin-1", "utf-16", "utf-16-le", "utf-32-be"])), []


def damage_bytes(text, rng):
    content = bytearray(text.encode())
    content[rng.randrange(len(content))] = rng.randrange(128, 256)
    return bytes(content), []


KINDS = [in_lines(line) for line in (drop_line, misspell_line, duplicate_line, replace_value, move_line)]
KINDS += [truncate, reencode, damage_bytes]


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_mutations_are_valid_or_explained(tmp_path, gauge, scalar, kind):
    rng = random.Random(kind)
    path, outcomes = tmp_path / "run.toml", []
    for _ in range(MUTATIONS // len(KINDS) + 1):
        content, names = KINDS[kind](rng.choice([gauge, scalar]), rng)
        path.write_bytes(content)
        try:
            config = load_config(path)
        except ConfigError as error:
            explained(str(error), names)
            outcomes.append(False)
        else:
            assert parse_config(config.to_toml()) == config
            outcomes.append(True)
    assert not all(outcomes)


def explained(message, names):
    """Assert that the message names the line or one of the keys, and is whole."""
    header, *lines = message.splitlines()
    assert re.search(r"run\.toml: \d+ problems?$", header)
    assert all(re.match(r"  \S.*: expected .+, found .+", line) for line in lines)
    assert re.search(r"\bline \d+:", message) or any(name in " ".join(lines) for name in names)
