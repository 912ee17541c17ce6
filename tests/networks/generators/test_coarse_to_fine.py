"""Coarse to fine on toys whose likelihood is known, and the clusters it stands on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.generators.base import Wanted
from vaevq_med.networks.generators.clusters import cluster_codewords
from vaevq_med.networks.generators.coarse_to_fine import CoarseToFine
from vaevq_med.networks.generators.drawing import TokenRule
from vaevq_med.networks.initial import built_for_weights

SIZES: dict[str, Any] = {"width": 8, "depth": 1, "fine_depth": 1, "num_heads": 2}
K = 6


def toy(clusters: list[int] | list[list[int]], grid: tuple[int, int] = (2, 3), **options: Any) -> CoarseToFine:
    torch.manual_seed(0)
    table = torch.tensor(clusters).view(-1, len(np.atleast_2d(clusters)[0]))
    network = CoarseToFine(
        num_embeddings=table.shape[1],
        num_clusters=int(table.max()) + 1,
        num_codebooks=len(table),
        grid_size=grid,
        **{"num_classes": 3, **SIZES, **options},
    )
    network.cluster_of.copy_(table)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.4)
    return network.eval()


def indices(network: CoarseToFine, batch: int = 3) -> Tensor:
    shape = (batch, *network.grid_size, network.num_codebooks)
    return torch.randint(network.num_embeddings, shape, generator=torch.Generator().manual_seed(1))


def sources(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# --- the likelihood -----------------------------------------------------------------------------------


def test_where_every_codeword_is_a_cluster_it_is_llamagen() -> None:
    network = toy([*range(K)])
    drawn, labels = indices(network), torch.tensor([0, 1, 3])
    first, second = network.parts(drawn, labels)
    assert second.item() == 0.0
    assert first.item() == network.coarse.loss(drawn, labels).item() == network.loss(drawn, labels).item()
    assert torch.equal(
        network.indices(Wanted(labels, [5, 6, 7]), TokenRule(), sources(5, 6, 7)) >= 0, torch.ones_like(drawn) > 0
    )


def test_one_cluster_costs_nothing_and_leaves_independent_tokens() -> None:
    network = toy([0] * K)
    drawn, labels = indices(network), torch.tensor([0, 1, 3])
    first, second = network.parts(drawn, labels)
    assert first.item() == 0.0
    hidden = network.fine_features(torch.zeros(3, 6, dtype=torch.int64), labels)
    marginals = network.heads[0](hidden).log_softmax(dim=-1)
    expected = -marginals.gather(-1, drawn.flatten(1)[..., None]).mean()
    torch.testing.assert_close(second, expected)


def test_the_likelihood_is_the_joint_entropy_and_what_the_one_pass_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens of four codewords in two clusters, with exact conditionals."""
    joint = np.random.default_rng(0).dirichlet(np.full(16, 0.5)).reshape(4, 4)
    cluster = np.array([0, 1, 1, 0])
    network = toy(cluster.tolist(), grid=(1, 2), num_classes=0)
    of = np.eye(2)[cluster]  # [codeword, cluster]
    pairs = np.einsum("ij,ia,jb->ijab", joint, of, of)
    coarse = pairs.sum(axis=(0, 1))

    def entropy(values: np.ndarray) -> float:
        some = values[values > 0]
        return float(-(some * np.log(some)).sum())

    given = entropy(coarse)
    first, second = entropy(pairs.sum(axis=1)) - given, entropy(pairs.sum(axis=0)) - given
    expected = given + first + second
    correlation = first + second - (entropy(joint) - given)
    assert expected == pytest.approx(entropy(joint) + correlation)
    assert correlation > 0.02

    def coarse_loss(found: Tensor, labels: Tensor) -> Tensor:
        a, b = found.flatten().tolist()
        return torch.tensor(-np.log(coarse[a, b]) / 2)

    def features(found: Tensor, labels: Tensor) -> Tensor:
        a, b = found[0].tolist()
        of_both = [pairs[:, :, a, b].sum(axis=1), pairs[:, :, a, b].sum(axis=0)]
        return torch.tensor(np.log(np.maximum(of_both, 1e-30)))[None]

    monkeypatch.setattr(network.coarse, "loss", coarse_loss)
    monkeypatch.setattr(network, "fine_features", features)
    network.heads = torch.nn.ModuleList([torch.nn.Identity()])
    total = sum(
        joint[i, j] * 2 * network.loss(torch.tensor([i, j]).view(1, 1, 2, 1)).item() for i in range(4) for j in range(4)
    )
    assert total == pytest.approx(expected, abs=1e-5)


