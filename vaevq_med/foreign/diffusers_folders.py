"""Folders of ``diffusers``: ``VQModel`` and ``AutoencoderKL``, as ``save_pretrained`` leaves them."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vaevq_med.foreign.adapted import adapted, codebook_of, held
from vaevq_med.foreign.base import AdapterOptions, Adopted, Kind, LatentOptions
from vaevq_med.foreign.errors import ForeignError
from vaevq_med.foreign.folders import plain, read_json, weights_in
from vaevq_med.foreign.weights import Tensors
from vaevq_med.networks.adapters.base import needed

_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Of attention, in files of older versions of diffusers, such as the autoencoders of Stable Diffusion."""
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


class _Folder(Kind):
    """A folder with ``config.json`` of a class."""

    source = "a folder with config.json and diffusion_pytorch_model.safetensors"
    license = "diffusers Apache-2.0; see the model's card for the weights"
    class_name: ClassVar[str]
    target: ClassVar[str]
    codebook: ClassVar[str] = ""
    spare: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def latent(self, tensors: Tensors, config: Mapping[str, Any]) -> dict[str, Any]:
        """What :func:`adapted` is told of the latent."""

    def read(self, source: Path, options: AdapterOptions) -> Adopted:
        """Read a folder.

        Raises:
            ForeignError: it is another network's.
        """
        config, tensors, files, notes = self.opened(source)
        return adapted(
            self.target,
            {"config": config},
            held(tensors, self.codebook, self.spare),
            options,
            own_channels=int(config.get("in_channels", 3)),
            image_size=256,
            files=files,
            notes=notes,
            **self.latent(tensors, config),
        )

    def opened(self, source: Path) -> tuple[dict[str, Any], Tensors, tuple[Path, ...], tuple[str, ...]]:
        """The configuration, the tensors, the files, and what the user has to be told.

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
        tensors = _renamed(Tensors.read(weights, f"{self.class_name} of diffusers"))
        arguments, unknown = self._arguments(plain(config, config, path))
        told = f"{path.name}: {', '.join(unknown)} ignored, as the installed {self.class_name} has no such argument"
        return arguments, tensors, (path, weights), (told,) if unknown else ()

    def _arguments(self, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Those that the installed class has, and the names of others, which ``from_pretrained`` ignores too."""
        known = inspect.signature(getattr(needed("diffusers", "diffusers"), self.class_name).__init__).parameters
        return {key: value for key, value in config.items() if key in known}, sorted(config.keys() - known.keys())


def _renamed(tensors: Tensors) -> Tensors:
    """With today's names of attention, and its layers' weights as matrices, which 1x1 convolutions may stand for."""
    renamed = tensors.renamed((rf"(attentions\.\d+)\.{old}\.", rf"\1.{new}.") for old, new in _OLD_NAMES.items())
    layers = tuple(f".{name}.weight" for name in _OLD_NAMES.values())
    convolutions = [
        name
        for name in renamed.names()
        if ".attentions." in name and name.endswith(layers) and renamed.shape(name)[2:] == (1, 1)
    ]
    if not convolutions:
        return renamed
    return renamed.with_tensors({name: renamed.take(name).flatten(1) for name in convolutions})


class DiffusersVQFolder(_Folder):
    """Of ``VQModel``."""

    name = "diffusers-vq"
    title = "VQModel of diffusers"
    class_name = "VQModel"
    target = "diffusers_vq.DiffusersVQ"
    options = AdapterOptions
    codebook = "quantize.embedding.weight"
    spare = ("quantize.",)

    def latent(self, tensors: Tensors, config: Mapping[str, Any]) -> dict[str, Any]:
        """Its codebook."""
        return {"quantizer": codebook_of(tensors, self.codebook)}


@dataclass(frozen=True, kw_only=True)
class KLFolderOptions(AdapterOptions, LatentOptions):
    """Of a continuous one."""


class DiffusersKLFolder(_Folder):
    """Of ``AutoencoderKL``."""

    name = "diffusers-kl"
    title = "AutoencoderKL of diffusers"
    class_name = "AutoencoderKL"
    target = "diffusers_kl.DiffusersKL"
    options = KLFolderOptions

    def latent(self, tensors: Tensors, config: Mapping[str, Any]) -> dict[str, Any]:
        """Its channels."""
        return {"latent_channels": int(config.get("latent_channels", 4))}
