"""Folders of ``diffusers``: ``VQModel`` and ``AutoencoderKL``, as ``save_pretrained`` leaves them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vaevq_med.foreign.adapted import adapted, codebook_of, held
from vaevq_med.foreign.base import AdapterOptions, Adopted, Kind, LatentOptions
from vaevq_med.foreign.errors import ForeignError
from vaevq_med.foreign.folders import plain, read_json, weights_in
from vaevq_med.foreign.weights import Tensors

_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


class _Folder(Kind):
    """A folder with ``config.json`` of a class."""

    source = "a folder with config.json and diffusion_pytorch_model.safetensors"
    license = "diffusers Apache-2.0; see the model's card for the weights"
    class_name: ClassVar[str]

    def opened(self, source: Path) -> tuple[dict[str, Any], Tensors, tuple[Path, ...]]:
        """The configuration, the tensors and the files.

        Raises:
            ForeignError: the folder is another class's.
        """
        if not source.is_dir():
            raise ForeignError(f"{source}: found no folder, expected {self.source}")
        path = source / "config.json"
        config = read_json(path)
        found = config.get("_class_name")
        if found != self.class_name:
            raise ForeignError(
                f"{path}: found the class {found}, expected {self.class_name}; adopt --list names the kinds"
            )
        weights = weights_in(source, _WEIGHTS)
        return plain(config, config, path), Tensors.read(weights, f"{self.class_name} of diffusers"), (path, weights)


class DiffusersVQFolder(_Folder):
    """Of ``VQModel``."""

    name = "diffusers-vq"
    title = "VQModel of diffusers"
    class_name = "VQModel"
    options = AdapterOptions

    def read(self, source: Path, options: AdapterOptions) -> Adopted:
        """Read a folder.

        Raises:
            ForeignError: it is another network's.
        """
        config, tensors, files = self.opened(source)
        return adapted(
            "diffusers_vq.DiffusersVQ",
            {"config": config},
            held(tensors, "quantize.embedding.weight", ("quantize.",)),
            options,
            own_channels=int(config.get("in_channels", 3)),
            image_size=256,
            files=files,
            quantizer=codebook_of(tensors, "quantize.embedding.weight"),
        )


@dataclass(frozen=True, kw_only=True)
class KLFolderOptions(AdapterOptions, LatentOptions):
    """Of a continuous one."""


class DiffusersKLFolder(_Folder):
    """Of ``AutoencoderKL``."""

    name = "diffusers-kl"
    title = "AutoencoderKL of diffusers"
    class_name = "AutoencoderKL"
    options = KLFolderOptions

    def read(self, source: Path, options: KLFolderOptions) -> Adopted:
        """Read a folder.

        Raises:
            ForeignError: it is another network's.
        """
        config, tensors, files = self.opened(source)
        return adapted(
            "diffusers_kl.DiffusersKL",
            {"config": config},
            held(tensors),
            options,
            own_channels=int(config.get("in_channels", 3)),
            image_size=256,
            files=files,
            latent_channels=int(config.get("latent_channels", 4)),
        )
