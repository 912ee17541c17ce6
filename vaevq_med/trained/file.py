"""A checkpoint's file: written atomically, read without unpickling code."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.files import atomic_binary_writer
from vaevq_med.images.reading import SHAPES, shape_of

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
    if not path.is_file():
        raise CheckpointError(
            f"{path}: found no checkpoint, expected one written by training "
            "(python -m monai.bundle run training --config_file bundles/brats/train.json)"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: found an unreadable file ({first}), expected a checkpoint") from error
    if not isinstance(state, dict) or "network" not in state:
        raise CheckpointError(f"{path}: found no 'network' entry, expected a checkpoint written by training")
    if state.get("format", FORMAT) != FORMAT:
        raise CheckpointError(f"{path}: found checkpoint format {state['format']}, expected {FORMAT}")
    try:
        config = json.loads(state.get("config") or "{}")
    except (TypeError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: found a 'config' that is no JSON object, expected the training's configuration")
    return state


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


def load_state(module: nn.Module, state: Mapping[str, Any], path: Path, name: str) -> None:
    """Load ``state`` into ``module``, or say in one line what does not fit."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise CheckpointError(
            f"{path}: found another architecture in {name!r} ({lines[0] if lines else error}), expected the one "
            "of this configuration; pass the overlays that it was trained with"
        ) from error
