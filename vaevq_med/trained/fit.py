"""Whether a generator fits the tokens it is trained on or draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.generators.latent_diffusion import LatentDiffusionUNet
from vaevq_med.networks.generators.llamagen import LlamaGen


def check_fit(network: nn.Module, tokens: Mapping[str, Any], where: str) -> None:
    """Refuse a generator whose sizes are not those of the tokens.

    Args:
        network: a :class:`LlamaGen` or a :class:`LatentDiffusionUNet`.
        tokens: description of the store: ``kind``, ``tokenizer``, ``grid`` and ``label``.
        where: what the description was read from, for the message.

    Raises:
        VaevqMedError: naming the size.
    """
    tokenizer, grid, classes = tokens["tokenizer"], list(tokens["grid"]), len(tokens["label"]["names"])
    if isinstance(network, LlamaGen):
        kind = "indices"
        sizes = {
            "num_embeddings": (tokenizer["num_embeddings"], network.num_embeddings),
            "num_codebooks": (tokenizer["num_codebooks"], network.num_codebooks),
            "grid": (grid, list(network.grid_size)),
        }
    elif isinstance(network, LatentDiffusionUNet):
        kind = "latents"
        sizes = {"embedding_dim": (tokenizer["embedding_dim"], network.in_channels)}
        if any(side % network.downsampling for side in grid):
            raise VaevqMedError(
                f"{where}: found a grid of {grid[0]}x{grid[1]}, expected multiples of {network.downsampling}, as the "
                f"diffusion model halves it; shorten network_def#channel_mult"
            )
    else:
        raise VaevqMedError(f"found a {type(network).__name__}, expected LlamaGen or LatentDiffusionUNet")
    sizes |= {"kind": (tokens["kind"], kind), "num_classes": (classes, network.num_classes)}
    for name, (found, expected) in sizes.items():
        if found != expected:
            raise VaevqMedError(
                f"{where}: found tokens of {name} {found}, expected {name} {expected}, as the generator has"
            )
