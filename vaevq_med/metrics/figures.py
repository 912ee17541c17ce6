"""What is known of each figure that a table shows: its title, its digits, and which way is better.

A figure stands here once; tables, tests of significance and arrows follow from it. An evaluation's record carries the
figures of its metrics, so that a table shows those of metrics from outside of the package too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vaevq_med.core.errors import VaevqMedError


@dataclass(frozen=True)
class Figure:
    """A quantity that is reported.

    Attributes:
        name: in records, e.g. ``psnr``; letters, digits and ``_``.
        title: in tables, with its unit.
        digits: shown after the point.
        scale: shown is the value times this, e.g. 100 for a share as a percentage.
        higher_is_better: None where neither way is.
        varies: whether it differs between seeds.
        convention: how it is computed, in words.

    Raises:
        VaevqMedError: the name has something else in it.
    """

    name: str
    title: str
    digits: int = 4
    scale: float = 1.0
    higher_is_better: bool | None = None
    varies: bool = True
    convention: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-zA-Z]\w*", self.name, flags=re.ASCII):
            raise VaevqMedError(f"figure {self.name!r}: found such a name, expected letters, digits and '_'")

    def show(self, value: float) -> str:
        """A value for a reader."""
        return f"{value * self.scale:,.{self.digits}f}"

    def to_json(self) -> dict[str, Any]:
        """What a record holds of it."""
        return asdict(self)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Figure:
        """From a record; what a later version may have added is left out."""
        return cls(**{name: value for name, value in record.items() if name in cls.__dataclass_fields__})


PSNR = Figure(
    "psnr",
    "PSNR (dB)",
    2,
    higher_is_better=True,
    convention="dB, range 1, mean over images of each image's own value, at most 100",
)
SSIM = Figure(
    "ssim",
    "SSIM",
    4,
    higher_is_better=True,
    convention="Gaussian window 11, sigma 1.5, range 1, mirrored at the border, mean over pixels and images",
)
INTER_SLICE_ERROR = Figure(
    "inter_slice_error",
    "Inter-slice error",
    5,
    higher_is_better=False,
    convention="mean over pairs of neighboring slices of |(x[n+1] - x[n]) - (y[n+1] - y[n])| over what is not black "
    "in either original, range 1",
)
LPIPS = Figure("lpips", "LPIPS", 4, higher_is_better=False)
RFID = Figure("rfid", "rFID", 2, higher_is_better=False)
UTILIZATION = Figure(
    "utilization",
    "Utilization (%)",
    1,
    100,
    higher_is_better=True,
    convention="share of the K codewords used at least once over the split",
)
PERPLEXITY = Figure(
    "perplexity",
    "Perplexity",
    0,
    higher_is_better=True,
    convention="exp of the entropy of the codewords' frequencies over the split",
)
ACTIVE_CHANNELS = Figure(
    "active_channels",
    "Active channels",
    0,
    convention="channels whose posterior mean has a variance above 0.01 over images and positions (arXiv 1509.00519)",
)
ACTIVE_CHANNELS_RELATIVE = Figure(
    "active_channels_relative",
    "Active channels (relative)",
    0,
    convention="channels whose posterior mean has more than 0.01 of the aggregate posterior's variance; of a latent "
    "without a posterior, channels whose variance over images and positions, before it is quantized, is above 0.01 of "
    "the mean over channels",
)
BITS_PER_POSITION = Figure("bits_per_position", "Bits per position", 2, varies=False)
MEAN_BITS = Figure(
    "mean_bits",
    "Mean bits per position",
    2,
    convention="of a rate that differs from position to position: log2 K bits of each code that is there, and the "
    "entropy of whether the fine ones are, over the split",
)
MEAN_CODES = Figure("mean_codes", "Codes per position", 2, convention="codes that are there, a mean over the split")
BITS_PER_PIXEL = Figure("bits_per_pixel", "Bits per pixel", 3, varies=False)
HELD_OUT_BITS = Figure(
    "held_out_bits",
    "Bits per token",
    3,
    convention="-log2 p of a token of the test split, of the weights that draw; an upper bound of it where the "
    "generator is a diffusion model of tokens; of one tokenizer's tokens alone comparable",
)
TOKEN_BITS = Figure(
    "token_bits",
    "Bits per token (validation)",
    3,
    convention="-log2 p of a token of the validation split, or an upper bound, of the averaged weights, the least of "
    "all epochs, where best.pt is selected: not held-out data",
)
NETWORK_CALLS = Figure(
    "network_calls",
    "Network calls",
    0,
    convention="passes through the generator that an image takes, one of twice the batch under guidance",
    varies=False,
)
SECONDS_PER_IMAGE = Figure(
    "seconds_per_image",
    "Seconds an image",
    3,
    convention="of drawing and decoding, by the clock, in batches; of one machine alone comparable",
)
PARAMETERS = Figure("parameters", "Parameters (M)", 2, 1e-6, varies=False)
IMAGES_PER_SECOND = Figure("images_per_second", "Training images/s", 1)
PEAK_MEMORY = Figure("peak_memory_bytes", "Peak memory (GB)", 2, 1e-9)
GFID = Figure("gfid", "gFID", 2, higher_is_better=False)
PRECISION = Figure("precision", "Precision", 3, higher_is_better=True)
RECALL = Figure("recall", "Recall", 3, higher_is_better=True)
INCEPTION_SCORE = Figure("inception_score", "Inception score", 2, higher_is_better=True)
MEMORIZED_FEATURE = Figure("memorized_feature", "Memorized, features (%)", 1, 100)
MEMORIZED_PIXEL = Figure("memorized_pixel", "Memorized, pixels (%)", 1, 100)
COUNT = Figure("n", "N", 0, varies=False)
