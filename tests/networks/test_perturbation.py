"""Codewords replaced by others: which, how many, and how that depends on the codebook (VQ-Seg, arXiv 2601.10124)."""

from __future__ import annotations

import pytest
import torch
from helpers.segmenters import small_segmenter
from hypothesis import given, settings
from hypothesis import strategies as st

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.perturbation import (
    FeatureDropout,
    QuantizedPerturbation,
    nearest_squared_distance,
    perturb_indices,
    replacement_probabilities,
)
from vaevq_med.networks.quantizers.fsq import FSQ
from vaevq_med.networks.quantizers.simvq import SimVQ

WAYS = [{}, {"temperature": 0.1}, {"nearest": 3}]


def codebook(k: int = 32, d: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(k, d, generator=torch.Generator().manual_seed(seed))


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("way", WAYS)
def test_nothing_and_everything(way: dict[str, float]) -> None:
    indices = torch.randint(32, (2, 9, 7, 1), generator=draws())
    assert torch.equal(perturb_indices(indices, codebook(), 0.0, **way), indices)
    assert not (perturb_indices(indices, codebook(), 1.0, generator=draws(), **way) == indices).any()
    half = perturb_indices(indices.expand(64, 2, 9, 7, 1), codebook(), 0.5, generator=draws(), **way)
    assert float((half != indices).float().mean()) == pytest.approx(0.5, abs=0.03)


@settings(max_examples=30)
@given(st.integers(2, 40), st.integers(1, 6), st.sampled_from(WAYS), st.integers(0, 99))
def test_rows_sum_to_one_and_keep_nothing(k: int, d: int, way: dict[str, float], seed: int) -> None:
    pi = replacement_probabilities(codebook(k, d, seed), torch.arange(k), **way)
    torch.testing.assert_close(pi.sum(dim=1), torch.ones(k))
    assert torch.equal(pi.diagonal(), torch.zeros(k))
    assert bool((pi >= 0).all())


@pytest.mark.parametrize("way", WAYS)
def test_two_codewords_swap(way: dict[str, float]) -> None:
    indices = torch.tensor([[0, 1, 1, 0]])
    assert torch.equal(perturb_indices(indices, codebook(2), 1.0, generator=draws(), **way), 1 - indices)


def test_a_simplex_is_uniform_at_any_temperature() -> None:
    for temperature in (0.01, 1.0, 100.0):
        pi = replacement_probabilities(torch.eye(5), torch.arange(5), temperature=temperature)
        torch.testing.assert_close(pi, (1 - torch.eye(5)) / 4)


@pytest.mark.parametrize("way", WAYS)
def test_the_scale_of_the_codebook_changes_nothing(way: dict[str, float]) -> None:
    small, large = (replacement_probabilities(s * codebook(), torch.arange(32), **way) for s in (1.0, 1000.0))
    torch.testing.assert_close(small, large, rtol=1e-3, atol=1e-6)


def test_the_draw_by_distance_by_hand() -> None:
    """Codewords at 0, 1 and 3: the squared distances to the nearest are 1, 1, 4, with a mean of 2."""
    line = torch.tensor([[0.0], [1.0], [3.0]])
    assert float(nearest_squared_distance(line)) == 2.0
    pi = replacement_probabilities(line, torch.tensor([0]), temperature=0.5)
    expected = torch.tensor([0.0, 1.0, torch.e**-8])  # exp(-1), exp(-9)
    torch.testing.assert_close(pi[0], expected / expected.sum())


def test_the_perplexity_of_the_draw_grows_with_the_dimension() -> None:
    """At a tenth of the mean nearest squared distance about 3 of 4,095 in 8 dimensions, 312 in 64, by another code."""
    for d, expected, tolerance in ((8, 3, 0.4), (64, 312, 0.2)):
        table = codebook(4096, d) * d**-0.5
        pi = replacement_probabilities(table, torch.arange(0, 4096, 16), temperature=0.1)
        perplexity = float(torch.special.entr(pi).sum(dim=1).exp().mean())
        assert perplexity == pytest.approx(expected, rel=tolerance)


def test_frequencies_are_those_of_the_draw() -> None:
    table, rows = codebook(6, 2), torch.full((20_000,), 3)
    pi = replacement_probabilities(table, torch.tensor([3]), temperature=1.0)[0]
    found = perturb_indices(rows, table, 1.0, temperature=1.0, generator=draws()).bincount(minlength=6) / len(rows)
    torch.testing.assert_close(found, pi, atol=0.015, rtol=0)


def divergence_from_uniform(marginal: torch.Tensor) -> float:
    """``KL(uniform || marginal)`` in nats (VQ-Seg, Eq. 5 and 6)."""
    marginal = marginal.double()
    return float(-(marginal * len(marginal)).log().mean())


# A regular polygon and a cube: some rotation or mirroring takes every codeword to every other one.
TURNS = 2 * torch.pi * torch.arange(12) / 12
SYMMETRIC = [torch.stack([TURNS.cos(), TURNS.sin()], dim=1), torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)]


