"""A disk that is full for chosen files: what is written to them goes to ``/dev/full``, which takes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def fill(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """From now on, no file of one of these names, nor its temporary file, can be written."""
    opened = Path.open

    def open_or_full(self: Path, mode: str = "r", *arguments: Any, **settings: Any) -> Any:
        full = set(mode) & set("wa+") and any(self.name in (name, f".{name}.part") for name in names)
        return opened(Path("/dev/full") if full else self, mode, *arguments, **settings)

    monkeypatch.setattr(Path, "open", open_or_full)
