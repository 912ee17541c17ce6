"""Which of the generators' bundles an overlay belongs to."""

from __future__ import annotations

import json
from pathlib import Path

from vaevq_med.core.components import resolve
from vaevq_med.networks.generators.base import Generator

_KINDS = {"indices": "autoregressive", "latents": "diffusion"}


def generator_kind(overlay: Path) -> str | None:
    """``autoregressive`` or ``diffusion``, by what the overlay's network is trained on; None without a network."""
    content = json.loads(overlay.read_text())
    target = content.get("network_def#_target_") or content.get("network_def", {}).get("_target_")
    return None if target is None else _KINDS[resolve(target, Generator, own="vaevq_med.networks").kind]
