"""Folders of ``medtokenizers``, as its ``save_pretrained`` leaves them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vaevq_med.foreign.adapted import adapted, held
from vaevq_med.foreign.base import AdapterOptions, Adopted, Kind, LatentOptions
from vaevq_med.foreign.errors import ForeignError
from vaevq_med.foreign.folders import plain, read_json, weights_in
from vaevq_med.foreign.weights import Tensors

_SIZES = {"VQ": "num_embeddings", "LFQ": "codebook_size"}


class _Folder(Kind):
    """A folder with ``config.json`` and ``pytorch_model.bin``."""

    source = "a folder with config.json and pytorch_model.bin (save_pretrained)"
    license = "code MIT; see the model's card for the weights"

    def opened(self, source: Path, entry: str) -> tuple[dict[str, Any], Tensors, tuple[Path, ...]]:
        """The configuration, the tensors and the files.

        Raises:
            ForeignError: it is another network's, whose configuration lacks an entry.
        """
        path = source / "config.json"
        config = read_json(path)
        if entry not in config:
            raise ForeignError(f"{path}: found no {entry!r}, expected the configuration of {self.title}")
        weights = weights_in(source, ("pytorch_model.bin",))
        return plain(config, config, path), Tensors.read(weights, self.title), (path, weights)


class MedTokenizersIndices(_Folder):
    """Of ``DiscreteTokenizer``."""

    name = "medtokenizers-discrete"
    title = "DiscreteTokenizer of medtokenizers"
    options = AdapterOptions

    def read(self, source: Path, options: AdapterOptions) -> Adopted:
        """Read a folder.

        Raises:
            ForeignError: it is another network's, or has several indices a position.
        """
        config, tensors, files = self.opened(source, "quantizer")
        if config["quantizer"] == "RESFSQ" and config.get("num_codebooks", 1) != 1:
            raise ForeignError(f"{files[0]}: found {config['num_codebooks']} indices a position, expected 1")
        size = config.get(_SIZES.get(config["quantizer"], ""), None) or math.prod(config.get("levels") or ())
        return adapted(
            "medtokenizers.MedTokenizerIndices",
            {"config": config},
            held(tensors),
            options,
            own_channels=int(config.get("in_channels", 1)),
            image_size=int(config.get("resolution", 256)),
            files=files,
            quantizer={"_target_": "vaevq_med.networks.quantizers.levels.LevelQuantizer", "levels": [int(size)]},
        )


@dataclass(frozen=True, kw_only=True)
class MedTokenizersOptions(AdapterOptions, LatentOptions):
    """Of a continuous one."""


class MedTokenizersLatent(_Folder):
    """Of ``ContinuousTokenizer``."""

    name = "medtokenizers-continuous"
    title = "ContinuousTokenizer of medtokenizers"
    options = MedTokenizersOptions

    def read(self, source: Path, options: MedTokenizersOptions) -> Adopted:
        """Read a folder.

        Raises:
            ForeignError: it is another network's.
        """
        config, tensors, files = self.opened(source, "formulation")
        return adapted(
            "medtokenizers.MedTokenizerLatent",
            {"config": config},
            held(tensors),
            options,
            own_channels=int(config.get("in_channels", 1)),
            image_size=int(config.get("resolution", 256)),
            files=files,
            latent_channels=int(config.get("latent_channels", 4)),
        )
