"""A tokenizer of slices that sees its neighbors' codes, decoded some slices at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.stores import SIMVQ, write_checkpoint

from vaevq_med.tokens.volumes import decode_codes
from vaevq_med.trained.network import StoredTokenizer


@pytest.mark.parametrize("extra", ["cells", "rectifier"])
def test_pieces_are_decoded_as_the_whole_is(extra: str, tmp_path: Path) -> None:
    level = {"_target_": "vaevq_med.networks.quantizers.VectorQuantizer", "num_embeddings": 8, "embedding_dim": 4}
    two = {"_target_": "vaevq_med.networks.quantizers.ResidualTwoLevel", "top": level, "bottom": level}
    whole: dict[str, Any] = {"cell": 2, "embedding_dim": 4, "variational": False}
    if extra == "rectifier":
        whole = {"rectifier": {"_target_": "vaevq_med.networks.Rectifier", "embedding_dim": 4}}

    def change(network: torch.nn.Module) -> None:
        for parameter in network.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))

    quantizer = two if extra == "cells" else SIMVQ
    path = write_checkpoint(tmp_path / "c.pt", quantizer, whole={"slice_context": 1, **whole}, change=change, depth=2)
    network = StoredTokenizer(path).network().eval()
    side = 4 if extra == "cells" else 8
    codes = torch.randn(1, network.embedding_dim, 3, side, side)
    with torch.inference_mode():
        expected = network.decode(codes)
    found = decode_codes(network, codes, size=(3, 32, 32), tile=(2, side, side))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
