"""A foreign VQGAN and its relatives as a ``VisualTokenizer``: the same network, its tensors under the names here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vaevq_med.foreign.base import REPEATED, Adopted, AdoptOptions
from vaevq_med.foreign.errors import ForeignError
from vaevq_med.foreign.vqgan import Halves, identity, of_gray
from vaevq_med.foreign.weights import Tensors


def convolutions(tensors: Tensors, halves: Halves) -> dict[str, Tensor]:
    """``quant_conv`` and ``post_quant_conv``; those of a network without them change nothing."""
    found: dict[str, Tensor] = {}
    for name, channels in (("quant_conv", halves.latent), ("post_quant_conv", halves.codes)):
        given = f"{name}.weight" in tensors
        own = identity(channels, halves.spatial_dims)
        found |= {
            f"{name}.{part}": tensors.take(f"{name}.{part}") if given else own[part] for part in ("weight", "bias")
        }
    return found


def adopted(
    path: Path,
    options: AdoptOptions,
    halves: Halves,
    state: Mapping[str, Tensor],
    quantizer: Mapping[str, Any],
    *,
    embedding_dim: int,
    image_size: int,
    variational: bool = False,
    averaged: Mapping[str, Tensor] | None = None,
    **further: Any,
) -> Adopted:
    """The tokenizer.

    Args:
        path: its file.
        options: image size and channels.
        halves: encoder and decoder.
        state: all its tensors.
        quantizer: definition.
        embedding_dim: D.
        image_size: published.
        variational: whether the encoder gives a posterior.
        averaged: all tensors of averaged weights.
        **further: see :class:`Adopted`.

    Raises:
        ForeignError: the image's channels are neither the network's nor 1.
    """
    channels = options.in_channels or halves.in_channels
    if channels not in (1, halves.in_channels):
        raise ForeignError(
            f"--in-channels: found {channels}, expected {halves.in_channels}, as {path} has, or 1, which is repeated"
        )
    network = dict(state)
    notes = (REPEATED,) if channels != halves.in_channels else ()
    if channels != halves.in_channels:
        network, averaged = of_gray(network, halves), averaged and of_gray(dict(averaged), halves)
    definition = {
        "_target_": "vaevq_med.networks.VisualTokenizer",
        "embedding_dim": embedding_dim,
        "variational": variational,
        "quantize_from": "mean",
        "encoder": halves.encoder,
        "decoder": halves.decoder,
        "quantizer": dict(quantizer),
    }
    size = options.image_size or image_size
    return Adopted(definition, network, size, channels, averaged=averaged, files=(path,), notes=notes, **further)
