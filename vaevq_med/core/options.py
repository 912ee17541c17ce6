"""Values from files and command lines, checked in one voice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import NoneType
from typing import Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from vaevq_med.core.declared import with_lists
from vaevq_med.core.errors import DataError
from vaevq_med.core.names import in_one_line, nearest

Number = int | float
"""A number that stays as it was written: ``0`` is not ``0.0`` in a hash."""


class Options(BaseModel):
    """Values that a user gives: each of its declared type, none of an unknown name; they do not change.

    One item where a list is expected is taken as a list of it.

    The description of a field, where it has one, says in an error what is expected.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def read(cls, values: Any, where: str = "") -> Self:
        """Take values as a JSON file holds them.

        Args:
            values: an object of plain values.
            where: what they are from, for messages, e.g. ``recipe mine.json``.

        Raises:
            DataError: a name is unknown or missing, or a value is none that its field takes.
        """
        try:
            return cls.model_validate_json(json.dumps(_with_lists(cls, values), default=str))
        except ValidationError as error:
            line = _line(cls, values, error)
            raise DataError(f"{where}: {line}" if where else line) from None

    def changed(self, **values: Any) -> Self:
        """The same with other values; those that are None are left as they are.

        Raises:
            DataError: as :meth:`read`.
        """
        return self.read({**self.to_dict(), **{name: value for name, value in values.items() if value is not None}})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a JSON file holds them."""
        return self.model_dump(mode="json")


def _with_lists(kind: type[Options], values: Any) -> Any:
    """The values, those inside others too, one item in a list where a list is expected."""
    if not isinstance(values, Mapping):
        return values
    found = with_lists(values, {name: entry.annotation for name, entry in kind.model_fields.items()})
    for name in found.keys() & kind.model_fields.keys():
        for one in _kinds(kind.model_fields[name].annotation):
            if isinstance(one, type) and issubclass(one, Options):
                found[name] = _with_lists(one, found[name])
    return found


def _line(kind: type[Options], values: Any, error: ValidationError) -> str:
    """What is wrong with the first value that is; an unknown name explains others."""
    details = min(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
    model: type[Options] | None = kind
    name, expected = "", "an object"
    for part in details["loc"]:
        if model is None:  # inside of a value
            break
        name = f"{name}.{in_one_line(str(part))}".lstrip(".")
        if part not in model.model_fields:
            close = nearest(part, model.model_fields)
            hint = f"did you mean {close}?" if close else f"expected some of {', '.join(model.model_fields)}"
            return f"{name} is unknown; {hint}"
        field = model.model_fields[str(part)]
        expected = _expected(field)
        if part not in values and field.is_required():
            return f"{name} is missing; expected {expected}"
        values = values.get(part, field.default)
        inner = [one for one in _kinds(field.annotation) if isinstance(one, type) and issubclass(one, Options)]
        model = inner[0] if inner and isinstance(values, Mapping) else None
    found = json.dumps(values, default=str)
    return f"{name or 'it'} is {found if len(found) <= 80 else found[:77] + '...'}; expected {expected}"


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The types that a value may have."""
    is_union = get_origin(annotation) not in (None, Literal, tuple)
    return get_args(annotation) if is_union else (annotation,)


def _expected(field: FieldInfo) -> str:
    """What a field takes."""
    kinds = _kinds(field.annotation)
    return (field.description or _words(kinds, field.metadata)) + (", or null" if NoneType in kinds else "")


def _words(kinds: tuple[Any, ...], metadata: list[Any]) -> str:
    bounds = {name: getattr(one, name) for one in metadata for name in ("ge", "le") if hasattr(one, name)}
    if len(bounds) == 2:
        return f"{bounds['ge']} to {bounds['le']}"
    if get_origin(kinds[0]) is Literal:
        return f"one of {', '.join(map(str, get_args(kinds[0])))}"
    if isinstance(kinds[0], type) and issubclass(kinds[0], Options):
        return "an object"
    if get_origin(kinds[0]) is tuple:
        return "a list"
    words = {bool: "true or false", str: "a text", int: "a whole number"}
    return "a number" if float in kinds else words.get(kinds[0], "another value")


def expect(valid: object, name: str, found: object, expected: str) -> None:
    """Raise the error of a field whose value is not valid."""
    if not valid:
        raise DataError(f"{name}: found {json.dumps(found, default=str)}, expected {expected}")


def is_int(value: object, low: int, high: int) -> bool:
    """Whether a value is a whole number in a range."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: object, low: float, high: float) -> bool:
    """Whether a value is a number in a range."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
