"""The options of ``vaevq-med feature-codebook``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vaevq_med.core.declared import option


@dataclass(frozen=True, kw_only=True)
class CodebookOptions:
    """How features of images are clustered."""

    num_embeddings: int = option(help="K, codewords in all.")
    network: str = option("efficientnet-lite0", "Feature network, see docs/feature_networks.md.")
    weights: Path | None = option(None, "File of its weights, where not in a usual place.")
    grid: int = option(8, "Features of an image along each axis.")
    image_size: int = option(256, "Pixels that images are resized and cropped to.")
    per_class: bool = option(True, "Cluster the images of each contrast or class apart.")
    max_items: int | None = option(None, "Look at this many images, evenly spaced.")
    batch_size: int = option(32, "Images at once.")
    workers: int | None = option(None, "Processes that read images; by default one a core.")
    overwrite: bool = option(False, "Replace OUTPUT.")
    seed: int = option(0, "Seed of the images' order and of the clusters' start.")
    device: str | None = option(None, "By default the GPU, where there is one.")
