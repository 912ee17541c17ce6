"""Overrides of tokenizers whose encoder and decoder are transformers, for runs in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helpers.stores import SIMVQ, write_checkpoint

SMALL = {"patch_size": 8, "width": 16, "depth": 2, "num_heads": 2}
"""Of each half."""


def of_transformers(toy: dict[str, Any], **further: Any) -> dict[str, Any]:
    """A toy run's overrides without those of convolutions, with small transformers and with what both halves have."""
    kept = {key: value for key, value in toy.items() if not key.startswith(("network_def#encoder", "network_def#deco"))}
    sizes = {**SMALL, **further}
    return kept | {f"network_def#{half}#{key}": sizes[key] for half in ("encoder", "decoder") for key in sizes}


def write_slots(path: Path, quantizer: Mapping[str, Any] = SIMVQ, *, nested: bool = True, **settings: Any) -> Path:
    """The checkpoint of an untrained tokenizer of 8 slots of images of 32 pixels, see :func:`write_checkpoint`."""
    shared = {**SMALL, "num_slots": 8, "image_size": "@image_size"}
    networks = "vaevq_med.networks"
    halves = {
        "encoder": {"_target_": f"{networks}.SlotEncoder", "in_channels": "@in_channels", "causal": nested, **shared},
        "decoder": {"_target_": f"{networks}.SlotDecoder", "out_channels": "@in_channels", "nested": nested, **shared},
    }
    return write_checkpoint(path, dict(quantizer), whole=halves, **settings)