def test_gradients_reach_both_transformers_and_labels_are_dropped_for_both() -> None:
    network = toy([[0, 1, 0, 1, 2, 2], [0, 0, 1, 1, 2, 2]], label_dropout=0.5)
    drawn, labels = indices(network, 12), torch.arange(12) % 3
    for parameter in network.parameters():
        parameter.grad = None
    network.loss(drawn, labels).backward()
    assert all(bool(parameter.grad.any()) for parameter in network.parameters() if parameter.grad is not None)
    assert all(parameter.grad is not None for parameter in network.parameters())
    dropped = torch.rand(12, generator=sources(7)[0]) < 0.5
    by_hand = network.loss(drawn, torch.where(dropped, 3, labels))
    network.train()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(network.loss(drawn, labels, generator=sources(7)[0]), by_hand)


# --- drawing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_drawn_members_are_those_of_the_drawn_clusters(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    network = toy([[0, 1, 0, 1, 2, 2], [0, 0, 1, 1, 2, 2]])
    seen: list[Tensor] = []
    features = network.fine_features
    monkeypatch.setattr(
        network, "fine_features", lambda coarse, labels: (seen.append(coarse), features(coarse, labels))[1]
    )
    found = network.indices(Wanted(torch.tensor([0, 2]), [5, 6]), TokenRule(scale), sources(5, 6))
    assert found.shape == (2, 2, 3, 2)
    assert torch.equal(network.coarse_of(found.flatten(1)), seen[0][:2])
    alone = network.indices(Wanted(torch.tensor([2]), [6]), TokenRule(scale), sources(6))
    assert torch.equal(alone, found[1:])


def test_known_tokens_stay() -> None:
    network = toy([0, 1, 0, 1, 2, 2])
    known, mask = indices(network), torch.ones(3, 2, 3, dtype=torch.bool)
    mask[:, 0, 1:] = False
    labels = torch.tensor([0, 1, 2])
    found = network.indices(Wanted(labels, [5, 6, 7], known, mask), TokenRule(), sources(5, 6, 7))
    assert torch.equal(found[mask], known[mask])
    assert not torch.equal(found[~mask], known[~mask])


def test_the_draws_have_the_joint_distribution_of_the_likelihood() -> None:
    """All 36 images of two tokens: their shares among many draws are exp(-N loss)."""
    network = toy([0, 1, 0, 1, 2, 2], grid=(1, 2), num_classes=0)
    whole = torch.cartesian_prod(torch.arange(K), torch.arange(K)).view(-1, 1, 2, 1)
    expected = torch.stack([(-2 * network.loss(image[None])).exp() for image in whole]).detach()
    assert expected.sum().item() == pytest.approx(1.0, abs=1e-4)
    count = 20_000
    found = network.indices(Wanted(None, range(count)), TokenRule(), torch.Generator().manual_seed(0)).flatten(1)
    shares = torch.bincount(found[:, 0] * K + found[:, 1], minlength=K * K) / count
    torch.testing.assert_close(shares, expected, atol=0.012, rtol=0)


# --- clusters -----------------------------------------------------------------------------------------


def test_clusters_are_what_lies_together_numbered_by_their_first_codeword() -> None:
    centers = np.array([[5.0, 0.0], [0.0, 5.0], [-5.0, -5.0]], dtype=np.float32)
    rng = np.random.default_rng(0)
    order = np.concatenate([[2, 0, 1], rng.integers(3, size=37)])
    codebook = (centers[order] + 0.1 * rng.normal(size=(40, 2))).astype(np.float32)
    found = cluster_codewords(codebook, np.ones(40, dtype=np.int64), 3)
    assert found.tolist() == np.array([1, 2, 0])[order].tolist()
    assert cluster_codewords(codebook, np.ones(40, dtype=np.int64), 40).tolist() == [*range(40)]
    assert not cluster_codewords(codebook, np.ones(40, dtype=np.int64), 1).any()


def test_use_decides_where_the_centers_go() -> None:
    """On a line: two clusters of 0, 1, 10, 11, 30 part where the weights are."""
    codebook = np.array([[0.0], [1.0], [10.0], [11.0], [30.0]], dtype=np.float32)
    assert cluster_codewords(codebook, np.array([1, 1, 1, 1, 1]), 2).tolist() == [0, 0, 0, 0, 1]
    assert cluster_codewords(codebook, np.array([1000, 1000, 1000, 1000, 0]), 2).tolist() == [0, 0, 1, 1, 1]


