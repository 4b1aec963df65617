"""Validation whose errors are one sentence: where, what was found, what was expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from kitbench.errors import InputError, nearest
from kitbench.spec.tasks import Kind

M = TypeVar("M", bound=BaseModel)
EXPECTED = {
    "tuple_type": "expected a list, like [1, 2]",
    "model_type": "expected a table of keys",
    "string_pattern_mismatch": "has characters that are not allowed there",
    "too_short": "expected at least one value",
    "finite_number": "expected a finite number",
    "setting": "expected true, false, a number or text",
}
"""Of errors by pydantic whose own messages speak of Python."""


def parse(model: type[M], raw: object, where: str) -> M:
    """Validate `raw`. Raises InputError with the first error of pydantic's report as one sentence."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise InputError(_sentence(model, error, where)) from error


def _sentence(model: type[BaseModel], error: ValidationError, where: str) -> str:
    """The first error of a validation report: its place, what was found and what was expected."""
    # A misspelt key is two errors, an unknown key and a missing one: the first says more.
    faults: list[dict[str, Any]] = [dict(fault) for fault in error.errors(include_url=False)]
    faults.sort(key=lambda fault: fault["type"] != "extra_forbidden")
    fault = faults[0]
    owner, parts = _walk(model, [str(part) for part in fault["loc"]])
    if parts[:1] == ["methods"] and "settings" in parts:  # of any type: a report has an error for each
        parts = [part for part in parts if part not in ("settings", "bool", "int", "float", "str")]
        fault = next((other for other in faults if other["type"] == "finite_number"), {**fault, "type": "setting"})
    place = ".".join(parts)
    if fault["type"] == "extra_forbidden":
        return f"In {where}: unknown key {place!r}; {nearest(parts[-1], owner.model_fields if owner else ())}"
    if fault["type"] == "missing":
        return f"In {where}: the key {place!r} is missing; add it."
    if fault["type"].startswith("union_tag"):
        kinds = ", ".join(get_args(Kind))
        if "kind" not in fault["input"]:
            return f"In {where}: the key '{place}.kind' is missing; give one of {kinds}."
        return f"In {where}: {place}.kind is {fault['input'].get('kind')!r}; give one of {kinds}."
    message = said_of(fault)
    at = (
        f"{place} is {fault['input']!r}: "
        if place and not isinstance(fault["input"], dict)
        else f"{place}: "
        if place
        else ""
    )
    return f"In {where}: {at}{message[0].lower()}{message[1:]}."


def said_of(fault: Mapping[str, Any]) -> str:
    """What an error of pydantic's report says, in words that are not Python's: `expected a finite number`."""
    text: str = EXPECTED.get(fault["type"], fault["msg"].removeprefix("Value error, "))
    return text


def _walk(model: type[BaseModel] | None, path: Sequence[str]) -> tuple[type[BaseModel] | None, list[str]]:
    """The model of the table that contains the last key of a report's path, and the path as a user writes it.

    None where any key is allowed (settings of methods). After the key of a union a report names the chosen member.
    """
    owner, parts, rest = model, [], list(path)
    while rest:
        part = rest.pop(0)
        parts.append(part)
        owner = model
        if model is None or part not in model.model_fields:
            model = None
            continue
        model = model_of(model.model_fields[part].annotation, rest[0] if rest else None)
        if rest and model is not None and _tag(model) == rest[0]:
            rest.pop(0)
    return owner, parts


def _tag(model: type[BaseModel]) -> str | None:
    """The `kind` that selects this member of a union; None for other models."""
    field = model.model_fields.get("kind")
    return get_args(field.annotation)[0] if field and get_origin(field.annotation) is Literal else None


def model_of(annotation: Any, tag: object = None) -> type[BaseModel] | None:
    """The model in an annotation; of several, the one with this tag, or the first."""
    if get_origin(annotation) in (UnionType, Union):
        found = [m for m in map(model_of, get_args(annotation)) if m]
        return next((m for m in found if _tag(m) == tag), found[0] if found else None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
