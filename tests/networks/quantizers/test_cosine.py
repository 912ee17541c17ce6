"""Quantization by cosine similarity."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.quantizer_cases import Case

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.quantizers.cosine import CosineVQ

CASES = {"cosine": Case(lambda: CosineVQ(num_embeddings=32, embedding_dim=4), straight_through=False)}


def test_the_direction_decides_and_not_the_distance() -> None:
    quantizer = CosineVQ(num_embeddings=2, embedding_dim=2)
    quantizer.embedding.data = torch.tensor([[0.0, 0.1], [3.0, 4.0]])
    output = quantizer(torch.tensor([6.0, 8.0]).view(1, 2, 1, 1))
    assert output.indices.flatten().tolist() == [1]
    torch.testing.assert_close(output.codes.flatten(), torch.tensor([0.6, 0.8]))
    # Straight up is nearer to (0, 1), at a squared distance of 0 instead of 0.6^2 + 0.2^2.
    output = quantizer(torch.tensor([0.0, 50.0]).view(1, 2, 1, 1))
    assert output.indices.flatten().tolist() == [0]
    assert float(output.losses["commitment"]) == 0.0


@pytest.mark.parametrize("count", [3, 8])
def test_codewords_at_equal_angles_share_the_circle(count: int) -> None:
    """Each has an arc of 2 pi / K, whatever the lengths of codewords and latents."""
    quantizer = CosineVQ(num_embeddings=count, embedding_dim=2)
    angles = torch.arange(count) * 2 * math.pi / count
    quantizer.embedding.data = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.arange(1, count + 1)[:, None]
    circle = (torch.arange(3600) + 0.5) * 2 * math.pi / 3600
    latents = torch.stack([circle.cos(), circle.sin()]).unsqueeze(0) * torch.rand(3600).add(0.1)
    found = quantizer(latents).indices.flatten()
    assert torch.equal(found, (circle / (2 * math.pi / count)).round().long() % count)


def test_starts() -> None:
    for init in ("normal", "uniform"):
        quantizer = CosineVQ(num_embeddings=16, embedding_dim=4, init=init)
        torch.testing.assert_close(quantizer.embedding.norm(dim=1), torch.ones(16))
    with pytest.raises(VaevqMedError, match="init is 'zeros'; expected one of uniform, normal"):
        CosineVQ(num_embeddings=16, embedding_dim=4, init="zeros")