@pytest.mark.parametrize("way", [{}, {"temperature": 0.5}, {"nearest": 1}], ids=["uniform", "distance", "nearest"])
@pytest.mark.parametrize("table", SYMMETRIC, ids=["polygon", "cube"])
def test_under_a_symmetric_codebook_even_indices_stay_even(table: torch.Tensor, way: dict[str, float]) -> None:
    """What is as often each codeword before is so after: the divergence is 0, and of a skewed codebook above."""
    k, epsilon = len(table), 0.7
    # All that are as near: one alone would be drawn by the rounding of the distances.
    way = {"nearest": 2 if k == 12 else 3} if "nearest" in way else way
    skewed = torch.arange(k, dtype=torch.float32)[:, None] ** 2
    for codewords, even in ((table, True), (skewed, not way)):
        pi = replacement_probabilities(codewords, torch.arange(k), **way)
        expected = divergence_from_uniform((1 - epsilon) / k + epsilon * pi.mean(dim=0))
        assert expected == pytest.approx(0, abs=1e-6) if even else expected > 0.01
        drawn = perturb_indices(torch.arange(k).repeat(8000), codewords, epsilon, generator=draws(), **way)
        found = divergence_from_uniform(drawn.bincount(minlength=k) / len(drawn))
        # Of so many draws chance alone makes some (k - 1) / 2 over their number.
        assert found == pytest.approx(expected, abs=1e-3 if even else 0.02 * expected + 1e-3)


def test_a_seed_repeats_itself() -> None:
    indices = torch.zeros(200, dtype=torch.int64)
    first, again, other = (perturb_indices(indices, codebook(), 0.5, generator=draws(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_features_change_and_the_gradient_passes() -> None:
    network = small_segmenter(quantizer=SimVQ(num_embeddings=8, embedding_dim=4))
    features = network.encode(torch.rand(2, 4, 3, 16, 16) * 2 - 1)
    assert features.quantizer is not None
    perturbed = QuantizedPerturbation(epsilon=1.0, nearest=1)(features, network)
    codes = network.quantizer.codebook()  # type: ignore[union-attr,operator]
    nearest = replacement_probabilities(codes, torch.arange(8), nearest=1).argmax(dim=1)
    expected = codes[nearest[features.quantizer.indices.squeeze(-1)]].movedim(-1, 1)
    torch.testing.assert_close(perturbed.coarse, expected)
    network.decode(perturbed).sum().backward()
    assert network.backbone.convInit.conv.weight.grad.abs().sum() > 0
    dropped = FeatureDropout(share=0.5)(features, network).coarse
    is_zero = (dropped == 0).flatten(2).all(dim=2)
    torch.testing.assert_close(dropped[~is_zero], 2 * features.coarse[~is_zero])


def test_what_cannot_be_perturbed_is_refused() -> None:
    images = torch.zeros(1, 4, 3, 16, 16)
    for quantizer, said in ((None, "no quantizer"), (FSQ(levels=[3, 3]), "quantizer is FSQ"), ("one", "one codeword")):
        made = SimVQ(num_embeddings=1, embedding_dim=4) if quantizer == "one" else quantizer
        network = small_segmenter(quantizer=made)
        with pytest.raises(VaevqMedError, match=said):
            QuantizedPerturbation()(network.encode(images), network)
    for arguments in ({"epsilon": 1.1}, {"temperature": 0.0}, {"nearest": 0}, {"nearest": 1, "temperature": 1.0}):
        with pytest.raises(VaevqMedError, match="expected"):
            QuantizedPerturbation(**arguments)  # type: ignore[arg-type]
    with pytest.raises(VaevqMedError, match="share"):
        FeatureDropout(share=1.0)
