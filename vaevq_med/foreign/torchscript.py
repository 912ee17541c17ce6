"""Pairs of TorchScript programs, such as the image tokenizers of Cosmos (arXiv 2501.03575)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vaevq_med.core.declared import option
from vaevq_med.foreign.adapted import adapted
from vaevq_med.foreign.base import AdapterOptions, Adopted, Kind, LatentOptions
from vaevq_med.foreign.errors import ForeignError
from vaevq_med.networks.adapters.torchscript import check_trusted, load_program

_NAMES = ("encoder", "decoder")


@dataclass(frozen=True, kw_only=True)
class TorchScriptOptions(AdapterOptions, LatentOptions):
    """Of a pair.

    Attributes:
        levels: of the digits of an index.
        own_channels: of the pair's images.
    """

    levels: str = option(
        "",
        "Of a pair with indices: values of each digit of one, e.g. 8,8,8,5,5,5 of Cosmos; K alone for any other.",
        metavar="L,L,...",
    )
    own_channels: int = option(3, "Image channels of the pair.", min=1)


class TorchScriptFolder(Kind):
    """A folder with ``encoder.jit`` and ``decoder.jit``."""

    name = "torchscript"
    title = "TorchScript encoder and decoder, as Cosmos publishes them"
    source = "a folder with encoder.jit and decoder.jit, whose code runs: vaevq-med --trusted torchscript adopt ..."
    license = "see the model's card (NVIDIA Open Model License of Cosmos)"
    options = TorchScriptOptions

    def read(self, source: Path, options: TorchScriptOptions) -> Adopted:
        """Load both, and ask the encoder for a blank image.

        Raises:
            VaevqMedError: TorchScript is not trusted, a program is missing or damaged, or the levels do not fit.
        """
        paths = tuple(source / f"{name}.jit" for name in _NAMES)
        for path in paths:
            if not path.is_file():
                raise ForeignError(f"{path}: found no file, expected a TorchScript program")
        check_trusted()
        programs = [_loaded(path) for path in paths]
        size = options.image_size or 256
        try:
            with torch.inference_mode():
                found = programs[0](torch.zeros(1, options.own_channels, size, size))
        except Exception as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise ForeignError(
                f"{paths[0]}: found a program that takes no image of {options.own_channels} channels and {size} pixels "
                f"({line}), expected one that does"
            ) from None
        found = found[0] if isinstance(found, tuple | list) else found
        has_indices = isinstance(found, Tensor) and not found.is_floating_point()
        if not isinstance(found, Tensor) or found.ndim != (3 if has_indices else 4):
            raise ForeignError(
                f"{paths[0]}: found an encoder of something else, expected indices [B, h, w] or a latent"
            )
        if has_indices != bool(options.levels):
            what = "indices, without --levels" if has_indices else "a latent, with --levels"
            raise ForeignError(f"{paths[0]}: found an encoder that gives {what}; expected levels for indices alone")
        archives = {f"{name}_archive": _bytes(path) for name, path in zip(_NAMES, paths, strict=True)}
        arguments: dict[str, Any] = {
            "factors": [size // int(length) for length in found.shape[-2:]],
            "own_channels": options.own_channels,
            "encoder_bytes": len(archives["encoder_archive"]),
            "decoder_bytes": len(archives["decoder_archive"]),
            "gives_indices": has_indices,
        }
        levels = {"_target_": "vaevq_med.networks.quantizers.levels.LevelQuantizer", "levels": _levels(options.levels)}
        return adapted(
            "torchscript.TorchScriptPair",
            arguments,
            archives,
            options,
            own_channels=options.own_channels,
            image_size=256,
            files=paths,
            quantizer=levels if has_indices else None,
            latent_channels=None if has_indices else int(found.shape[1]),
        )


def _levels(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ForeignError(f"--levels: found {text!r}, expected whole numbers, e.g. 8,8,8,5,5,5") from None


def _loaded(path: Path) -> Any:
    try:
        return load_program(str(path))
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ForeignError(f"{path}: found no TorchScript program ({line[:120]}), expected one") from None


def _bytes(path: Path) -> Tensor:
    return torch.from_numpy(np.frombuffer(path.read_bytes(), dtype=np.uint8).copy())
