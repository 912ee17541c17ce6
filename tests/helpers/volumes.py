"""Tiny tokenizers of volumes and of slices."""

from __future__ import annotations

from typing import Any

from vaevq_med.networks.decoder import Decoder
from vaevq_med.networks.encoder import Encoder
from vaevq_med.networks.quantizers import VectorQuantizer
from vaevq_med.networks.tokenizer import VisualTokenizer


def halves(**further: Any) -> dict[str, Any]:
    """What encoder and decoder share."""
    small = {
        "num_channels": 4,
        "channel_mult": [1, 2],
        "num_res_blocks": 1,
        "attention_resolutions": [],
        "image_size": 8,
        "z_channels": 4,
    }
    return {**small, **further}


def volume_tokenizer(
    *, spatial_dims: int = 3, slice_context: int = 0, variational: bool = True, **further: Any
) -> VisualTokenizer:
    """Two levels of four and eight channels, K = 16, D = 4."""
    shared = {"spatial_dims": spatial_dims, **halves(**further)}
    return VisualTokenizer(
        encoder=Encoder(in_channels=1, **shared),
        decoder=Decoder(out_channels=1, **shared),
        quantizer=VectorQuantizer(num_embeddings=16, embedding_dim=4),
        embedding_dim=4,
        variational=variational,
        quantize_from="mean",
        slice_context=slice_context,
    )
