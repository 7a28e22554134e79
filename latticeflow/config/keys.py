"""Which sections and keys exist, read off the pydantic models: for messages, cross-checks and the reference."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from latticeflow.config.problems import alternatives, dotted

Model = type[BaseModel]
Path = tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """A table of the file and the models that can fill it, by their `kind` ("" for a model without one)."""

    path: Path
    description: str
    variants: dict[str, Model]

    @property
    def tagged(self) -> bool:
        """Return whether `kind` chooses between several models."""
        return len(self.variants) > 1

    def model(self, kind: object = None) -> Model | None:
        """Return the model of this kind, None where the kind is not known."""
        if not self.tagged:
            return next(iter(self.variants.values()))
        return self.variants.get(kind) if isinstance(kind, str) else None


@cache
def sections(root: Model) -> dict[Path, Section]:
    """Return every section below a model by its path, the model itself under `()`; the first one describes it."""
    found = {(): Section((), "", {"": root})}
    for section in _walk(root, ()):
        known = found.setdefault(section.path, section)
        found[section.path] = replace(known, variants={**known.variants, **section.variants})
    return found


def known_values(root: Model, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of every known key, and every section that is there, by its dotted path, with defaults.

    `data` may be wrong in any way: what has no meaning is left out.
    """
    values: dict[str, Any] = {}
    for section in sections(root).values():
        table = lookup(data, section.path)
        model = section.model(table.get("kind")) if isinstance(table, dict) else None
        for name, field in model.model_fields.items() if model else ():
            if name in table or not field.is_required():
                values[dotted((*section.path, name))] = table.get(name, field.default)
    return values


def lookup(data: Any, path: Path, default: object = None) -> Any:
    """Return the value at a path in nested tables, or `default`."""
    for part in path:
        if not isinstance(data, dict) or part not in data:
            return default
        data = data[part]
    return data


def differing_paths(left: Any, right: Any, path: Path = ()) -> Iterator[Path]:
    """Yield the paths at which two nested tables differ, as short as they can be."""
    if not isinstance(left, dict) or not isinstance(right, dict):
        if left != right:
            yield path
        return
    for name in {**left, **right}:
        yield from differing_paths(left.get(name), right.get(name), (*path, name))


def owners(root: Model, name: str) -> list[str]:
    """Return the sections that have a key of this name, as in `[action] of kind "schwinger"`."""
    return [label for section in sections(root).values() if section.path and (label := _owner(section, name))]


def is_section(field: FieldInfo) -> bool:
    """Return whether a field is a table of its own rather than a key."""
    return bool(_models(field.annotation))


def _owner(section: Section, name: str) -> str:
    kinds = [kind for kind, model in section.variants.items() if name in model.model_fields]
    everywhere = len(kinds) == len(section.variants)
    return f"[{dotted(section.path)}]{'' if everywhere else f' of kind {alternatives(kinds)}'}" if kinds else ""


def _walk(model: Model, path: Path) -> Iterator[Section]:
    for name, field in model.model_fields.items():
        variants = {_kind(choice): choice for choice in _models(field.annotation)}
        if variants:
            yield Section((*path, name), field.description or "", variants)
        for choice in variants.values():
            yield from _walk(choice, (*path, name))


def _models(annotation: Any) -> list[Model]:
    choices = get_args(annotation) or (annotation,)
    return [choice for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel)]


def _kind(model: Model) -> str:
    field = model.model_fields.get("kind")
    return get_args(field.annotation)[0] if field else ""
