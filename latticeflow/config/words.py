"""The allowed values of a key in words, read off its type, so that messages and reference agree with the checks."""

from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator
from pydantic.fields import FieldInfo

from latticeflow.config.problems import alternatives

NOUNS = {int: "integer", float: "number", str: "string"}
COUNTS = {2: "two"}
LARGEST_INTEGER = 2**63 - 1
"""The largest integer that TOML holds; a bound at it is not worth a word."""


def describe(field: FieldInfo) -> str:
    """Return the allowed values of a field, for instance `list of 1 to 4 integers >= 1`."""
    return _describe(field.annotation, field.metadata)


def _describe(annotation: Any, metadata: Sequence[object], *, plural: bool = False) -> str:
    annotation, metadata = _plain(annotation, metadata)
    if get_origin(annotation) is Literal:
        return alternatives(get_args(annotation))
    if annotation is bool:
        return alternatives([True, False])
    if get_origin(annotation) is tuple:
        return _describe_tuple(get_args(annotation), metadata)
    adjectives = [item.func.__name__ for item in metadata if isinstance(item, AfterValidator)]
    noun = NOUNS[annotation] + ("s" if plural else "")
    return " ".join([*adjectives, noun, *_bounds(metadata)])


def _describe_tuple(items: Sequence[Any], metadata: Sequence[object]) -> str:
    entry = _describe(items[0], (), plural=True)
    if items[-1] is not Ellipsis:
        return f"{COUNTS[len(items)]} {entry}"
    least, most = _limit(metadata, "min_length"), _limit(metadata, "max_length")
    if most is not None:
        return f"list of {least or 0} to {most} {entry}"
    return f"list of {least} or more {entry}" if least else f"list of {entry}"


def _plain(annotation: Any, metadata: Sequence[object]) -> tuple[Any, list[object]]:
    """Take `Annotated` and `| None` off a type; return it with all the constraints that it carried."""
    constraints = list(_flat(metadata))
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = (choice for choice in get_args(annotation) if choice is not NoneType)
    if get_origin(annotation) is Annotated:
        annotation, *inner = get_args(annotation)
        constraints += _flat(inner)
    return annotation, constraints


def _flat(metadata: Sequence[object]) -> Iterator[object]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from item.metadata
        else:
            yield item


def _bounds(metadata: Sequence[object]) -> list[str]:
    low, high = _limit(metadata, "ge"), _limit(metadata, "le")
    if high == LARGEST_INTEGER:
        high = None
    if low is not None and high is not None:
        return [f"from {low:g} to {high:g}"]
    signs = ((">=", low), (">", _limit(metadata, "gt")), ("<=", high), ("<", _limit(metadata, "lt")))
    bounds = [f"{sign} {limit:g}" for sign, limit in signs if limit is not None]
    return [" and ".join(bounds)] if bounds else []


def _limit(metadata: Sequence[object], name: str) -> Any:
    return next((getattr(item, name) for item in metadata if hasattr(item, name)), None)
