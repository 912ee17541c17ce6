"""The options of ``vaevq-med evaluate-samples`` that a comparison may choose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from vaevq_med.core.declared import Declared, option
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.jobs import check_workers
from vaevq_med.tokens.options import Split

BITS_NAME = "token_bits.json"
"""What ``vaevq-med token-bits`` writes into the folder of a row of a study."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(Declared):
    """How generated images are measured."""

    split: Split = option("training", "Real images to compare with.")
    modality: list[str] | None = option(None, "Keep this contrast only; repeat for several.")
    feature_network: str = option("efficientnet-lite0", "See docs/feature_networks.md.")
    feature_weights: Path | None = option(None, "File of its weights, where not in a usual place.")
    image_size: int | None = option(None, "Pixels of all images; by default the samples' own.")
    max_items: int | None = option(None, "Look at this many samples, and images of each split, evenly spaced.")
    neighbors: int = option(3, "Neighbor that precision's and recall's manifolds reach to.")
    fid_infinity: bool = option(False, "Extrapolate gFID to infinitely many samples, as another figure.")
    inception_score: bool | None = option(
        None, "By default where the data set has classes and the network a classifier."
    )
    memorization: bool = option(True, "Look for each sample's nearest training image.")
    feature_threshold: float | None = option(None, "Cosine distance that is near; by default by the held-out images.")
    pixel_threshold: float | None = option(None, "RMSE on [0, 1] that is near; by default by the held-out images.")
    cache_dir: Path | None = option(None, "Features of the real images; by default DATASET.features beside DATASET.")
    batch_size: int = option(32, "Images at once.")
    workers: int | None = option(None, "Processes that read images; by default one a core.")
    device: str | None = option(None, "By default the GPU, where there is one.")

    def check(self) -> None:
        """Refuse what no samples could be measured with.

        Raises:
            VaevqMedError: naming the option.
        """
        check_workers(self.workers, least=0)
        if self.split not in get_args(Split):
            raise VaevqMedError(f"--split: found {self.split!r}, expected one of {', '.join(get_args(Split))}")
        counts = {"batch-size": self.batch_size, "neighbors": self.neighbors, "max-items": self.max_items}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise VaevqMedError(f"--{name}: found {value}, expected 1 or more")
        if self.image_size is not None and not 32 <= self.image_size <= 4096:
            raise VaevqMedError(f"--image-size: found {self.image_size}, expected 32 to 4096")
        for name, threshold in (("feature", self.feature_threshold), ("pixel", self.pixel_threshold)):
            if threshold is not None and not self.memorization:
                raise VaevqMedError(f"--{name}-threshold: found it with --no-memorization, expected one of the two")
            if threshold is not None and not 0 < threshold <= 2:
                raise VaevqMedError(f"--{name}-threshold: found {threshold}, expected above 0 and at most 2")
