"""Untrained tokenizers as checkpoints, and stores of their tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from monai.bundle import ConfigParser

from vaevq_med.networks.tokenizer import VisualTokenizer
from vaevq_med.tokens.encode import EncodeReport, EncodeTokens

SMALL: dict[str, Any] = {
    "num_channels": 4,
    "channel_mult": [1, 1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [],
    "z_channels": 4,
}
"""A backbone with f = 4."""


SIMVQ = {"_target_": "vaevq_med.networks.quantizers.SimVQ", "num_embeddings": 32, "embedding_dim": 4}


def write_checkpoint(
    path: Path,
    quantizer: dict[str, Any] = SIMVQ,
    *,
    change: Callable[[VisualTokenizer], None] = lambda network: None,
    trained_on: str = "sha256:another",
    both: Mapping[str, Any] = MappingProxyType({}),
    whole: Mapping[str, Any] = MappingProxyType({}),
    **settings: Any,
) -> Path:
    """An untrained tokenizer in the form of a training checkpoint.

    Args:
        path: to write.
        quantizer: its definition.
        change: what is done to the network before it is written.
        trained_on: content hash of its data.
        both: further arguments of encoder and decoder.
        whole: further arguments of the tokenizer.
        **settings: of the training run.
    """
    channels = settings.get("in_channels", 1)
    networks = "vaevq_med.networks"
    definition = {
        "_target_": f"{networks}.VisualTokenizer",
        "encoder": {"_target_": f"{networks}.Encoder", "in_channels": "@in_channels", **SMALL, **both},
        "decoder": {"_target_": f"{networks}.Decoder", "out_channels": "@in_channels", **SMALL, **both},
        "quantizer": quantizer,
        "embedding_dim": quantizer.get("embedding_dim", SIMVQ["embedding_dim"]),
        **whole,
    }
    config = {"network_def": definition, "image_size": 32, "in_channels": channels, **settings}
    torch.manual_seed(0)
    network = ConfigParser(config).get_parsed_content("network_def")
    change(network)
    state = {"network": network.state_dict(), "config": json.dumps(config), "data": {"content_hash": trained_on}}
    torch.save({"format": 1, **state}, path)
    return path


def encode(checkpoint: Path, dataset: Path, output: Path, **options: Any) -> EncodeReport:
    return EncodeTokens(checkpoint, dataset, output, **{"workers": 0, "device": "cpu", **options}).run()
