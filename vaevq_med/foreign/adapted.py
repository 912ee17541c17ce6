"""A network of another package in an adapter: its definition, and its tensors under the adapter's names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vaevq_med.foreign.base import REPEATED, AdapterOptions, Adopted
from vaevq_med.foreign.folders import numbers
from vaevq_med.foreign.weights import Tensors


def held(tensors: Tensors, codebook: str = "", spare: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The state dictionary of an adapter.

    Args:
        tensors: of the foreign network.
        codebook: the name of its codebook, which becomes the quantizer's.
        spare: beginnings of names that the adapter does not have.

    Raises:
        ForeignError: there is no such codebook.
    """
    left_out = tuple(part for part in (codebook, *spare) if part)
    names = [name for name in tensors.names() if not name.startswith(left_out)] if left_out else tensors.names()
    state = {f"network.{name}": tensors.take(name) for name in names}
    return {**state, "quantizer.embedding": tensors.take(codebook)} if codebook else state


def codebook_of(tensors: Tensors, name: str) -> dict[str, Any]:
    """The definition of a quantizer for a codebook.

    Raises:
        ForeignError: there is none.
    """
    size, width = tensors.shape(name, None, None)
    return {
        "_target_": "vaevq_med.networks.quantizers.VectorQuantizer",
        "num_embeddings": size,
        "embedding_dim": width,
    }


def adapted(
    target: str,
    arguments: Mapping[str, Any],
    network: Mapping[str, Tensor],
    options: AdapterOptions,
    *,
    own_channels: int,
    image_size: int,
    files: tuple[Path, ...],
    quantizer: Mapping[str, Any] | None = None,
    latent_channels: int | None = None,
    notes: tuple[str, ...] = (),
) -> Adopted:
    """The tokenizer.

    Args:
        target: the adapter, below ``vaevq_med.networks.adapters``.
        arguments: what it takes beside the quantizer, channels and range.
        network: its state dictionary.
        options: image size, channels, range.
        own_channels: of the foreign network.
        image_size: published, or that of the file.
        files: of which it is made.
        quantizer: definition; None for a continuous latent.
        latent_channels: of a continuous latent.
        notes: what the user has to be told.
    """
    channels = options.in_channels or own_channels
    ranged = {"value_range": list(numbers(options.value_range, "value_range"))} if options.value_range else {}
    definition = {
        "_target_": f"vaevq_med.networks.adapters.{target}",
        **arguments,
        "in_channels": channels,
        **ranged,
        "quantizer": dict(quantizer or {}),
    }
    return Adopted(
        definition,
        network,
        options.image_size or image_size,
        channels,
        files=files,
        depth=options.depth,
        latent_channels=latent_channels,
        notes=(*notes, *((REPEATED,) if channels != own_channels else ())),
    )
