"""The generated reference covers the schema."""

import re

from latticeflow.config.keys import is_section, sections
from latticeflow.config.reference import reference
from latticeflow.config.schema import Config


def rows():
    """Return the rows of each section of the reference, as cells."""
    found = {}
    for block in reference().split("### ")[1:]:
        name = re.match(r"`\[(.+)\]`", block)[1]
        lines = [line for line in block.splitlines() if line.startswith("| `")]
        found[name] = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return found


def test_every_key_has_a_row_with_type_default_and_meaning():
    table = rows()
    for section in sections(Config).values():
        if not section.path:
            continue
        fields = [item for model in section.variants.values() for item in model.model_fields.items()]
        expected = [f"`{name}`" for name, field in fields if not is_section(field)]
        cells = table[".".join(section.path)]
        assert [row[0] for row in cells] == expected
        assert all(len(row) == 4 and all(row) for row in cells)


def test_sections_are_those_of_the_file():
    assert list(rows()) == [
        *("run", "lattice", "action", "sampler", "sampler.prior", "sampler.flow"),
        *("training", "chain", "chain.hmc", "chain.flow_hmc", "baseline", "analysis"),
    ]


def test_types_and_defaults_are_in_words():
    text = reference()
    assert "| `shape` | list of 1 to 4 integers from 1 to 65536 | required |" in text
    assert "| `kappa` | number >= 0 and < 0.5 | required |" in text
    assert "| `kernel` | odd integer >= 1 | `3` |" in text
    assert "| `threads` | integer from 1 to 4096 | absent |" in text
    assert "| `betas` | two numbers >= 0 and < 1 | `[0.9, 0.99]` |" in text
    assert '| `decay` | "cosine" or "none" | `"cosine"` |' in text
    assert text.isascii()
