"""Slots: who sees whom, what nested dropout keeps, and what it is known to find in a linear network."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks import Rectifier, SlotDecoder, SlotEncoder, VisualTokenizer
from vaevq_med.networks.quantizers import (
    FSQ,
    MGVQ,
    Continuous,
    ResidualQuantizer,
    SimVQ,
    VectorQuantizer,
)
from vaevq_med.networks.quantizers.base import Quantizer
from vaevq_med.networks.slots import NestedDropout, slot_factors, slots_see

SMALL: dict[str, Any] = {"num_slots": 8, "image_size": 16, "patch_size": 4, "width": 16, "depth": 2, "num_heads": 2}


def encoder_of(**options: Any) -> SlotEncoder:
    torch.manual_seed(0)
    return SlotEncoder(**{"in_channels": 1, "causal": True, **SMALL, **options})


def decoder_of(**options: Any) -> SlotDecoder:
    torch.manual_seed(1)
    return SlotDecoder(**{"out_channels": 1, "nested": True, **SMALL, **options})


def tokenizer_of(
    quantizer: Quantizer, *, nested: bool = True, variational: bool = False, **options: Any
) -> VisualTokenizer:
    return VisualTokenizer(
        encoder=encoder_of(causal=nested),
        decoder=decoder_of(nested=nested),
        quantizer=quantizer,
        variational=variational,
        **{"embedding_dim": quantizer.embedding_dim, **options},
    ).eval()


def images(count: int = 2, size: int = 16) -> Tensor:
    return torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("causal", [True, False])
def test_a_slot_does_not_change_with_those_after_it(causal: bool) -> None:
    encoder = encoder_of(causal=causal)
    x = images()
    with torch.no_grad():
        before = encoder(x)
        encoder.slots[5].normal_()
        after = encoder(x)
        moved = (before - after).abs().amax(dim=(0, 1, 2))
        # Fewer slots are the first of more.
        fewer = encoder_of(causal=causal, num_slots=4)
        fewer.load_state_dict({**encoder.state_dict(), "slots": encoder.slots[:4]})
        of_fewer = fewer(x)
    assert bool((moved[5:] > 1e-3).all())
    assert bool((moved[:5] == 0).all()) == causal
    assert torch.allclose(of_fewer, after[..., :4], atol=1e-5) == causal


def test_who_sees_whom_by_hand() -> None:
    found = slots_see(3, 4)
    for row in range(7):
        for column in range(7):
            patch, earlier = column < 3, row >= 3 and column <= row
            assert bool(found[row, column]) == (patch or earlier)


def test_slots_see_the_whole_image() -> None:
    encoder, x = encoder_of(), images(1)
    other = x.clone()
    other[..., -4:, -4:] += 1
    with torch.no_grad():
        assert bool(((encoder(x) - encoder(other)).abs().amax(dim=1) > 1e-4).all())


@pytest.mark.parametrize("positions", ["sinusoidal", "none"])
def test_a_slot_knows_where_a_patch_stands(positions: str) -> None:
    """Moved patches are other slots; without positions, the control, they are the same ones."""
    encoder, x = encoder_of(), images(1)
    encoder.plane.positions = positions
    moved = x.unflatten(3, (4, 4)).roll(1, dims=3).flatten(3, 4)  # every column of patches one to the right
    with torch.no_grad():
        assert torch.allclose(encoder(x), encoder(moved), atol=1e-5) == (positions == "none")


def test_the_patches_of_an_image_differ_by_their_positions() -> None:
    decoder, features = decoder_of(nested=False), torch.randn(1, 16, 1, 8)

    def patches() -> Tensor:
        with torch.no_grad():
            return decoder(features).unflatten(3, (4, 4)).unflatten(2, (4, 4)).transpose(3, 4).flatten(2, 3)[0, 0]

    found = patches()  # [16, 4, 4]
    pairs = torch.cdist(found.flatten(1), found.flatten(1)) + torch.eye(16)
    assert float(pairs.min()) > 1e-3
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    add = decoder.plane.forward
    decoder.plane.forward = lambda tokens, grid: add(tokens, grid)[order]  # type: ignore[method-assign]
    torch.testing.assert_close(patches(), found[order], rtol=1e-4, atol=1e-5)
    decoder.plane.forward = lambda tokens, grid: tokens  # type: ignore[method-assign]
    alike = patches()
    torch.testing.assert_close(alike, alike[:1].expand_as(alike), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 4, 7])
def test_what_training_decodes_of_a_prefix_is_what_evaluation_does(count: int) -> None:
    """Of a tokenizer: nothing between the codes and the decoder looks at the slots that are dropped."""
    tokenizer = tokenizer_of(VectorQuantizer(num_embeddings=16, embedding_dim=4))
    nested = tokenizer.decoder.nested
    assert isinstance(nested, NestedDropout)
    x = images()
    with torch.no_grad():
        quantized = tokenizer.quantize_images(x)
        prefix = tokenizer.decode_prefix(quantized, count)
        nested.draw = lambda batch: torch.full((batch,), count)  # type: ignore[method-assign]
        in_training = tokenizer.train().reconstruct_full(x).reconstruction
        other = quantized.quantized.clone()
        other[..., count:] += 1
        of_other = tokenizer.decode(other)
    torch.testing.assert_close(in_training, prefix, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(of_other, prefix, rtol=1e-5, atol=1e-6)


def test_what_joins_neighbors_is_refused() -> None:
    quantizer = VectorQuantizer(num_embeddings=16, embedding_dim=4)
    said = "found {} with an encoder whose positions have no neighbors; expected none"
    with pytest.raises(VaevqMedError, match=said.format("a rectifier")):
        tokenizer_of(quantizer, rectifier=Rectifier(embedding_dim=4))
    with pytest.raises(VaevqMedError, match=said.format("cell 2")):
        tokenizer_of(quantizer, cell=2, embedding_dim=1)


def test_all_slots_are_no_dropout_to_the_bit() -> None:
    decoder, features = decoder_of(), torch.randn(3, 16, 1, 8)
    plain = decoder_of(nested=False)
    plain.load_state_dict({k: v for k, v in decoder.state_dict().items() if not k.startswith("nested.")})
    with torch.no_grad():
        whole = decoder.eval()(features)
        assert torch.equal(whole, plain(features))
        decoder.train()
        assert decoder.nested is not None
        decoder.nested.draw = lambda count: torch.full((count,), 8)  # type: ignore[method-assign]
        assert torch.equal(decoder(features), whole)
        for kept in (0, 3):  # as the first slots alone in evaluation
            decoder.train().nested.draw = lambda count, kept=kept: torch.full((count,), kept)  # type: ignore
            dropped = decoder(features)
            assert torch.equal(dropped, decoder.eval()(features[..., :kept]))
            assert not torch.allclose(dropped, whole)


def test_without_any_slot_there_is_one_image() -> None:
    decoder = decoder_of().eval()
    with torch.no_grad():
        image = decoder(torch.zeros(2, 16, 1, 0))
    assert image.shape == (2, 1, 16, 16)
    assert bool(image.isfinite().all())
    assert torch.equal(image[0], image[1])


def test_the_draw_is_even_seeded_and_of_training_alone() -> None:
    dropout = NestedDropout(num_slots=4, width=2, null_share=0.2)
    torch.manual_seed(3)
    first = dropout.draw(20_000)
    shares = torch.bincount(first, minlength=5) / len(first)
    expected = torch.tensor([0.2, *[0.8 / 4] * 4])
    # Four deviations of a share of 20,000 draws.
    assert bool(((shares - expected).abs() < 4 * (expected * (1 - expected) / 20_000).sqrt()).all())
    torch.manual_seed(3)
    assert torch.equal(dropout.draw(20_000), first)
    slots = torch.randn(64, 4, 2)
    assert not torch.equal(dropout(slots), slots)
    state = torch.get_rng_state()
    assert torch.equal(dropout.eval()(slots), slots)
    assert torch.equal(torch.get_rng_state(), state)
    assert int(NestedDropout(num_slots=3, width=1, null_share=0.0).draw(1000).min()) == 1


def ordered_axes(nested: bool) -> tuple[Tensor, float, float]:
    """|cos| of the columns of a linear decoder with the eigenvectors, its loss, and the least there is.

    The data are 6-D with a known covariance, exactly; the loss is the mean over every prefix (or that of all slots) of
    the squared error of a linear encoder, nested dropout and a linear decoder.
    """
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([4.0, 2.5, 1.5, 0.8, 0.3, 0.1], dtype=torch.float64)
    axes = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    # 12 points whose mean is 0 and whose covariance is axes diag(values) axes^T.
    rows = math.sqrt(6) * torch.cat([torch.eye(6, dtype=torch.float64), -torch.eye(6, dtype=torch.float64)])
    data = rows @ (axes * values.sqrt()).T
    slots = 3
    dropout = NestedDropout(num_slots=slots, width=1).double()
    encode, decode = (0.5 * torch.randn(6, slots, generator=generator, dtype=torch.float64) for _ in range(2))
    parameters = [encode.requires_grad_(), decode.requires_grad_(), dropout.null]
    prefixes = range(1, slots + 1) if nested else [slots]

    def loss() -> Tensor:
        latent = (data @ encode).unsqueeze(2)  # [N, slots, 1]
        errors = [
            (data - dropout.kept(latent, torch.full((len(data),), kept)).squeeze(2) @ decode.T).square().sum(dim=1)
            for kept in prefixes
        ]
        return torch.stack(errors).mean()

    optimizer = torch.optim.LBFGS(parameters, max_iter=2000, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    columns = decode.detach() / decode.detach().norm(dim=0)
    cosines = (columns * axes[:, :slots]).sum(dim=0).abs()
    inside = (axes[:, :slots].T @ columns).norm(dim=0)
    torch.testing.assert_close(inside, torch.ones_like(inside), rtol=0, atol=1e-3)  # the subspace in any case
    least = torch.stack([values[kept:].sum() for kept in prefixes]).mean()
    return cosines, loss().item(), least.item()


def test_nested_dropout_in_a_linear_network_finds_the_principal_axes_in_order() -> None:
    """Rippel et al., arXiv 1402.0915; without it the same space is found, and not its axes."""
    cosines, loss, least = ordered_axes(nested=True)
    assert loss == pytest.approx(least, rel=1e-6)
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-4)
    cosines, loss, least = ordered_axes(nested=False)
    assert loss == pytest.approx(least, rel=1e-6)
    assert float(cosines.min()) < 0.9


@pytest.mark.parametrize(
    "quantizer",
    [
        VectorQuantizer(num_embeddings=16, embedding_dim=4),
        SimVQ(num_embeddings=16, embedding_dim=4),
        FSQ(levels=[3, 3, 3]),
        MGVQ(num_embeddings=8, embedding_dim=4, num_codebooks=2),
        ResidualQuantizer(stages=[VectorQuantizer(num_embeddings=16, embedding_dim=4)], num_codebooks=2),
    ],
    ids=lambda quantizer: type(quantizer).__name__,
)
def test_any_quantizer_makes_tokens_of_slots(quantizer: Quantizer) -> None:
    tokenizer = tokenizer_of(quantizer, variational=isinstance(quantizer, SimVQ))
    x = images()
    with torch.no_grad():
        indices = tokenizer.encode_indices(x)
        assert indices.shape == (2, 1, 8, quantizer.num_codebooks)
        assert tokenizer.grid_of((16, 16)) == (1, 8)
        assert torch.equal(tokenizer.decode_indices(indices), tokenizer(x))
        latent, posterior = tokenizer._mode(x)
        quantized = tokenizer.quantize(latent, posterior)
        assert tokenizer.prefixes == tuple(range(1, 9))
        assert torch.equal(tokenizer.first_indices(indices, 3), indices[:, :, :3])
        assert torch.equal(tokenizer.decode_prefix(quantized, 8), tokenizer(x))
        codes = quantizer.indices_to_codes(indices)[..., :3].contiguous()
        torch.testing.assert_close(tokenizer.decode_prefix(quantized, 3), tokenizer.decode(codes))
        for count in (0, 9):
            with pytest.raises(VaevqMedError, match=f"count is {count}; expected 1 to 8"):
                tokenizer.decode_prefix(quantized, count)
    assert tokenizer.bits()["bits_per_pixel"] * 256 == pytest.approx(8 * (quantizer.bits_per_position or 0))
    output = tokenizer.train().reconstruct_full(x, noise=tokenizer.draw_noise(x))
    output.reconstruction.square().sum().backward()
    assert all(p.grad is not None for p in (*tokenizer.encoder.parameters(), *tokenizer.decoder.parameters()))


def test_prefixes_of_codebooks_are_those_of_the_quantizer() -> None:
    stages = ResidualQuantizer(stages=[VectorQuantizer(num_embeddings=16, embedding_dim=4)], num_codebooks=3)
    tokenizer = tokenizer_of(stages, nested=False)
    with torch.no_grad():
        quantized = tokenizer.quantize(tokenizer._mode(images())[0])
        assert tokenizer.num_prefixes == 3
        expected = tokenizer.decode(stages.indices_to_codes(quantized.indices, num_stages=2).contiguous())
        torch.testing.assert_close(tokenizer.decode_prefix(quantized, 2), expected)
    assert tokenizer_of(Continuous(embedding_dim=4), nested=False).num_prefixes == 1


def test_under_autocast_it_is_the_same_to_the_rounding_of_bf16() -> None:
    encoder, decoder, x = encoder_of(), decoder_of().eval(), images()
    with torch.no_grad():
        exact = decoder(encoder(x))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = decoder(encoder(x).bfloat16()[..., :8])
            assert decoder(encoder(x).bfloat16()[..., :2]).shape == exact.shape
    assert 0 < (rounded.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_what_does_not_fit_is_refused_in_a_line() -> None:
    assert slot_factors(16, 8) == (16, 2)
    for options, said in (
        ({"num_slots": 5}, "num_slots is 5 with image_size 16; expected a divisor of it"),
        ({"image_size": 18}, "image_size is 18; expected a multiple of patch_size, 4"),
        ({"depth": 0}, "depth is 0; expected at least 1"),
    ):
        with pytest.raises(VaevqMedError, match=said):
            encoder_of(**options)
        with pytest.raises(VaevqMedError, match=said):
            decoder_of(**options)
    with pytest.raises(VaevqMedError, match="the image is 32x32; expected 16x16, the one size"):
        encoder_of()(images(size=32))
    with pytest.raises(VaevqMedError, match=r"null_share is 1\.0; expected from 0 to below 1"):
        decoder_of(null_share=1.0)
    for nested, given, said in ((True, 9, "0 to 8 slots"), (False, 7, r"1, n\] of 8 slots"), (True, 3, "expected")):
        features = torch.zeros(1, 16, 2 if given == 3 else 1, given)
        with pytest.raises(VaevqMedError, match=said):
            decoder_of(nested=nested)(features)
