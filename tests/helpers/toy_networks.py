"""Networks of a few channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vaevq_med.networks.decoder import Decoder
from vaevq_med.networks.encoder import Encoder
from vaevq_med.networks.generators.llamagen import LlamaGen
from vaevq_med.networks.quantizers import SimVQ
from vaevq_med.networks.tokenizer import VisualTokenizer


def tokenizer(*, levels: int = 2, channels: int = 1, variational: bool = True, **kwargs: Any) -> VisualTokenizer:
    torch.manual_seed(0)
    shared: dict[str, Any] = {
        "num_channels": 8,
        "channel_mult": [1] * levels + [2],
        "num_res_blocks": 1,
        "attention_resolutions": [],
        "image_size": 32,
        "z_channels": 8,
    }
    return VisualTokenizer(
        encoder=Encoder(in_channels=channels, **shared),
        decoder=Decoder(out_channels=channels, **shared),
        quantizer=kwargs.pop("quantizer", SimVQ(num_embeddings=16, embedding_dim=4)),
        embedding_dim=4,
        variational=variational,
        **kwargs,
    ).eval()


HEIGHT, WIDTH, K = 2, 3, 11


def toy(**options: Any) -> LlamaGen:
    """A network in evaluation mode whose weights, heads and norms included, are far from their start."""
    torch.manual_seed(0)
    sizes = {"num_embeddings": K, "grid_size": (HEIGHT, WIDTH), "width": 16, "depth": 2, "num_heads": 2}
    network = LlamaGen(**{"num_classes": 4, **sizes, **options})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.4)
    return network.eval()


def grid(network: LlamaGen, batch: int = 3, seed: int = 1) -> Tensor:
    shape = (batch, *network.grid_size, network.num_codebooks)
    return torch.randint(network.num_embeddings, shape, generator=torch.Generator().manual_seed(seed))
