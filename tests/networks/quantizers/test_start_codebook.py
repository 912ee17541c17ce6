"""Codewords that start at centers of clusters: which rows a codebook is given, and where its codewords come to lie."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.quantizer_cases import Case, all_cases
from torch import Tensor

from vaevq_med.networks.quantizers import (
    MGVQ,
    FactorizedQuantizer,
    ResidualQuantizer,
    SimVQ,
    SoftVQ,
    VectorQuantizer,
    VectorQuantizerEMA,
)
from vaevq_med.networks.quantizers.base import Quantizer
from vaevq_med.networks.quantizers.coherent import CoherentVQ

WITHOUT = {"FVQ", "FSQ", "IFSQ", "LFQ", "GaussianQuantizer", "VQGANLC"}
"""Some whose codewords are made or fixed."""
FREE = {"VectorQuantizer", "VectorQuantizerEMA", "SimVQ", "CoherentVQ", "IBQ", "SoftVQ", "MGVQ", "ResidualQuantizer"}
"""Some whose codewords can be put anywhere."""


class Recorded:
    """Gives prepared centers, and keeps what it was given."""

    def __init__(self, centers: Callable[[int, int], Tensor]) -> None:
        self.centers = centers
        self.given: list[Tensor] = []

    def __call__(self, rows: Tensor, count: int) -> Tensor:
        self.given.append(rows)
        return self.centers(count, rows.shape[1])


def drawn(count: int, channels: int) -> Tensor:
    return torch.randn(count, channels, generator=torch.Generator().manual_seed(count + channels)) * 3 + 1


@pytest.mark.parametrize("case", list(all_cases().values()), ids=list(all_cases()))
def test_a_quantizer_says_whether_its_codewords_can_be_put_somewhere(case: Case) -> None:
    torch.manual_seed(0)
    quantizer = case.make()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    z = torch.randn(2, quantizer.embedding_dim, 3, 5)
    cluster = Recorded(drawn)
    done = quantizer.start_codebook(z, cluster)
    assert done == (type(quantizer).start_codebook is not Quantizer.start_codebook)
    assert type(quantizer).__name__ not in (WITHOUT if done else FREE)
    changed = any(not torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    assert changed == done == bool(cluster.given)
    quantizer.train()(z.requires_grad_(), posterior(z))


def posterior(z: Tensor) -> object:
    from vaevq_med.networks.posterior import DiagonalGaussian

    return DiagonalGaussian(z, torch.zeros_like(z))


@pytest.mark.parametrize(
    "make",
    [
        lambda: VectorQuantizer(num_embeddings=6, embedding_dim=3),
        lambda: VectorQuantizerEMA(num_embeddings=6, embedding_dim=3),
        lambda: CoherentVQ(num_embeddings=6, embedding_dim=3, assignment="euclidean", weighting="plain"),
        lambda: SimVQ(num_embeddings=6, embedding_dim=3),
        lambda: SimVQ(num_embeddings=6, embedding_dim=3, bias=False, trainable_basis=True),
    ],
)
def test_the_codewords_are_the_centers_of_all_positions(make: Callable[[], Quantizer]) -> None:
    quantizer, cluster = make(), Recorded(drawn)
    z = torch.randn(2, 3, 4, 5)
    assert quantizer.start_codebook(z, cluster)
    (rows,) = cluster.given
    assert torch.equal(rows, z.permute(0, 2, 3, 1).reshape(40, 3))
    torch.testing.assert_close(quantizer.codebook().detach(), drawn(6, 3), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [VectorQuantizerEMA, CoherentVQ])
def test_an_update_by_the_centers_themselves_moves_averages_nowhere(kind: type[Quantizer]) -> None:
    """Were the sums still those of the random start, the first update would throw the codewords back to it."""
    options = {"assignment": "euclidean", "weighting": "plain", "revival_share": None} if kind is CoherentVQ else {}
    quantizer = kind(num_embeddings=6, embedding_dim=3, **options)
    quantizer.start_codebook(torch.randn(1, 3, 4, 4), Recorded(drawn))
    quantizer.train()(drawn(6, 3).T.reshape(1, 3, 6))
    torch.testing.assert_close(quantizer.codebook(), drawn(6, 3), atol=1e-4, rtol=1e-4)


def test_the_basis_of_simvq_keeps_the_size_of_a_random_one() -> None:
    """N(0, 1/D) has a mean squared length of 1, on which the speed of the map's learning depends."""
    quantizer = SimVQ(num_embeddings=64, embedding_dim=8)
    quantizer.start_codebook(torch.zeros(1, 8, 4), Recorded(drawn))
    assert quantizer.basis.square().sum(dim=1).mean().item() == pytest.approx(1, abs=1e-5)
    assert not quantizer.basis.requires_grad


@pytest.mark.parametrize(
    "make",
    [
        lambda: FactorizedQuantizer(num_embeddings=5, embedding_dim=4, num_codebooks=2, normalize=False),
        lambda: FactorizedQuantizer(num_embeddings=5, embedding_dim=4, num_codebooks=2),
        lambda: MGVQ(num_embeddings=5, embedding_dim=4, num_codebooks=2),
    ],
)
def test_each_group_is_given_its_channels(make: Callable[[], FactorizedQuantizer]) -> None:
    quantizer, cluster = make(), Recorded(drawn)
    z = torch.randn(2, 4, 3)
    quantizer.start_codebook(z, cluster)
    groups = [z[:, :2], z[:, 2:]]
    if quantizer.normalize:
        groups = [group / group.norm(dim=1, keepdim=True) for group in groups]
    for rows, group, table in zip(cluster.given, groups, quantizer.codebook().detach(), strict=True):
        torch.testing.assert_close(rows, group.permute(0, 2, 1).reshape(6, 2))
        torch.testing.assert_close(table, F.normalize(drawn(5, 2), dim=1) if quantizer.normalize else drawn(5, 2))


def test_each_segment_is_given_its_positions() -> None:
    quantizer, cluster = SoftVQ(num_embeddings=5, embedding_dim=3, num_segments=2, normalize=False), Recorded(drawn)
    z = torch.randn(2, 3, 2, 3)
    quantizer.start_codebook(z, cluster)
    flat = z.flatten(2).permute(0, 2, 1)
    assert torch.equal(cluster.given[0], flat[:, :3].reshape(6, 3))
    assert torch.equal(cluster.given[1], flat[:, 3:].reshape(6, 3))


def test_each_stage_is_given_what_those_before_have_left() -> None:
    """By hand: centers 0 and 10 of 1, 2, 11 leave 1, 2, 1; centers 1 and 2 of these leave nothing."""
    tables = [torch.tensor([[0.0], [10.0]]), torch.tensor([[1.0], [2.0]])]
    cluster = Recorded(lambda count, channels: tables[len(cluster.given) - 1])
    stages = [VectorQuantizer(num_embeddings=2, embedding_dim=1) for _ in range(2)]
    quantizer = ResidualQuantizer(stages=stages)
    z = torch.tensor([1.0, 2.0, 11.0]).view(1, 1, 3)
    assert quantizer.start_codebook(z, cluster)
    assert [rows.flatten().tolist() for rows in cluster.given] == [[1, 2, 11], [1, 2, 1]]
    assert torch.equal(quantizer(z).codes, z)
    shared = ResidualQuantizer(stages=stages[:1], num_codebooks=3)
    cluster.given.clear()
    assert shared.start_codebook(z, cluster)
    assert len(cluster.given) == 1
