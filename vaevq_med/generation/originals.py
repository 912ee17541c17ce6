"""The images that the tokens of a store were encoded from, read as they were then."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vaevq_med.core.errors import DataError
from vaevq_med.images.dataset import SliceDataset
from vaevq_med.images.manifest import load_manifest
from vaevq_med.images.reading import reader
from vaevq_med.tokens.items import describe_items
from vaevq_med.tokens.store import TokenDataset


class Originals:
    """Images of a data set, in the order of a token store's split.

    A store knows what its data set holds but not where it lies, so that the folder has to be named.

    Args:
        dataset_dir: folder of ``dataset.json``.
        tokens: the split.
        image_size: side of the image in pixels.
        in_channels: its channels.

    Attributes:
        content_hash: of the data set.

    Raises:
        DataError: it is another data set than the store's, or lacks an image of it.
    """

    def __init__(self, dataset_dir: str | Path, tokens: TokenDataset, *, image_size: int, in_channels: int) -> None:
        manifest, described = load_manifest(dataset_dir), tokens.store.content["data"]
        self.content_hash = manifest.content_hash
        if self.content_hash != described["content_hash"]:
            raise DataError(
                f"inpaint_images: found the data set {dataset_dir} ({self.content_hash[:19] or 'without a hash'}), "
                f"expected the one that the tokens of {tokens.store.root} were encoded from "
                f"({described['content_hash'][:19] or 'without a hash'})"
            )
        # Stacked contrasts name the channels in their order.
        contrasts = str(tokens.items[0].get("modality", "")).split("+")
        stacked = len(contrasts) > 1
        self._images = SliceDataset(
            dataset_dir=dataset_dir,
            split=tokens.split,
            modalities=contrasts if stacked else None,
            stack_modalities=stacked,
            transform=reader(manifest, image_size=image_size, in_channels=in_channels),
        )
        places = {item["id"]: place for place, item in enumerate(describe_items(self._images, ()))}
        lacking = [str(item["id"]) for item in tokens.items if item["id"] not in places]
        if lacking:
            raise DataError(
                f"inpaint_images: found no {lacking[0]} in {dataset_dir}, expected the images of the tokens"
            )
        self._places = [places[item["id"]] for item in tokens.items]

    def __getitem__(self, number: int) -> Tensor:
        """Image ``number`` of the split, float32 ``[C, S, S]`` in [-1, 1].

        Raises:
            ItemError: a file of it is missing or damaged.
        """
        return torch.from_numpy(np.array(self._images[self._places[number]]["image"], np.float32))
