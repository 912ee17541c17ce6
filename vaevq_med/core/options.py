"""Values from files and command lines, checked in one voice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from vaevq_med.core.errors import DataError


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


def known(values: Mapping[str, Any], kind: type, where: str) -> None:
    """Refuse fields that a dataclass does not have."""
    names = {f.name for f in fields(kind)}
    unknown = sorted(set(values) - names)
    if unknown:
        raise DataError(
            f"{where}: found unknown field {', '.join(unknown)}, expected some of {', '.join(sorted(names))}"
        )
