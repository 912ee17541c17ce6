"""A network's definition as its checkpoint holds it: plain values, and components of this package and trusted ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from vaevq_med.core.components import ComponentError, resolve
from vaevq_med.trained.file import CheckpointError

OWN = "vaevq_med.networks"
"""The part of this package that a network's definition may name."""


def target_of(definition: Any) -> Any:
    """What a network's definition names, or the definition where it is none."""
    return definition.get("_target_") if isinstance(definition, Mapping) else definition


def plain(value: Any, config: Mapping[str, Any], path: Path, depth: int = 0) -> Any:
    """Replace references by the values they name; refuse expressions and foreign components."""
    if depth > 20:
        raise CheckpointError(f"{path}: found references that go in a circle, expected plain values")
    if isinstance(value, Mapping):
        target = value.get("_target_")
        try:
            component = None if target is None else resolve(target, nn.Module, own=OWN)
        except ComponentError as error:
            raise CheckpointError(f"{path}: {error}") from error
        reserved = [key for key in value if str(key).startswith("_") and key not in ("_target_", "_notes_")]
        if reserved:
            raise CheckpointError(f"{path}: found {', '.join(reserved)} in the network's definition, expected none")
        # Their values are part of the weights, so that the files need not be there.
        files = getattr(component, "initial_files", ())
        return {key: None if key in files else plain(item, config, path, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item, config, path, depth + 1) for item in value]
    if isinstance(value, str):
        if value.startswith("@"):
            found: Any = config
            try:
                for key in value[1:].replace("::", "#").split("#"):
                    found = found[int(key)] if isinstance(found, list) else found[key]
            except (KeyError, IndexError, TypeError, ValueError):
                raise CheckpointError(
                    f"{path}: found the reference {value[:80]!r} to nothing, expected a setting of the run"
                ) from None
            return plain(found, config, path, depth + 1)
        if value.startswith(("$", "%")):
            raise CheckpointError(
                f"{path}: found the expression {value!r} in the network's definition, expected plain values"
            )
    return value


def known_definition(config: Mapping[str, Any], where: str | Path) -> Any:
    """The ``network_def`` of a run's settings, plain values; None where there is none, or it is not plain.

    Args:
        config: of the run, unresolved.
        where: it is from, for messages.
    """
    try:
        return plain(config["network_def"], config, Path(where))
    except (CheckpointError, KeyError, IndexError, TypeError, ValueError):
        return None
