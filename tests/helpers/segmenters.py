"""Small segmentation networks and their checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vaevq_med.networks.segmenter import SliceSegmenter
from vaevq_med.trained.file import FORMAT, atomic_save

SMALL: dict[str, Any] = {
    "in_channels": 4,
    "depth": 3,
    "num_channels": 8,
    "blocks_down": [1, 1],
    "blocks_up": [1],
}
CONTRASTS = ["t1n", "t1c", "t2w", "t2f"]


def small_segmenter(seed: int = 0, **further: Any) -> SliceSegmenter:
    """Two levels of 8 and 16 channels, whose probabilities of all regions are around a half."""
    torch.manual_seed(seed)
    network = SliceSegmenter(**{**SMALL, **further})
    torch.nn.init.zeros_(network.backbone.conv_final[2].conv.bias)
    return network.eval()


def write_segmenter(
    path: Path, *, image_size: int = 32, seed: int = 0, recipe: Mapping[str, Any] | None = None, **further: Any
) -> Path:
    """A checkpoint of :func:`small_segmenter`, as training writes it."""
    definition = {"_target_": "vaevq_med.networks.SliceSegmenter", **SMALL, **further}
    config = {"image_size": image_size, "modalities": CONTRASTS, "network_def": definition}
    state = {
        "format": FORMAT,
        "network": small_segmenter(seed, **further).state_dict(),
        "config": json.dumps(config),
        "data": {} if recipe is None else {"recipe": dict(recipe)},
    }
    atomic_save(state, path)
    return path
