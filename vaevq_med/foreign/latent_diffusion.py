"""The continuous autoencoder of latent-diffusion (arXiv 2112.10752) and MedVAE's (2502.14753), the same network.

VQGAN's network whose encoder gives means and log variances. Stable Diffusion's original files have it under
``first_stage_model``; MedVAE's checkpoints, in two and in three dimensions, beside a projection of the latent that
takes no part in decoding. Two of MedVAE's hold low-rank adapters (LoRA) beside their convolutions, which are added up.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vaevq_med.core.declared import option
from vaevq_med.foreign.base import Adopted, AdoptOptions, Kind, LatentOptions
from vaevq_med.foreign.converted import adopted, convolutions
from vaevq_med.foreign.errors import ForeignError
from vaevq_med.foreign.taming import SPARE
from vaevq_med.foreign.vqgan import read_halves
from vaevq_med.foreign.weights import Tensors

_PREFIXES = ("first_stage_model.", "model.")


@dataclass(frozen=True, kw_only=True)
class KLOptions(AdoptOptions, LatentOptions):
    """Of the autoencoder.

    Attributes:
        depth: slices of an item.
    """

    depth: int | None = option(None, "Slices that a network of volumes is given at once.", min=1)


def with_adapters_added(tensors: Tensors) -> Tensors:
    """Convolutions with low-rank adapters of scale 1 (``conv``, ``lora_down``, ``lora_up``) as plain ones.

    Raises:
        ForeignError: a part of one is missing.
    """
    found: dict[str, Tensor] = {}
    for name in [name for name in tensors.names() if name.endswith(".lora_down.weight")]:
        base = name.removesuffix(".lora_down.weight")
        down, up = tensors.take(name), tensors.take(f"{base}.lora_up.weight")
        change = torch.einsum("or,ri...->oi...", up.flatten(1), down)
        found[f"{base}.weight"] = tensors.take(f"{base}.conv.weight") + change
        found[f"{base}.bias"] = tensors.take(f"{base}.conv.bias")
    parts = tuple(f"{name.rpartition('.')[0]}.{part}." for name in found for part in ("conv", "lora_down", "lora_up"))
    return tensors.with_tensors(found, without=parts) if found else tensors


class LatentDiffusionKL(Kind):
    """``AutoencoderKL`` of latent-diffusion."""

    name = "ldm-kl"
    title = "AutoencoderKL of latent-diffusion (original Stable Diffusion files, MedVAE)"
    source = "a checkpoint (.ckpt, .pt, .safetensors)"
    license = "latent-diffusion MIT, Stable Diffusion's weights CreativeML OpenRAIL-M, MedVAE MIT"
    options = KLOptions

    def read(self, source: Path, options: KLOptions) -> Adopted:
        """Read a checkpoint.

        Raises:
            ForeignError: it is another network's, or one that was adapted with LoRA.
        """
        tensors = Tensors.read(source, f"{self.title} (encoder, decoder, quant_conv)")
        prefix = next((p for p in _PREFIXES if f"{p}encoder.conv_in.weight" in tensors), "")
        tensors = tensors.below(prefix) if prefix else tensors
        tensors = with_adapters_added(tensors)
        halves = read_halves(tensors)
        doubled = tensors.shape("quant_conv.weight")[0] if "quant_conv.weight" in tensors else halves.latent
        width = tensors.shape("post_quant_conv.weight")[1] if "post_quant_conv.weight" in tensors else halves.codes
        if doubled != 2 * width:
            raise ForeignError(
                f"{source}: found {doubled} channels before the latent and {width} after it, expected twice as many: "
                "means and log variances"
            )
        state = {**halves.state, **convolutions(tensors, halves)}
        tensors.check_all_taken((*SPARE, "channel_ds.", "channel_proj.", "logvar"))
        return adopted(
            source,
            options,
            halves,
            state,
            {},
            embedding_dim=width,
            image_size=256,
            variational=True,
            latent_channels=width,
            depth=options.depth,
        )
