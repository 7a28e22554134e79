"""The configuration reference of the README, generated from the schema."""

from collections.abc import Iterator

from pydantic.fields import FieldInfo

from latticeflow.config.keys import Model, Section, is_section, sections
from latticeflow.config.problems import dotted, written
from latticeflow.config.schema import Config
from latticeflow.config.words import describe

HEADER = "| key | type | default | meaning |\n|---|---|---|---|"


def reference() -> str:
    """Return a Markdown table of key, type, default and meaning for every section, one per kind."""
    return "\n".join(line for section in sections(Config).values() if section.path for line in _section(section))


def _section(section: Section) -> Iterator[str]:
    yield f"### `[{dotted(section.path)}]`\n\n{section.description}\n"
    for kind, model in section.variants.items():
        if section.tagged:
            yield f"`kind = {written(kind)}`: {model.__doc__}\n"
        yield f"{HEADER}\n{_rows(model)}\n"


def _rows(model: Model) -> str:
    fields = {name: field for name, field in model.model_fields.items() if not is_section(field)}
    return "\n".join(
        f"| `{name}` | {describe(field)} | {_default(field)} | {field.description} |" for name, field in fields.items()
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "absent" if field.default is None else f"`{written(field.default)}`"
