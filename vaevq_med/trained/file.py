"""A checkpoint's file: written atomically, read without unpickling code."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from vaevq_med.core.errors import DataError, VaevqMedError
from vaevq_med.core.files import atomic_binary_writer
from vaevq_med.core.names import in_one_line
from vaevq_med.core.options import Options, expect
from vaevq_med.images.reading import SHAPES, shape_of
from vaevq_med.networks.weight_file import read_weight_file

FORMAT = 1


class CheckpointError(VaevqMedError):
    """A checkpoint is missing, unreadable, or of another configuration."""


def atomic_save(state: Mapping[str, Any], path: Path) -> None:
    """Write ``state`` with ``torch.save`` so that ``path`` holds either the old or the whole new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_binary_writer(path) as file:
        torch.save(dict(state), file)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint's dictionary to the CPU without unpickling code.

    Raises:
        CheckpointError: the file is missing, or not a checkpoint of this package.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(
            f"{path}: found a folder, expected a checkpoint of a training run; a packed bundle has no optimizer, so "
            "that nothing goes on from it"
        )
    if not path.is_file():
        raise CheckpointError(
            f"{path}: found no checkpoint, expected one written by training, as checkpoints/best.pt of its output "
            "folder"
        )
    return as_checkpoint(read_weight_file(path, "a checkpoint", CheckpointError), path)


def is_state_dict(state: object) -> bool:
    """Whether a file held tensors by name alone, as a packed bundle's does."""
    return (
        isinstance(state, Mapping)
        and bool(state)
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items())
    )


class _StartTold(Options):
    """What the training says of the file that it started from."""

    model_config = ConfigDict(extra="ignore")

    data: _DataTold | None = None


class _DataTold(Options):
    """What a checkpoint says of its data, as far as something is read of it."""

    model_config = ConfigDict(extra="ignore")

    patients: list[str | int] | None = None
    started_from: _StartTold | None = None
    tokens: dict[str, Any] | None = None
    recipe: dict[str, Any] | None = None
    adopted: dict[str, Any] | None = None


class _Told(Options):
    """What a checkpoint says beside its weights and its configuration; who wrote it may have written anything."""

    model_config = ConfigDict(extra="ignore")

    iteration: int = Field(default=0, ge=0)
    extra: dict[str, Any] | None = Field(default=None, description="an object")
    data: _DataTold | None = None
    feature_weights: dict[str, str] | None = Field(default=None, description="an object of hashes")


_DEEPEST = 64
"""Objects and lists in one another, of what a checkpoint says: far more than any configuration has."""


def _is_deep(value: Any) -> bool:
    level = {id(value): value}
    for _ in range(_DEEPEST):
        inner = (one.values() if isinstance(one, Mapping) else one for one in level.values())
        items = (item for one in inner if not isinstance(one, str | bytes | Tensor) for item in one)
        level = {id(item): item for item in items if isinstance(item, Mapping | list | tuple)}
        if not level:
            return False
    return True


def _check_dense(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors without plain numbers in memory."""
    for name, value in tensors.items():
        if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_nested:
            kind = "without values (meta)" if value.is_meta else f"{value.dtype} {value.layout}".replace("torch.", "")
            raise CheckpointError(f"{path}: found {in_one_line(name)}, a tensor {kind}, expected dense numbers")


def as_checkpoint(state: Any, path: Path) -> dict[str, Any]:
    """What a file held, where it is what training writes.

    Args:
        state: as it was loaded.
        path: the file, for messages.

    Raises:
        CheckpointError: it is something else.
    """
    if not isinstance(state, dict) or "network" not in state:
        raise CheckpointError(f"{path}: found no 'network' entry, expected a checkpoint written by training")
    for name in ("network", "ema"):
        if (name == "network" or state.get(name) is not None) and not is_state_dict(state[name]):
            raise CheckpointError(f"{path}: found a {name!r} that is no state dictionary, expected tensors by name")
        _check_dense(state.get(name) or {}, path)
    if state.get("format", FORMAT) != FORMAT:
        raise CheckpointError(f"{path}: found checkpoint format {state['format']}, expected {FORMAT}")
    try:
        config = json.loads(state.get("config") or "{}")
    except (TypeError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: found a 'config' that is no JSON object, expected the training's configuration")
    told = {name: state[name] for name in _Told.model_fields if name in state}
    if _is_deep([config, told]):
        raise CheckpointError(
            f"{path}: found objects within objects, more than {_DEEPEST} deep, expected the settings of a training"
        )
    patients = told["data"].get("patients") if isinstance(told.get("data"), Mapping) else None
    try:
        _Told.read(told, str(path))
        expect(not isinstance(patients, str | int | float), f"{path}: data.patients", patients, "a list of names")
    except (DataError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(str(error) if isinstance(error, DataError) else f"{path}: {error}") from None
    return state


def network_hash(definition: Any, weights: Mapping[str, Any]) -> str:
    """SHA-256 of a network's definition and weights, with the prefix ``sha256:``.

    Args:
        definition: plain values; None where it is not known.
        weights: its state dictionary.
    """
    digest = hashlib.sha256(json.dumps(definition, sort_keys=True).encode())
    for name, value in sorted(weights.items()):
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"sha256:{digest.hexdigest()}"


def stored_shape(data: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """How the images of a training were brought to squares; None where that is unknown.

    A checkpoint from before this was recorded has it in the transforms of its configuration.

    Args:
        data: what the checkpoint says of its data.
        config: the configuration of its training, or what a packed bundle keeps of it.
    """
    told = (data.get("reading") if isinstance(data, Mapping) else None) or config.get("reading")
    if isinstance(told, Mapping):
        shape = told.get("shape")
        return shape if shape in SHAPES.values() else None
    return shape_of(re.findall(r'"_target_": "([^"]*)"', json.dumps(config.get("validate"))))


def load_state(
    module: nn.Module,
    state: Mapping[str, Any],
    path: Path,
    name: str,
    expected: str = "the one of this configuration; pass the overlays that it was trained with",
) -> None:
    """Load ``state`` into ``module``, or say in one line what does not fit.

    Args:
        module: to load into.
        state: tensors by name.
        path: the file, for the message.
        name: what they are in it, for the message.
        expected: which architecture is expected, for the message.

    Raises:
        CheckpointError: tensors are missing, of another shape, or of no place.
    """
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"{path}: found another architecture in {name!r} ({_misfit(module.state_dict(), state) or error}), "
            f"expected {expected}"
        ) from error


def _misfit(own: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """What keeps tensors from fitting, in words: the first of each kind, and how many there are."""
    shapes = [
        f"{name} of shape {list(given[name].shape)}, expected {list(value.shape)}"
        for name, value in own.items()
        if isinstance(value, Tensor) and isinstance(given.get(name), Tensor) and given[name].shape != value.shape
    ]
    kinds = (
        [f"no {name}" for name in own if name not in given],
        shapes,
        [f"the unknown {name}" for name in given if name not in own],
    )
    first = [f"{words[0]}{f' and {len(words) - 1} more' if len(words) > 1 else ''}" for words in kinds if words]
    return "; ".join(map(in_one_line, first))
