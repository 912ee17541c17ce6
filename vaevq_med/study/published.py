"""Figures that the paper states, to stand beside measured ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("published.json")


@dataclass(frozen=True)
class Published:
    """What the paper says of one data set.

    Attributes:
        source: where the figures are from, and what they are.
        figures: method to metric to its figure, as printed.
        notes: what else a reader has to know.
    """

    source: str
    figures: Mapping[str, Mapping[str, str]]
    notes: tuple[str, ...]

    def metrics(self, methods: list[str]) -> list[str]:
        """The metrics that at least one of the methods has a figure of, in the file's order."""
        found = [metric for method in methods for metric in self.figures.get(method, {})]
        return [metric for metric in ("psnr", "ssim", "rfid", "utilization", "gfid") if metric in found]


def load_published(bundle: str, table: str = "reconstruction") -> Published:
    """The paper's figures for a bundle's data; none for a bundle of another name.

    Args:
        bundle: name of the bundle, ``brats`` or ``imagenet``.
        table: ``reconstruction``, or ``generation`` for generators over a method's tokens.
    """
    content: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))[table]
    data = content["bundles"].get(bundle, {"figures": {}, "notes": []})
    return Published(content["source"], data["figures"], tuple(data["notes"]))