def test_clusters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    twice = np.zeros((4, 2), dtype=np.float32)
    with pytest.raises(VaevqMedError, match="num_clusters is 2; expected 1 to 1, the distinct codewords"):
        cluster_codewords(twice, np.ones(4, dtype=np.int64), 2)
    with pytest.raises(VaevqMedError, match="num_clusters is 7; expected 1 to the 6 codewords"):
        CoarseToFine(num_embeddings=6, num_clusters=7, grid_size=2, **SIZES)
    file = tmp_path / "clusters.npz"
    options: dict[str, Any] = {"num_embeddings": 6, "grid_size": 2, "clusters": file, **SIZES}
    with pytest.raises(VaevqMedError, match="found no clusters, expected a file made by: vaevq-med cluster-codebook"):
        CoarseToFine(num_clusters=2, **options)
    file.write_bytes(b"nothing")
    with pytest.raises(VaevqMedError, match="found an unreadable file"):
        CoarseToFine(num_clusters=2, **options)
    for wrong, complaint in [
        ([[0, 0, 2, 2, 2, 0]], "found no codeword in the cluster 1, expected one or more in each"),
        ([[0.0, 0.6, 1.0, 2.0, 2.0, 2.9]], "found clusters that are no whole numbers, expected whole numbers"),
        ([[0.0, math.nan, 1.0, 2.0, 2.0, 2.0]], "found clusters that are no whole numbers"),
        ([["a", "b", "c", "a", "b", "c"]], "found clusters of the type <U1, expected whole numbers"),
    ]:
        np.savez(file, cluster_of=np.array(wrong))
        with pytest.raises(VaevqMedError, match=complaint):
            CoarseToFine(num_clusters=3, **options)
    np.savez(file, cluster_of=np.array([[0, 1, 2, 0, 1, 2], [0, 2, 2, 2, 2, 2]]))
    with pytest.raises(VaevqMedError, match="found no codeword in the cluster 1 of the codebook 1"):
        CoarseToFine(num_clusters=3, num_codebooks=2, **options)
    np.savez(file, cluster_of=np.array([[0, 1, 0, 1, 0, 1]]))
    with pytest.raises(VaevqMedError, match="found clusters 0 to 1, expected 0 to 2, as num_clusters is 3"):
        CoarseToFine(num_clusters=3, **options)
    with pytest.raises(VaevqMedError, match=r"found clusters of \[1, 6\] codewords, expected \[2, 6\]"):
        CoarseToFine(num_clusters=2, num_codebooks=2, **options)
    assert CoarseToFine(num_clusters=2, **options).cluster_of.tolist() == [[0, 1, 0, 1, 0, 1]]
    with pytest.raises(VaevqMedError, match="clusters: found none, expected a file of clusters; make it with: vaevq"):
        CoarseToFine(num_clusters=2, **{**options, "clusters": None}).check_ready()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"label_dropout": 1.5}, "label_dropout is 1.5; expected from 0 to below 1"),
        ({"label_dropout": math.nan}, "label_dropout is nan; expected from 0 to below 1"),
        ({"num_clusters": 2.0}, "num_clusters is 2.0; expected a whole number"),
        ({"num_clusters": 0}, "num_clusters is 0; expected at least 1"),
        ({"fine_depth": 1.5}, "fine_depth is 1.5; expected a whole number"),
        ({"fine_depth": 0}, "fine_depth is 0; expected at least 1"),
    ],
)
def test_numbers_out_of_their_range_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(VaevqMedError, match=complaint):
        CoarseToFine(**{"num_embeddings": 6, "num_clusters": 2, "grid_size": 2, **SIZES, **options})


def test_clusters_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "clusters.npz"
    options: dict[str, Any] = {"num_embeddings": 4, "num_clusters": 2, "grid_size": 2, "clusters": file, **SIZES}
    tokens = {
        "kind": "indices",
        "grid": [2, 2],
        "label": {"names": []},
        "tokenizer": {"num_embeddings": 4, "num_codebooks": 1, "content_hash": "sha256:own"},
    }
    table = np.array([[0, 1, 0, 1]])
    np.savez(file, cluster_of=table, provenance=np.array(json.dumps({"tokenizer": "sha256:own"})))
    CoarseToFine(**options).check_fit(tokens, "tokens")
    np.savez(file, cluster_of=table)  # which says nothing
    CoarseToFine(**options).check_fit(tokens, "tokens")
    np.savez(file, cluster_of=table, provenance=np.array(json.dumps({"tokenizer": "sha256:other"})))
    network = CoarseToFine(**options)
    complaint = "npz: found clusters of the tokenizer sha256:other, expected those of sha256:own, which made the tokens"
    with pytest.raises(VaevqMedError, match=complaint):
        network.check_fit(tokens, "tokens")
    for provenance in ("[]", "no JSON"):
        np.savez(file, cluster_of=table, provenance=np.array(provenance))
        with pytest.raises(VaevqMedError, match="found an unreadable file"):
            CoarseToFine(**options)


def test_no_file_is_read_where_the_weights_follow(tmp_path: Path) -> None:
    options = {"num_embeddings": 4, "num_clusters": 2, "grid_size": 2, "clusters": tmp_path / "none.npz", **SIZES}
    with built_for_weights():
        CoarseToFine(**options).prepare(lambda: torch.zeros(0))
    with pytest.raises(VaevqMedError, match="found no clusters"):
        CoarseToFine(**options)
