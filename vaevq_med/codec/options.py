"""The options of ``vaevq-med compress``, ``decompress``, ``reconstruct`` and ``index-model``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vaevq_med.core.declared import Declared, option
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.jobs import check_workers

DEFAULT_CODER = "adaptive"
"""The best one that needs no file of its own."""


@dataclass(frozen=True, kw_only=True)
class Machine(Declared):
    """Where and how the network runs; none of it changes a byte on a CPU but ``batch_size``, by rounding."""

    workers: int | None = option(None, "Cores to use; by default all. They share cases, or the slices of one case.")
    batch_size: int = option(2, "Slices that go through the network at once; volumes go by windows of their own.")
    device: str | None = option(None, "By default the GPU, where there is one.")

    def check(self) -> None:
        """Refuse what nothing could be computed with.

        Raises:
            VaevqMedError: naming the option.
        """
        check_workers(self.workers)
        if self.batch_size < 1:
            raise VaevqMedError(f"--batch-size: found {self.batch_size}, expected 1 or more")


@dataclass(frozen=True, kw_only=True)
class DecompressOptions(Machine):
    """How files are decompressed."""

    checkpoint: Path | None = option(
        None, "The tokenizer that the files were made with; by default a file of its name beside them."
    )
    model: Path | None = option(None, "File of the entropy coder's model, where one was used.")


@dataclass(frozen=True, kw_only=True)
class CompressOptions(Machine):
    """How volumes are compressed."""

    checkpoint: Path = option(help="Checkpoint of a trained tokenizer, or a packed bundle.")
    coder: str = option(
        DEFAULT_CODER, "Entropy coder: fixed, adaptive, or, with --model, context or prior.", metavar="NAME"
    )
    model: Path | None = option(
        None, "File of the entropy coder's model: a context model, or a generator's checkpoint."
    )
    recipe: str = option(
        "brats24/axial_256", "As in slice-extract; its size becomes the tokenizer's. One that resamples is refused."
    )
    modality: list[str] | None = option(
        None, "Contrast of a single volume, or those of each case; repeat. By default from names, or the recipe's."
    )
    cases: Path | None = option(None, "CSV case,t1n,t1c,t2w,t2f of paths, for other layouts.")
    series: list[str] | None = option(
        None,
        "Which DICOM series is a contrast, by its description or number; repeat. By default by the usual words.",
        metavar="CONTRAST=PATTERN",
    )
    any_contrast: bool = option(False, "Take contrasts that the tokenizer was not trained for.")
    assume_orientation: str | None = option(
        None, "Where the voxels' axes point to in files whose headers do not say it, e.g. RAS or LPS."
    )
    accept: list[str] | None = option(
        None, "Go on although much is lost by background, clipping or saturation.", metavar="LOSS"
    )
    rate_weight: float = option(
        0.0, "Squared distance in the latent that a bit is worth: above 0, fewer bytes and a coarser image."
    )
    mask: Literal["exact", "coarse"] = option(
        "exact",
        "coarse: at half the resolution, for fewer bytes; of the background, voxels beside the foreground are then "
        "what the tokenizer draws there.",
    )
    codebooks: int | None = option(
        None, "Of a residual, nested or two-level quantizer, code the first so many codebooks; by default all."
    )
    weights: Literal["ema", "network"] = option("ema", "The averaged weights, or the last.")
    readout: str | None = option(None, "Of a quantizer with several: soft or hard.")

    def check(self) -> None:
        """Refuse what nothing could be computed with.

        Raises:
            VaevqMedError: naming the option.
        """
        super().check()
        if not 0 <= self.rate_weight < float("inf"):
            raise VaevqMedError(f"--rate-weight: found {self.rate_weight}, expected 0 or more")


@dataclass(frozen=True, kw_only=True)
class IndexModelOptions(Declared):
    """How a context model is trained."""

    hidden: int = option(256, "Units of each of the two hidden layers.")
    width: int = option(16, "Channels of a symbol's embedding.")
    epochs: float = option(4.0, "Times that every position is seen.")
    batch_size: int = option(2048, "Positions in a step.")
    learning_rate: float = option(3e-3, "At its highest.")
    dropout: float = option(0.0, "Share of hidden units dropped.")
    seed: int = option(0, "Of the start and of the order.")
    weights: Literal["ema", "network"] = option("ema", "The tokenizer's averaged weights, or the last.")
    readout: str | None = option(None, "Of a quantizer with several: soft or hard.")
    overwrite: bool = option(False, "Replace OUTPUT, if it is there.")

    def check(self) -> None:
        """Refuse what no model could be trained with.

        Raises:
            VaevqMedError: naming the option.
        """
        whole = {"hidden": (self.hidden, 4096), "width": (self.width, 128), "batch-size": (self.batch_size, 2**20)}
        for name, (value, most) in whole.items():
            if not 1 <= value <= most:
                raise VaevqMedError(f"--{name}: found {value}, expected 1 to {most}")
        if not (self.epochs > 0 and self.learning_rate > 0):
            raise VaevqMedError(
                f"--epochs, --learning-rate: found {self.epochs}, {self.learning_rate}, expected both above 0"
            )
        if not 0 <= self.dropout < 1:
            raise VaevqMedError(f"--dropout: found {self.dropout}, expected 0 to below 1")
