"""The options of ``vaevq-med probe``, which load nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vaevq_med.core.declared import Declared, option
from vaevq_med.core.errors import VaevqMedError


@dataclass(frozen=True, kw_only=True)
class ProbeOptions(Declared):
    """How a tokenizer's codes are probed."""

    split: Literal["validation", "test"] = option("test", "Images that the heads are judged on.")
    max_items: int = option(2000, "Images of each split, evenly spaced.")
    max_positions: int = option(20000, "Positions of the grid of each split, drawn from the brain.")
    seed: int = option(0, "Of the positions and of the heads.")
    weights: Literal["ema", "network"] = option("ema", "The averaged weights, or the last.")
    readout: str | None = option(None, "Of a quantizer with several: hard.")
    batch_size: int = option(32, "Images that go through the tokenizer at once.")
    device: str | None = option(None, "By default the GPU, where there is one.")
    any_shape: bool = option(False, "Take images that are not brought to squares as in training.")

    def check(self) -> None:
        """Refuse what nothing could be probed with.

        Raises:
            VaevqMedError: naming the option.
        """
        for name in ("max_items", "max_positions", "batch_size"):
            if getattr(self, name) < 1:
                raise VaevqMedError(f"--{name.replace('_', '-')}: found {getattr(self, name)}, expected 1 or more")
        if not 0 <= self.seed < 2**32:
            raise VaevqMedError(f"--seed: found {self.seed}, expected 0 to {2**32 - 1}")
