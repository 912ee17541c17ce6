"""Label maps that are constant on the cells of the grid: as many codewords as patterns lose nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaevq_med.metrics import LabelDice
from vaevq_med.networks import VisualTokenizer
from vaevq_med.networks.backbone import BaseDecoder, BaseEncoder
from vaevq_med.networks.quantizers import CoherentVQ, VectorQuantizerEMA
from vaevq_med.networks.quantizers.base import Quantizer

FACTOR = 4
PATTERNS = torch.tensor([[-1.0, -1, -1], [1, -1, -1], [1, 1, -1], [1, 1, 1]])
"""Of nested regions: none, whole tumor, with its core, with what enhances."""
LABELS = torch.randint(4, (3, 6, 8), generator=torch.Generator().manual_seed(0))
IMAGES = PATTERNS[LABELS].movedim(-1, 1).repeat_interleave(FACTOR, 2).repeat_interleave(FACTOR, 3)


class Cells(BaseEncoder):
    """The mean of each channel over a cell."""

    spatial_dims, in_channels, z_channels, downsampling_factors = 2, 3, 3, (FACTOR, FACTOR)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 1, FACTOR, FACTOR) / FACTOR**2)

    @property
    def first_layer(self) -> Tensor:
        return self.weight

    def compile_layers(self) -> None:
        pass

    def forward(self, images: Tensor) -> Tensor:
        self.check_images(images)
        return F.conv2d(images, self.weight, stride=FACTOR, groups=3)


class Squares(BaseDecoder):
    """Each position's features at all pixels of its cell."""

    z_channels, upsampling_factors = 3, (FACTOR, FACTOR)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 1, FACTOR, FACTOR))

    @property
    def last_layer(self) -> Tensor:
        return self.weight

    def compile_layers(self) -> None:
        pass

    def forward(self, features: Tensor, codes: Tensor | None = None) -> Tensor:
        return F.conv_transpose2d(features, self.weight, stride=FACTOR, groups=3)


def tokenizer_of(quantizer: Quantizer) -> VisualTokenizer:
    """Between them, convolutions that change nothing; every channel has a deviation of its own."""
    tokenizer = VisualTokenizer(
        encoder=Cells(), decoder=Squares(), quantizer=quantizer, embedding_dim=3, quantize_from="mean"
    )
    with torch.no_grad():
        tokenizer.quant_conv.weight.zero_()[:3, :, 0, 0] = torch.eye(3)
        tokenizer.quant_conv.bias.copy_(torch.tensor([0.0, 0, 0, -1, -4, -2]))
        tokenizer.post_quant_conv.weight.zero_()[:, :, 0, 0] = torch.eye(3)
        tokenizer.post_quant_conv.bias.zero_()
    return tokenizer


@pytest.mark.parametrize("kind", [CoherentVQ, VectorQuantizerEMA])
@pytest.mark.parametrize("count", [4, 7])
def test_as_many_codewords_as_patterns_reconstruct_exactly(kind: type[Quantizer], count: int) -> None:
    torch.manual_seed(0)
    quantizer = kind(num_embeddings=count, embedding_dim=3)
    tokenizer = tokenizer_of(quantizer).eval()
    assert quantizer.start_codebook(PATTERNS.T[None], lambda rows, k: rows[torch.arange(k) % len(rows)])
    indices = tokenizer.encode_indices(IMAGES)
    assert indices.shape == (3, 6, 8, 1)
    # Each pattern has an index, and each index a pattern.
    pairs = {(int(label), int(index)) for label, index in zip(LABELS.flatten(), indices.flatten(), strict=True)}
    assert len(pairs) == len({label for label, _ in pairs}) == len({index for _, index in pairs}) == 4
    for found in (tokenizer(IMAGES), tokenizer.decode_indices(indices)):
        assert torch.equal(found, IMAGES)
        dice = LabelDice().measure((IMAGES + 1) / 2, (found + 1) / 2, {})
        assert all(bool((value == 1).all()) for value in dice.values())


def test_one_codeword_less_loses_a_region() -> None:
    torch.manual_seed(0)
    quantizer = CoherentVQ(num_embeddings=3, embedding_dim=3)
    tokenizer = tokenizer_of(quantizer).eval()
    quantizer.start_codebook(PATTERNS.T[None], lambda rows, k: rows[:k])
    dice = LabelDice().measure((IMAGES + 1) / 2, (tokenizer(IMAGES) + 1) / 2, {})
    # What enhances is taken for the core around it.
    assert dice["dice_channel2"].tolist() == [0.0] * 3
    assert dice["dice_channel1"].tolist() == [1.0] * 3


@pytest.mark.parametrize("count", [3, 8])
def test_the_codebook_finds_the_patterns_where_it_has_room_for_them(count: int) -> None:
    torch.manual_seed(0)
    tokenizer = tokenizer_of(CoherentVQ(num_embeddings=count, embedding_dim=3, decay=0.5)).train()
    for _ in range(60):
        tokenizer(IMAGES)
    found = tokenizer.eval()(IMAGES)
    assert torch.allclose(found, IMAGES, atol=1e-3) == (count >= 4)
    assert (len(tokenizer.encode_indices(IMAGES).unique()) >= 4) == (count >= 4)
