"""MONAI's ``VQVAE``, ``AutoencoderKL`` and MAISI's: weights, and the configuration that they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vaevq_med.core.declared import option
from vaevq_med.foreign.adapted import adapted, codebook_of, held
from vaevq_med.foreign.base import AdapterOptions, Adopted, Kind, LatentOptions
from vaevq_med.foreign.errors import ForeignError
from vaevq_med.foreign.folders import plain, read_json
from vaevq_med.foreign.weights import Tensors

_PLACES = ("network_def", "autoencoder_def", "vqvae_def", "autoencoder", "stage1_def")
_CODEBOOK = "quantizer.quantizer.embedding.weight"


@dataclass(frozen=True, kw_only=True)
class MonaiOptions(AdapterOptions):
    """Of networks of MONAI.

    Attributes:
        config: the network's arguments.
        config_id: where they are.
    """

    config: Path | None = option(
        None, "JSON file of the network's arguments: they alone, or a MONAI bundle's, which has them under --config-id."
    )
    config_id: str = option("", f"Id of the network in it; by default one of {', '.join(_PLACES)}.")


@dataclass(frozen=True, kw_only=True)
class MonaiLatentOptions(MonaiOptions, LatentOptions):
    """Of continuous ones."""


class _Weights(Kind):
    """Weights with a configuration."""

    source = "a file of weights, with --config"
    license = "MONAI Apache-2.0; see the bundle's LICENSE for the weights"
    class_name: ClassVar[str]
    target: ClassVar[str]

    def read(self, source: Path, options: Any) -> Adopted:
        """Read weights.

        Raises:
            ForeignError: they, or the configuration, are another network's.
        """
        config = self._config(options)
        tensors = Tensors.read(source, f"{self.class_name} of MONAI", ("state_dict", "model", "autoencoder_state_dict"))
        return self.made(config, tensors, options, (source, options.config))

    def made(self, config: dict[str, Any], tensors: Tensors, options: Any, files: tuple[Path, ...]) -> Adopted:
        """The tokenizer of a continuous network."""
        return adapted(
            self.target,
            {"config": config},
            held(tensors),
            options,
            own_channels=int(config.get("in_channels", 1)),
            image_size=256,
            files=files,
            latent_channels=int(config.get("latent_channels", 3)),
        )

    def _config(self, options: MonaiOptions) -> dict[str, Any]:
        if options.config is None:
            raise ForeignError(f"--config: found none, expected the JSON file of the arguments of {self.class_name}")
        content = read_json(options.config)
        places = (options.config_id,) if options.config_id else _PLACES
        where = next((place for place in places if isinstance(content.get(place), dict)), None)
        if options.config_id and where is None:
            raise ForeignError(
                f"{options.config}: found no id {options.config_id!r} of a network, expected its arguments"
            )
        network = content if where is None else content[where]
        target = str(network.get("_target_", self.class_name)).rpartition(".")[2]
        if target != self.class_name:
            raise ForeignError(f"{options.config}: found the class {target}, expected {self.class_name}")
        config = plain(network, content, options.config)
        if not isinstance(config.get("spatial_dims"), int):
            raise ForeignError(
                f"{options.config}: found no number spatial_dims, expected the arguments of {self.class_name}"
            )
        return config


class MonaiVQVAEWeights(_Weights):
    """Of ``VQVAE``."""

    name = "monai-vqvae"
    title = "VQVAE of MONAI"
    class_name = "VQVAE"
    options = MonaiOptions

    def made(self, config: dict[str, Any], tensors: Tensors, options: Any, files: tuple[Path, ...]) -> Adopted:
        """The tokenizer, with its codebook."""
        return adapted(
            "monai_vqvae.MonaiVQVAE",
            {"config": config},
            held(tensors, _CODEBOOK, ("quantizer.",)),
            options,
            own_channels=int(config.get("in_channels", 1)),
            image_size=256,
            files=files,
            quantizer=codebook_of(tensors, _CODEBOOK),
        )


class MonaiKLWeights(_Weights):
    """Of ``AutoencoderKL``."""

    name = "monai-kl"
    title = "AutoencoderKL of MONAI"
    class_name = "AutoencoderKL"
    target = "monai_kl.MonaiKL"
    options = MonaiLatentOptions


class MaisiWeights(_Weights):
    """Of ``AutoencoderKlMaisi``."""

    name = "maisi"
    title = "MAISI's autoencoder (AutoencoderKlMaisi of MONAI)"
    license = "see the bundle's LICENSE (NVIDIA's of MAISI)"
    class_name = "AutoencoderKlMaisi"
    target = "monai_maisi.MonaiMaisi"
    options = MonaiLatentOptions
