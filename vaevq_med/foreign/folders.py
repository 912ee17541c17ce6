"""A folder of ``config.json`` and weights, as ``save_pretrained`` leaves it, and plain values of a configuration."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vaevq_med.foreign.errors import ForeignError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ForeignError: there is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        found = "no file" if isinstance(error, FileNotFoundError) else f"no JSON ({str(error)[:120]})"
        raise ForeignError(f"{path}: found {found}, expected the network's configuration") from None
    if not isinstance(content, dict):
        raise ForeignError(f"{path}: found {type(content).__name__}, expected an object of JSON")
    return content


def weights_in(folder: Path, names: Sequence[str]) -> Path:
    """The file of weights of a folder.

    Args:
        folder: which.
        names: that it may have, the preferred one first.

    Raises:
        ForeignError: there is none.
    """
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise ForeignError(f"{folder}: found none of {', '.join(names)}, expected the network's weights")
    return found


def plain(value: Any, config: Mapping[str, Any], path: Path, depth: int = 0) -> Any:
    """The values of a MONAI configuration with its references resolved.

    Raises:
        ForeignError: a reference leads nowhere, or a value is an expression, which would have to be run.
    """
    if isinstance(value, Mapping):
        return {key: plain(item, config, path, depth) for key, item in value.items() if not str(key).startswith("_")}
    if isinstance(value, list):
        return [plain(item, config, path, depth) for item in value]
    if isinstance(value, str) and value.startswith("@"):
        found: Any = config
        try:
            for key in value[1:].replace("::", "#").split("#"):
                found = found[int(key)] if isinstance(found, list) else found[key]
        except (KeyError, IndexError, ValueError, TypeError):
            raise ForeignError(f"{path}: found the reference {value!r} to nothing, expected a value of it") from None
        if depth > 20:
            raise ForeignError(f"{path}: found references that go in a circle, expected plain values")
        return plain(found, config, path, depth + 1)
    if isinstance(value, str) and value.startswith(("$", "%")):
        raise ForeignError(f"{path}: found the expression {value!r}, expected plain values")
    return value


def numbers(text: str, name: str) -> tuple[float, float]:
    """Two numbers, rising, of ``LOW,HIGH``.

    Raises:
        ForeignError: it is something else.

    >>> numbers("0,1", "value_range")
    (0.0, 1.0)
    """
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low, high = 0.0, 0.0
    if not low < high or not math.isfinite(high - low):
        raise ForeignError(
            f"--{name.replace('_', '-')}: found {text!r}, expected two finite numbers, the smaller first, e.g. -1,1"
        )
    return low, high
