"""Factorized quantization by hand, beside a peer package, and through the bundle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.bundles import quick, train_and_evaluate

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.quantizers import MGVQ, FactorizedQuantizer
from vaevq_med.networks.quantizers.grouped import GroupedQuantizer

# Two sub-codebooks of three codewords of two channels.
TABLES = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [-1.0, -1.0]], [[0.0, 1.0], [3.0, 4.0], [-2.0, 0.0]]])


def with_tables(**options: Any) -> FactorizedQuantizer:
    quantizer = FactorizedQuantizer(num_embeddings=3, embedding_dim=4, num_codebooks=2, **options)
    quantizer.embedding.data.copy_(TABLES)
    return quantizer


def test_each_group_has_a_codebook_of_its_own_by_hand() -> None:
    output = with_tables(normalize=False)(torch.tensor([0.2, 1.5, 2.0, 4.0]).view(1, 4, 1, 1))
    assert output.indices.flatten().tolist() == [1, 1]
    assert output.codes.flatten().tolist() == [0.0, 2.0, 3.0, 4.0]
    # Errors 0.2, -0.5, -1, 0; cos((0, 2), (3, 4)) = 8 / (2 * 5).
    expected = {"codebook": 1.29 / 4, "commitment": 1.29 / 4, "disentanglement": 0.64}
    assert {name: loss.item() for name, loss in output.losses.items()} == pytest.approx(expected)


def test_normalized_groups_by_hand() -> None:
    # By distance (3, -0.5) is nearest to (1, 0) either way; (0.1, 0.2) is nearest to (0, 1), and by angle to (3, 4).
    output = with_tables()(torch.tensor([3.0, -0.5, 0.1, 0.2]).view(1, 4, 1, 1))
    assert output.indices.flatten().tolist() == [0, 1]
    torch.testing.assert_close(output.codes.flatten(), torch.tensor([1.0, 0.0, 0.6, 0.8]))
    assert output.losses["disentanglement"].item() == pytest.approx(0.36)
    torch.testing.assert_close(output.codebook[0, 2], torch.full((2,), -(0.5**0.5)))


def test_disentanglement_is_the_mean_over_pairs_and_turns_the_encoder_alone() -> None:
    quantizer = FactorizedQuantizer(num_embeddings=1, embedding_dim=6, num_codebooks=3, normalize=False)
    quantizer.embedding.data.copy_(torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]], [[0.0, 5.0]]]))
    z = torch.zeros(1, 6, 1, 1, requires_grad=True)
    loss = quantizer(z).losses["disentanglement"]
    # Squared cosines of the pairs: 1/2, 0 and 1/2.
    assert loss.item() == pytest.approx(1 / 3)
    to_z, to_codebook = torch.autograd.grad(loss, (z, quantizer.embedding), allow_unused=True)
    assert to_codebook is None
    # Down the gradient, the second group's vector stays between the others; the first turns away from it.
    assert to_z.flatten()[1].item() > 0
    torch.testing.assert_close(to_z.flatten()[2:4], torch.zeros(2), atol=1e-6, rtol=0)


def test_the_penalty_turns_the_codes_apart() -> None:
    def penalty_after_training(weight: float) -> float:
        torch.manual_seed(0)
        quantizer = FactorizedQuantizer(num_embeddings=16, embedding_dim=8, init="normal")
        z = torch.randn(1, 8, 6, 6, requires_grad=True)
        optimizer = torch.optim.Adam([z, *quantizer.parameters()], lr=0.05)
        for _ in range(40):
            losses = quantizer(z).losses
            optimizer.zero_grad()
            (losses["codebook"] + 0.25 * losses["commitment"] + weight * losses["disentanglement"]).backward()
            optimizer.step()
        return quantizer(z).losses["disentanglement"].item()

    assert penalty_after_training(1.0) < 0.7 * penalty_after_training(0.0)


def test_normalized_codewords_start_at_length_one() -> None:
    quantizer = FactorizedQuantizer(num_embeddings=512, embedding_dim=8)
    torch.testing.assert_close(quantizer.embedding.norm(dim=-1), torch.ones(2, 512))
    plain = FactorizedQuantizer(num_embeddings=512, embedding_dim=8, normalize=False)
    assert plain.embedding.abs().max().item() <= 1 / 512


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_codebooks": 1}, "num_codebooks is 1; expected at least 2"),
        ({"num_codebooks": 3}, "a multiple of num_codebooks"),
        ({"num_embeddings": 0}, "num_embeddings is 0"),
        ({"init": "zeros"}, "expected one of uniform, normal"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(VaevqMedError, match=said):
        FactorizedQuantizer(**{"num_embeddings": 8, "embedding_dim": 4, **options})


@pytest.mark.peer
@pytest.mark.parametrize("kind", [FactorizedQuantizer, MGVQ])
def test_plain_groups_agree_with_vector_quantize_pytorch(kind: type[GroupedQuantizer]) -> None:
    """Intended difference: its one loss, at a learnable codebook, is the sum of codebook and commitment loss.

    It has neither the disentanglement penalty nor nested masking and revival, which are off here.
    """
    import vector_quantize_pytorch as peer

    torch.manual_seed(0)
    theirs = peer.VectorQuantize(
        dim=6,
        codebook_size=16,
        codebook_dim=2,
        heads=3,
        separate_codebook_per_head=True,
        learnable_codebook=True,
        ema_update=False,
        rotation_trick=False,
        accept_image_fmap=True,
    )
    options = {"revival": False} if kind is MGVQ else {}
    ours = kind(num_embeddings=16, embedding_dim=6, num_codebooks=3, normalize=False, init="normal", **options)
    theirs._codebook.embed.data.copy_(ours.embedding)
    generator = torch.Generator().manual_seed(1)
    z, direction = torch.randn(2, 2, 6, 3, 5, generator=generator)
    first, second = z.clone().requires_grad_(), z.clone().requires_grad_()
    quantized, indices, loss = theirs(first)
    output = ours(second)
    assert torch.equal(output.indices, indices)
    torch.testing.assert_close(output.quantized, quantized)
    total = output.losses["codebook"] + output.losses["commitment"]
    torch.testing.assert_close(output.losses["commitment"], loss.reshape(()))
    expected = torch.autograd.grad((quantized * direction).sum() + loss.sum(), (first, theirs._codebook.embed))
    found = torch.autograd.grad((output.quantized * direction).sum() + total, (second, ours.embedding))
    for own, peers in zip(found, expected, strict=True):
        torch.testing.assert_close(own, peers)


@pytest.mark.peer
def test_normalized_groups_agree_with_vector_quantize_pytorch() -> None:
    """Intended differences: its cosine codebook takes no gradient, and its averages are held still here."""
    import vector_quantize_pytorch as peer

    torch.manual_seed(0)
    theirs = peer.VectorQuantize(
        dim=6,
        codebook_size=16,
        codebook_dim=2,
        heads=3,
        separate_codebook_per_head=True,
        use_cosine_sim=True,
        freeze_codebook=True,
        rotation_trick=False,
        accept_image_fmap=True,
    )
    ours = FactorizedQuantizer(num_embeddings=16, embedding_dim=6, num_codebooks=3)
    theirs._codebook.embed.data.copy_(ours.codebook())
    generator = torch.Generator().manual_seed(1)
    z, direction = torch.randn(2, 2, 6, 3, 5, generator=generator)
    first, second = z.clone().requires_grad_(), z.clone().requires_grad_()
    quantized, indices, loss = theirs(first)
    output = ours(second)
    assert torch.equal(output.indices, indices)
    torch.testing.assert_close(output.quantized, quantized)
    torch.testing.assert_close(output.losses["commitment"], loss.reshape(()))
    (expected,) = torch.autograd.grad((quantized * direction).sum() + loss.sum(), first)
    (found,) = torch.autograd.grad((output.quantized * direction).sum() + output.losses["commitment"], second)
    torch.testing.assert_close(found, expected)


def test_the_overlay_trains_and_evaluates(toy_overrides: dict[str, Any]) -> None:
    trainer, _ = train_and_evaluate(quick(toy_overrides), "fq")
    assert {"codebook", "commitment", "disentanglement"} < set(trainer.state.terms)
    assert 0 < trainer.state.terms["disentanglement"] <= 1
