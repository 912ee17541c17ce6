"""The vision transformers around a quantizer: what they are without blocks, without positions and at other sizes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks import VisualTokenizer, ViTDecoder, ViTEncoder
from vaevq_med.networks.quantizers import Continuous, VectorQuantizer
from vaevq_med.networks.transformer import TransformerBlock, sine_positions

SMALL: dict[str, Any] = {"image_size": 16, "patch_size": 4, "width": 16, "num_heads": 2}


def halves(channels: int = 1, **options: Any) -> tuple[ViTEncoder, ViTDecoder]:
    torch.manual_seed(0)
    sizes = {**SMALL, "depth": 2, **options}
    return ViTEncoder(in_channels=channels, **sizes), ViTDecoder(out_channels=channels, **sizes)


def images(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("exact", [True, False], ids=["permutation", "rotation"])
def test_without_blocks_orthogonal_patches_are_the_identity(exact: bool) -> None:
    """Of a permutation of the pixels to the bit, of any orthogonal matrix to rounding."""
    encoder, decoder = halves(channels=3, width=48, depth=0, positions="none")
    generator = torch.Generator().manual_seed(3)
    matrix = torch.eye(48)[torch.randperm(48, generator=generator)]
    if not exact:
        matrix = torch.linalg.qr(torch.randn(48, 48, generator=generator)).Q
    tokenizer = VisualTokenizer(
        encoder=encoder,
        decoder=decoder,
        quantizer=Continuous(embedding_dim=48),
        embedding_dim=48,
        variational=False,
    )
    with torch.no_grad():
        encoder.first_layer.copy_(matrix.view(48, 3, 4, 4))
        decoder.last_layer.copy_(matrix.T.reshape(3, 4, 4, 48))
        for layer in (tokenizer.quant_conv, tokenizer.post_quant_conv):
            nn.init.dirac_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    x = images(2, 3, 16, 24)
    if exact:
        assert torch.equal(decoder(encoder(x)), x)
        assert torch.equal(tokenizer(x), x)
    else:
        torch.testing.assert_close(decoder(encoder(x)), x, rtol=0, atol=1e-5)


def shuffled(x: Tensor, order: Tensor) -> Tensor:
    """Images whose patches of 4 pixels stand in another order."""
    rows, columns = (size // 4 for size in x.shape[2:])
    patches = x.unflatten(3, (columns, 4)).unflatten(2, (rows, 4)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)[:, order]
    return patches.unflatten(1, (rows, columns)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


@pytest.mark.parametrize("positions", ["none", "sinusoidal"])
def test_without_positions_the_order_of_the_patches_does_not_matter(positions: str) -> None:
    encoder, decoder = halves(positions=positions)
    x, order = images(1, 1, 16, 16), torch.randperm(16, generator=torch.Generator().manual_seed(2))
    of_shuffled = encoder(shuffled(x, order)).flatten(2)
    then_shuffled = encoder(x).flatten(2)[..., order]
    assert torch.allclose(of_shuffled, then_shuffled, atol=1e-5) == (positions == "none")
    features = torch.randn(1, 16, 4, 4)
    moved = decoder(features.flatten(2)[..., order].unflatten(2, (4, 4)))
    assert torch.allclose(moved, shuffled(decoder(features), order), atol=1e-5) == (positions == "none")


def test_positions_by_hand() -> None:
    found = sine_positions((3, 5), 8, known=(3, 5)).numpy()
    for row in range(3):
        for column in range(5):
            parts = [
                f(place * 10_000 ** (-k / 2)) for place in (row, column) for f in (math.sin, math.cos) for k in (0, 1)
            ]
            np.testing.assert_allclose(found[5 * row + column], parts, atol=1e-5)


def test_positions_of_another_size_are_interpolated() -> None:
    """Twice as many positions lie a quarter of a step before and behind the known ones, half as many between two."""
    known = (4, 4)
    finer = sine_positions((8, 4), 4, known=known).view(8, 4, 4)
    places = torch.arange(4.0)
    torch.testing.assert_close(finer[0::2, 0, 0], torch.sin(places - 0.25))
    torch.testing.assert_close(finer[1::2, 0, 0], torch.sin(places + 0.25))
    coarser = sine_positions((2, 4), 4, known=known).view(2, 4, 4)
    torch.testing.assert_close(coarser[:, 0, 0], torch.sin(torch.tensor([0.5, 2.5])))


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (8, 24), (4, 4)])
def test_images_of_other_sizes_have_grids_of_theirs(size: tuple[int, int]) -> None:
    encoder, decoder = halves()
    features = encoder(images(2, 1, *size))
    assert features.shape == (2, 16, size[0] // 4, size[1] // 4)
    assert decoder(features).shape == (2, 1, *size)


def test_a_block_is_that_of_torch() -> None:
    torch.manual_seed(0)
    ours = TransformerBlock(width=16, num_heads=4, mlp_ratio=2.0)
    theirs = nn.TransformerEncoderLayer(
        16, 4, 32, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    )
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.3)
    names = {"norm1": "norm1", "norm2": "norm2", "self_attn.out_proj": "projection"}
    names |= {"linear1": "mlp.0", "linear2": "mlp.2"}
    state = {f"{a}.{kind}": ours.state_dict()[f"{b}.{kind}"] for a, b in names.items() for kind in ("weight", "bias")}
    state |= {f"self_attn.in_proj_{kind}": ours.state_dict()[f"qkv.{kind}"] for kind in ("weight", "bias")}
    theirs.load_state_dict(state)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    torch.testing.assert_close(ours(x, seen), theirs(x, src_mask=~seen), rtol=1e-5, atol=1e-5)


def test_under_autocast_it_is_the_same_to_the_rounding_of_bf16() -> None:
    encoder, decoder = halves()
    x = images(2, 1, 16, 16)
    with torch.no_grad():
        exact = decoder(encoder(x))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = decoder(encoder(x))
    assert rounded.dtype is torch.bfloat16
    assert 0 < (rounded.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_blocks_computed_again_have_the_same_gradients() -> None:
    encoder, decoder = halves()
    x = images(2, 1, 16, 16)

    def gradients() -> list[Tensor]:
        parameters = [*encoder.parameters(), *decoder.parameters()]
        return list(torch.autograd.grad(decoder(encoder(x)).square().sum(), parameters))

    kept = gradients()
    for half in (encoder, decoder):
        half.recompute_levels([0])
        with pytest.raises(VaevqMedError, match="expected levels from 0 to 0"):
            half.recompute_levels([1])
    again = gradients()
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_what_does_not_fit_is_refused_in_a_line() -> None:
    encoder, decoder = halves()
    for shape, said in (
        ((1, 1, 16), "expected a batch, channels and 2 axes"),
        ((1, 3, 16, 16), "expected 1"),
        ((1, 1, 18, 16), "no multiple of the downsampling factor 4"),
    ):
        with pytest.raises(VaevqMedError, match=said):
            encoder(torch.zeros(*shape))
    with pytest.raises(VaevqMedError, match="decoder's input has 8 channels"):
        decoder(torch.zeros(1, 8, 4, 4))
    for options, said in (
        ({"image_size": 18}, "image_size is 18; expected a multiple of patch_size, 4"),
        ({"width": 18}, "width is 18; expected a multiple of 4"),
        ({"num_heads": 3}, "expected a multiple of num_heads"),
        ({"positions": "learned"}, "positions is 'learned'; expected one of sinusoidal, none"),
    ):
        with pytest.raises(VaevqMedError, match=said):
            halves(**options)
    with pytest.raises(VaevqMedError, match="the decoder enlarges by 8; expected 4"):
        VisualTokenizer(
            encoder=encoder,
            decoder=halves(patch_size=8)[1],
            quantizer=VectorQuantizer(num_embeddings=4, embedding_dim=2),
            embedding_dim=2,
        )
