"""Rates of one checkpoint: choices against a direct search, and the trade that they make."""

import numpy as np
import pytest
import torch
from helpers.index_stacks import random_model
from helpers.toy_networks import tokenizer

from vaevq_med.codec.coders.context import ContextCoder
from vaevq_med.codec.coders.layout import Layout
from vaevq_med.codec.errors import CodecError
from vaevq_med.codec.rate_control import (
    Latents,
    constrained_indices,
    context_constrained_indices,
    latents_of,
)
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.quantizers import FSQ, MGVQ, CoherentVQ, ResidualQuantizer, VectorQuantizer
from vaevq_med.networks.quantizers.distances import Search


def made_up(seed: int, shape: tuple[int, ...] = (6, 7, 7), k: int = 12, weighted: bool = True) -> Latents:
    """Latents with distances of their own, and the nearest codewords by the definition."""
    draw = torch.Generator().manual_seed(seed)
    count = int(np.prod(shape))
    means = torch.randn(count, 3, generator=draw, dtype=torch.float64)
    codebook = torch.randn(k, 3, generator=draw, dtype=torch.float64)
    precision = torch.rand(count, 3, generator=draw, dtype=torch.float64) + 0.1 if weighted else None
    weights = torch.ones_like(means) if precision is None else precision
    nearest = ((means[:, None] - codebook).square() * weights[:, None]).sum(2).argmin(1).numpy()
    return Latents(shape, nearest, Search(means, codebook, precision, 2**20))


def squared(latents: Latents) -> np.ndarray:
    search = latents.search
    weights = torch.ones_like(search.latents) if search.precision is None else search.precision
    return ((search.latents[:, None] - search.codebook).square() * weights[:, None]).sum(2).numpy()


@pytest.mark.parametrize("weighted", [True, False])
def test_choices_are_those_of_a_direct_search(weighted: bool) -> None:
    latents = made_up(0, weighted=weighted)
    live = np.random.default_rng(0).random(latents.grid) < 0.7
    chosen = latents.nearest.copy()
    distances = squared(latents)
    for _ in range(2):
        counts = np.bincount(chosen[live.ravel()], minlength=12) + 0.5
        cost = distances - 0.8 * np.log2(counts / counts.sum())
        chosen = np.where(live.ravel(), cost.argmin(1), latents.nearest)
    found = constrained_indices(latents, live, 0.8)
    assert (found[..., 0].ravel() == chosen).all()
    assert (chosen != latents.nearest).any()
    assert (constrained_indices(latents, live, 0.0)[..., 0].ravel() == latents.nearest).all()


def test_a_greater_weight_buys_bits_with_distance() -> None:
    latents = made_up(1, shape=(20, 8, 8))
    live = np.ones(latents.grid, bool)
    distances = squared(latents)
    rates, costs = [], []
    for weight in (0.0, 0.3, 1.0, 4.0, 1e6):
        found = constrained_indices(latents, live, weight).ravel()
        counts = np.bincount(found, minlength=12)
        used = counts[counts > 0] / counts.sum()
        rates.append(-(used * np.log2(used)).sum())
        costs.append(distances[np.arange(len(found)), found].mean())
    assert rates == sorted(rates, reverse=True)
    assert costs == sorted(costs)
    assert rates[-1] == 0
    assert rates[2] < 0.9 * rates[0]


def test_the_context_models_choices_cost_fewer_bits_by_its_own_coder() -> None:
    latents = made_up(2, shape=(6, 6, 6))
    live = np.ones(latents.grid, bool)
    layout = Layout(live, np.arange(6), 12, contrast="t1n")
    model = random_model(3, 12)
    coder = ContextCoder(model)
    sizes = [len(coder.encode(context_constrained_indices(latents, layout, model, w), layout)) for w in (0.0, 0.5, 5.0)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] < 0.75 * sizes[0]
    at_once = context_constrained_indices(latents, layout, model, 0.0)
    assert (at_once.ravel() == latents.nearest).all()


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(CodecError, match="weight is -1; expected 0 or more"):
        constrained_indices(made_up(0), np.ones((6, 7, 7), bool), -1)


@pytest.mark.parametrize("assignment", ["posterior", "euclidean"])
def test_latents_are_the_tokenizers_own(assignment: str) -> None:
    torch.manual_seed(0)
    quantizer = CoherentVQ(num_embeddings=16, embedding_dim=4, assignment=assignment)
    network = tokenizer(quantizer=quantizer).eval()
    images = torch.rand(2, 1, 16, 16) * 2 - 1
    latents = latents_of(network, images)
    with torch.no_grad():
        expected = network.encode_indices(images)
    assert latents.grid == tuple(expected.shape[:-1])
    assert (latents.nearest == expected.flatten().numpy()).all()
    assert (squared(latents).argmin(1) == latents.nearest).all()
    assert (latents.distances(np.arange(len(latents.nearest))).argmin(1) == latents.nearest).all()


def test_quantizers_without_one_codebook_say_so() -> None:
    network = tokenizer(quantizer=FSQ(levels=[3, 3, 3, 3])).eval()
    with pytest.raises(CodecError, match="found FSQ, which has no one explicit codebook"):
        latents_of(network, torch.zeros(1, 1, 16, 16))


@pytest.mark.parametrize("kind", ["residual", "nested"])
def test_the_first_codebooks_alone_are_decoded(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "residual":
        stages = [VectorQuantizer(num_embeddings=8, embedding_dim=4, init="normal") for _ in range(3)]
        quantizer: torch.nn.Module = ResidualQuantizer(stages=stages)
        argument = "num_stages"
    else:
        quantizer, argument = MGVQ(num_embeddings=8, embedding_dim=6, num_codebooks=3), "num_active"
    quantizer.eval()
    indices = torch.randint(8, (2, 3, 3, 3))
    assert quantizer.num_prefixes == 3  # type: ignore[arg-type]
    for count in (1, 2, 3):
        found = quantizer.first_codes(indices[..., :count])  # type: ignore[operator]
        assert torch.equal(found, quantizer.indices_to_codes(indices, **{argument: count}))  # type: ignore[operator]
    whole = VectorQuantizer(num_embeddings=8, embedding_dim=4)
    assert whole.num_prefixes == 1
    assert torch.equal(whole.first_codes(indices[..., :1]), whole.indices_to_codes(indices[..., :1]))
    with pytest.raises(VaevqMedError, match=r"shape \(1, 2, 2, 2\); expected \[B, \*grid, 1\]"):
        whole.first_codes(torch.zeros(1, 2, 2, 2, dtype=torch.int64))
    for count in (0, 4):
        with pytest.raises(VaevqMedError, match="indices have shape"):
            quantizer.first_codes(torch.zeros(1, 2, 2, count, dtype=torch.int64))  # type: ignore[operator]
