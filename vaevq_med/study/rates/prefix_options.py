"""The options of ``vaevq-med prefixes``, which load nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vaevq_med.core.declared import Declared, option
from vaevq_med.core.errors import VaevqMedError


@dataclass(frozen=True, kw_only=True)
class PrefixOptions(Declared):
    """How the first parts of codes are judged."""

    split: Literal["validation", "test"] = option("test", "Images that are decoded.")
    max_items: int = option(500, "Images at most, evenly spaced.")
    points: int = option(12, "Numbers of parts that are kept, evenly spaced on a log scale, all of them where fewer.")
    weights: Literal["ema", "network"] = option("ema", "The averaged weights, or the last.")
    batch_size: int = option(32, "Images that go through a tokenizer at once.")
    device: str | None = option(None, "By default the GPU, where there is one.")
    any_shape: bool = option(False, "Take images that are not brought to squares as in training.")

    def check(self) -> None:
        """Refuse what nothing could be judged with.

        Raises:
            VaevqMedError: naming the option.
        """
        for name in ("max_items", "points", "batch_size"):
            if getattr(self, name) < 1:
                raise VaevqMedError(f"--{name.replace('_', '-')}: found {getattr(self, name)}, expected 1 or more")
