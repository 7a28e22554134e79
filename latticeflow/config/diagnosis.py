"""From what pydantic found to problems in the user's words: the key, what it takes, what it has, what may be meant."""

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import ValidationError

from latticeflow.config.keys import Model, Path, Section, lookup, owners, sections
from latticeflow.config.problems import Problem, alternatives, dotted, written
from latticeflow.config.schema import Config
from latticeflow.config.words import describe

ABSENT = object()
TAG_ERRORS = ("union_tag_invalid", "union_tag_not_found")


def guess_kinds(data: dict[str, Any]) -> list[Problem]:
    """Report each misspelt `kind` and put the nearest one in its place, so that its section can be checked further."""
    problems: list[Problem] = []
    for section in sections(Config).values():
        table = lookup(data, section.path)
        kind = table.get("kind") if section.tagged and isinstance(table, dict) else None
        nearest = _nearest(kind, section.variants)
        if nearest and kind not in section.variants:
            problems.append(_kind_problem(section, kind))
            table["kind"] = nearest
    return problems


def field_problems(error: ValidationError, data: Mapping[str, Any]) -> list[Problem]:
    """Return one problem for each key that pydantic found wrong in `data`."""
    problems: dict[Path, Problem] = {}
    for detail in error.errors(include_url=False, include_context=False):
        path, model = _locate(detail["loc"])
        if path not in problems:
            problems[path] = _problem(path, model, detail["type"], data)
    return list(problems.values())


def _problem(path: Path, model: Model, error: str, data: Mapping[str, Any]) -> Problem:
    found = lookup(data, path, ABSENT)
    section = sections(Config).get(path)
    if section and error in TAG_ERRORS:
        return _kind_problem(section, found.get("kind", ABSENT))
    if section and error == "extra_forbidden":
        kind = (*path[:-1], "kind")
        expected = f"no such section for {dotted(kind)} = {written(lookup(data, kind))}"
        return Problem(dotted(path), expected, _written(found))
    if section:
        return Problem(dotted(path), _describe_section(section), _written(found))
    if path[-1] not in model.model_fields:
        return _unknown_key(path, model, found)
    field = model.model_fields[path[-1]]
    return Problem(dotted(path), describe(field), _written(found), _meant(found, get_args(field.annotation)))


def _locate(location: Sequence[str | int]) -> tuple[Path, Model]:
    """Return the path of a key in the file and the model that holds it.

    pydantic's location also has the kind after a section that has several, and places within a list.
    """
    known, path, model = sections(Config), (), Config
    parts = iter(location)
    for part in parts:
        path = (*path, str(part))
        if path not in known:
            break
        kind = next(parts, None) if known[path].tagged else None
        model = known[path].model(kind) or model
    return path, model


def _unknown_key(path: Path, model: Model, found: object) -> Problem:
    *parents, name = path
    names = ", ".join(model.model_fields)
    expected = f"a key of [{dotted(parents)}] ({names})" if parents else f"a section ({names})"
    there = f"section [{dotted(path)}]" if isinstance(found, dict) else f"{dotted([name])} = {written(found)}"
    return Problem(dotted(path), expected, there, _home(name, model))


def _home(name: str, model: Model) -> str:
    """Say which known key is nearest to an unknown one, and where it would belong."""
    hints = []
    if nearest := _nearest(name, model.model_fields):
        hints.append(f"did you mean {nearest}?")
    if labels := owners(Config, name):
        hints.append(f"{dotted([name])} belongs to {' or '.join(labels)}")
    return " ".join(hints) or _nearest_elsewhere(name)


def _nearest_elsewhere(name: str) -> str:
    models = [model for section in sections(Config).values() for model in section.variants.values()]
    nearest = _nearest(name, sorted({key for model in models for key in model.model_fields}))
    return f"did you mean {nearest} of {' or '.join(owners(Config, nearest)) or 'the top level'}?" if nearest else ""


def _kind_problem(section: Section, kind: object) -> Problem:
    path = dotted((*section.path, "kind"))
    return Problem(path, alternatives(list(section.variants)), _written(kind), _meant(kind, section.variants))


def _describe_section(section: Section) -> str:
    kinds = f" with kind = {alternatives(list(section.variants))}" if section.tagged else ""
    return f"a section [{dotted(section.path)}]{kinds}"


def _meant(found: object, options: Collection[object]) -> str:
    nearest = _nearest(found, options)
    return f"did you mean {written(nearest)}?" if nearest else ""


def _nearest(name: object, options: Collection[object]) -> str | None:
    if not isinstance(name, str):
        return None
    words = [option for option in options if isinstance(option, str)]
    matches = get_close_matches(name.lower().replace("-", "_"), words, n=1)
    return matches[0] if matches else None


def _written(found: object) -> str:
    return "nothing" if found is ABSENT else written(found)
