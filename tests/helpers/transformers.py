"""Overrides of tokenizers whose encoder and decoder are transformers, for runs in seconds."""

from __future__ import annotations

from typing import Any

SMALL = {"patch_size": 8, "width": 16, "depth": 2, "num_heads": 2}
"""Of each half."""


def of_transformers(toy: dict[str, Any], **further: Any) -> dict[str, Any]:
    """A toy run's overrides without those of convolutions, with small transformers and with what both halves have."""
    kept = {key: value for key, value in toy.items() if not key.startswith(("network_def#encoder", "network_def#deco"))}
    sizes = {**SMALL, **further}
    return kept | {f"network_def#{half}#{key}": sizes[key] for half in ("encoder", "decoder") for key in sizes}
