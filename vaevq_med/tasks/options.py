"""The options of ``vaevq-med segment``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vaevq_med.codec.options import Machine
from vaevq_med.core.declared import option


@dataclass(frozen=True, kw_only=True)
class SegmentOptions(Machine):
    """How scans are segmented."""

    checkpoint: Path = option(
        help="Checkpoint of a trained segmentation network, of bundles/segmentation, or a packed bundle."
    )
    recipe: str = option(
        "brats24/axial_256", "As in slice-extract: what becomes black and white. One that resamples is refused."
    )
    labels: str = option(
        "brats2024", "Label map that is written: brats2021, brats2024, brats2024-ped or decathlon.", metavar="NAME"
    )
    label_map: str | None = option(
        None, "What the values of the cases' own segmentations mean, where their names tell it wrongly."
    )
    cases: Path | None = option(None, "CSV case,[patient,]t1n,t1c,t2w,t2f[,seg,label_map] of paths, for other layouts.")
    assume_orientation: str | None = option(
        None, "Where the voxels' axes point to in files whose headers do not say it, e.g. RAS or LPS."
    )
    accept: list[str] | None = option(
        None, "Go on although much is lost by background, clipping or saturation.", metavar="LOSS"
    )
    weights: Literal["ema", "network"] = option("ema", "The averaged weights, or the last.")
