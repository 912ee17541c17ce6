"""The options of ``vaevq-med encode-tokens`` that a comparison may choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from vaevq_med.core.declared import Declared, option
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.jobs import check_workers

Split = Literal["training", "validation", "test"]


@dataclass(frozen=True, kw_only=True)
class EncodeOptions(Declared):
    """How the images of a data set are encoded."""

    split: list[Split] | None = option(None, "Repeat for several; by default all with images.")
    flip: bool = option(True, "Training images in mirror image too.")
    ten_crop: bool = option(False, "Five crops of training images at 1.1 and 1.05 times the size.")
    weights: Literal["ema", "network"] = option("ema", "The averaged weights, or the last.")
    readout: str | None = option(None, "Of a quantizer with several: soft or hard.")
    dtype: Literal["float16", "float32"] | None = option(None, "Of latents: float16 is the default.")
    batch_size: int = option(64, "Views that go through the tokenizer at once.")
    workers: int | None = option(None, "Processes that read images; by default one a core.")
    device: str | None = option(None, "By default the GPU, where there is one.")
    any_shape: bool = option(False, "Take images that are not brought to squares as in training.")

    def check(self) -> None:
        """Refuse what no data set could be encoded with.

        Raises:
            VaevqMedError: naming the option.
        """
        check_workers(self.workers, least=0)
        if self.batch_size < 1:
            raise VaevqMedError(f"--batch-size: found {self.batch_size}, expected 1 or more")
        unknown = [split for split in self.split or () if split not in get_args(Split)]
        if unknown:
            raise VaevqMedError(f"--split: found {unknown[0]!r}, expected one of {', '.join(get_args(Split))}")
