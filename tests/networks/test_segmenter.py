"""The segmentation network: shapes, its quantizer, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.segmenters import SMALL, small_segmenter

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.quantizers.vq import VectorQuantizer
from vaevq_med.networks.segmenter import SliceSegmenter


def test_the_middle_slice_or_all_are_segmented() -> None:
    images, masks = torch.rand(2, 4, 3, 16, 24), torch.rand(2, 3, 3, 16, 24)
    flat = small_segmenter()
    assert flat(images).shape == (2, 3, 16, 24)
    assert torch.equal(flat.targets(masks), masks[:, :, 1])
    deep, volume = small_segmenter(spatial_dims=3, depth=4), torch.rand(1, 4, 4, 16, 16)
    assert deep(volume).shape == (1, 3, 4, 16, 16)
    assert torch.equal(deep.targets(volume[:, :3]), volume[:, :3])


def test_a_quantizer_of_codewords_that_are_the_features_changes_nothing() -> None:
    """Where every feature is a codeword already, the network is that without a quantizer."""
    plain = small_segmenter()
    images = torch.rand(1, 4, 3, 8, 8) * 2 - 1
    coarse = plain.encode(images).coarse.detach()
    table = coarse.movedim(1, -1).reshape(-1, 16)
    quantized = small_segmenter(quantizer=VectorQuantizer(num_embeddings=len(table), embedding_dim=16))
    quantized.backbone.load_state_dict(plain.backbone.state_dict())
    quantized.quantizer.embedding.data.copy_(table)  # type: ignore[union-attr,operator]
    torch.testing.assert_close(quantized(images), plain(images))
    moved = small_segmenter(quantizer=VectorQuantizer(num_embeddings=4, embedding_dim=4))
    assert moved(images).shape == plain(images).shape


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"depth": 4}, "depth is 4; expected an odd number"),
        ({"spatial_dims": 4}, "spatial_dims is 4"),
        ({"num_channels": 12}, "num_channels is 12; expected a multiple of 8"),
        ({"blocks_up": [1, 1]}, "blocks_up has 2 entries; expected one fewer than blocks_down, 1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"blocks_down": []}, "blocks_down is 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(VaevqMedError, match=said):
        SliceSegmenter(**{**SMALL, **changed})


def test_images_that_do_not_fit_are_refused() -> None:
    network = small_segmenter()
    with pytest.raises(VaevqMedError, match=r"expected \[B, 4, 3, H, W\]"):
        network(torch.zeros(1, 4, 5, 16, 16))
    with pytest.raises(VaevqMedError, match="sides of 16 x 15; expected multiples of 2"):
        network(torch.zeros(1, 4, 3, 16, 15))
