"""Mo-VQGAN's decoder: by hand, beside the plain decoder that it extends, and through the bundle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.bundles import evaluate, run_bundle
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.blocks import ResidualBlock
from vaevq_med.networks.decoder import Decoder, ModulatedDecoder, ModulatedNorm
from vaevq_med.networks.encoder import Encoder, vqgan_preset
from vaevq_med.networks.quantizers import SimVQ
from vaevq_med.networks.tokenizer import VisualTokenizer

SMALL: dict[str, Any] = {
    "num_channels": 8,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [16],
    "image_size": 32,
    "z_channels": 8,
}


def tokenizer(variational: bool) -> VisualTokenizer:
    torch.manual_seed(0)
    return VisualTokenizer(
        encoder=Encoder(in_channels=1, **SMALL),
        decoder=ModulatedDecoder(out_channels=1, embedding_dim=4, **SMALL),
        quantizer=SimVQ(num_embeddings=16, embedding_dim=4),
        embedding_dim=4,
        variational=variational,
    ).eval()


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_a_modulated_norm_by_hand() -> None:
    norm = ModulatedNorm(1, spatial_dims=2, embedding_dim=1)
    with torch.no_grad():
        for layer, weight, bias in ((norm.scale, 2.0, 1.0), (norm.shift, -1.0, 0.5)):
            layer.weight.fill_(weight)
            layer.bias.fill_(bias)
    # Mean 1 and standard deviation 1: the normalized rows are -1 -1 1 1.
    x = torch.tensor([0.0, 0.0, 2.0, 2.0]).expand(1, 1, 2, 4)
    codes = torch.tensor([3.0, -2.0]).view(1, 1, 1, 2)
    # Left half: scale 2*3+1 = 7, shift -3+0.5 = -2.5; right half: scale -3, shift 2.5.
    expected = torch.tensor([-9.5, -9.5, -0.5, -0.5]).expand(1, 1, 2, 4)
    torch.testing.assert_close(norm(x, codes), expected, atol=1e-4, rtol=0)
    with pytest.raises(VaevqMedError, match="found no codes"):
        norm(x)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_modulated_norm_is_that_of_enlarged_codes(spatial_dims: int) -> None:
    torch.manual_seed(0)
    norm = ModulatedNorm(6, spatial_dims=spatial_dims, embedding_dim=3).double()
    nn.init.normal_(norm.norm.weight)
    nn.init.normal_(norm.norm.bias)
    x = torch.randn(2, 6, *[8] * spatial_dims, dtype=torch.float64)
    codes = torch.randn(2, 3, *[2] * spatial_dims, dtype=torch.float64)
    enlarged = codes
    for axis in range(2, 2 + spatial_dims):
        enlarged = enlarged.repeat_interleave(4, dim=axis)
    direct = norm.norm(x) * norm.scale(enlarged) + norm.shift(enlarged)
    torch.testing.assert_close(norm(x, codes), direct)


# Channels of all GroupNorms of the f = 8 decoder: 512 * (5 middle + 9 + 1), 256 * (5 + 6 + 1), 128 * (5 + 1 head);
# each normalization of C channels has two 1x1 convolutions of C * (D + 1).
@pytest.mark.parametrize(("dim", "extra"), [(4, 2 * 11520 * 5), (64, 2 * 11520 * 65)])
def test_how_many_parameters_the_modulation_adds(dim: int, extra: int) -> None:
    assert extra == {4: 115_200, 64: 1_497_600}[dim]
    with torch.device("meta"):
        plain = Decoder(out_channels=3, **vqgan_preset(8))
        modulated = ModulatedDecoder(embedding_dim=dim, out_channels=3, **vqgan_preset(8))
    assert count(modulated) - count(plain) == extra


def test_the_published_small_model_has_67_million_parameters() -> None:
    shared = {**vqgan_preset(8), "z_channels": 4}
    with torch.device("meta"):
        model = nn.ModuleList([Encoder(in_channels=3, **shared), ModulatedDecoder(embedding_dim=4, **shared)])
    assert count(model) // 1_000_000 == 67


def test_no_group_norm_is_left_alone() -> None:
    decoder = ModulatedDecoder(embedding_dim=4, **SMALL)
    modulated = {id(module.norm) for module in decoder.modules() if isinstance(module, ModulatedNorm)}
    plain = [module for module in decoder.modules() if isinstance(module, nn.GroupNorm)]
    # Middle; the coarse level (16 pixels) of two residual blocks and two attentions; the fine one; head.
    assert len(plain) == 5 + (4 + 2) + 4 + 1
    assert modulated == {id(module) for module in plain}


@pytest.mark.parametrize(("kind", "dim"), [(ModulatedDecoder, None), (Decoder, 4)])
def test_a_decoder_reads_codes_or_does_not(kind: type[Decoder], dim: int | None) -> None:
    with pytest.raises(VaevqMedError, match=f"embedding_dim is {dim}; expected"):
        kind(embedding_dim=dim, **SMALL)


def test_at_scale_one_and_shift_zero_it_is_the_plain_decoder() -> None:
    torch.manual_seed(0)
    plain = Decoder(out_channels=1, **SMALL)
    modulated = ModulatedDecoder(out_channels=1, embedding_dim=4, **SMALL)
    norms = {name for name, module in modulated.named_modules() if isinstance(module, ModulatedNorm)}
    with torch.no_grad():
        for name in norms:
            norm = modulated.get_submodule(name)
            for layer, value in ((norm.scale, 1.0), (norm.shift, 0.0)):
                layer.weight.zero_()
                layer.bias.fill_(value)
    renamed = {}
    for key, value in plain.state_dict().items():
        module, leaf = key.rsplit(".", 1)
        renamed[f"{module}.norm.{leaf}" if module in norms else key] = value
    left = modulated.load_state_dict(renamed, strict=False)
    assert not left.unexpected_keys
    assert all(".scale." in key or ".shift." in key for key in left.missing_keys)
    features, codes = torch.randn(2, 8, 16, 16), torch.randn(2, 4, 16, 16)
    torch.testing.assert_close(modulated(features, codes), plain(features))


def test_the_plain_blocks_kept_their_names_and_values() -> None:
    """The seeded forward pass of the decoder before blocks took a condition."""
    torch.manual_seed(0)
    decoder = Decoder(out_channels=1, **SMALL)
    keys = list(decoder.state_dict())
    assert keys[:4] == ["layers.0.weight", "layers.0.bias", "layers.1.0.norm1.weight", "layers.1.0.norm1.bias"]
    assert keys[-4:] == ["head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"]
    features = torch.linspace(-1, 1, 8 * 16 * 16).view(1, 8, 16, 16)
    expected = torch.tensor(
        [
            [0.1091, 0.2498, 0.0289, -0.4513],
            [0.2246, 0.0562, 0.1444, 0.3251],
            [0.3397, 0.2301, 0.0155, -0.0867],
            [0.0284, -0.1977, -0.1258, 0.9984],
        ]
    )
    torch.testing.assert_close(decoder(features)[0, 0, ::8, ::8], expected, atol=2e-4, rtol=0)
    block = ResidualBlock(spatial_dims=2, in_channels=4, out_channels=4)
    x = torch.randn(1, 4, 3, 3)
    h = block.conv1(F.silu(block.norm1(x)))
    assert torch.equal(block(x), x + block.conv2(F.silu(block.norm2(h))))


def test_each_path_of_vlq_is_modulated_by_its_own_latent() -> None:
    network = tokenizer(variational=True)
    images = torch.rand(3, 1, 32, 32) * 2 - 1
    output = network.reconstruct_full(images, torch.Generator().manual_seed(5))
    sample = network.encode(images).sample(torch.Generator().manual_seed(5))
    for path, codes in (
        (output.reconstruction, output.quantizer.quantized),
        (output.reconstruction_continuous, sample),
    ):
        alone = network.decoder(network.post_quant_conv(codes), codes)
        torch.testing.assert_close(path, alone)
    assert not torch.allclose(output.reconstruction, output.reconstruction_continuous)


def test_the_modulation_alone_carries_the_codes_and_their_gradient() -> None:
    network = tokenizer(variational=False)
    features = torch.zeros(1, 8, 16, 16)
    codes = torch.randn(1, 4, 16, 16, requires_grad=True)
    image: Tensor = network.decoder(features, codes)
    (gradient,) = torch.autograd.grad(image.square().sum(), codes)
    assert bool((gradient.abs().sum(dim=1) > 0).all())
    assert not torch.allclose(image, network.decoder(features, 2 * codes))


def test_indices_decode_to_the_reconstruction() -> None:
    network = tokenizer(variational=False)
    images = torch.rand(2, 1, 32, 32) * 2 - 1
    torch.testing.assert_close(network.decode_indices(network.encode_indices(images)), network(images))


def test_codes_of_another_width_are_refused() -> None:
    parts = {"encoder": Encoder(in_channels=1, **SMALL), "quantizer": SimVQ(num_embeddings=16, embedding_dim=4)}
    decoder = ModulatedDecoder(out_channels=1, embedding_dim=6, **SMALL)
    with pytest.raises(VaevqMedError, match="the decoder's embedding_dim is 6; expected 4"):
        VisualTokenizer(decoder=decoder, embedding_dim=4, **parts)
    with pytest.raises(VaevqMedError, match="the decoder's codes has 4 channels"):
        decoder(torch.zeros(1, 8, 16, 16), torch.zeros(1, 4, 16, 16))


def test_the_overlay_trains_with_the_published_gan_and_evaluates(toy_overrides: dict[str, Any]) -> None:
    kept = {key: value for key, value in toy_overrides.items() if not key.startswith("objective#adversarial")}
    gan = {
        "objective#adversarial#weight": 0.1,
        "objective#adversarial#adaptive": False,
        "objective#adversarial#start_step": 0,
    }
    overrides = {**kept, **gan, "max_epochs": 1, "val_max_items": 4, "objective#weights#perceptual": 0.0}
    parser = run_bundle("train.json", overrides, "mo_vqgan", run_id="training")
    network = parser.get_parsed_content("network")
    assert type(network.decoder) is ModulatedDecoder
    trainer = parser.get_parsed_content("train#trainer")
    assert "adaptive_weight" not in trainer.state.terms
    assert "adversarial" in trainer.state.terms
    moved = [p for p in network.decoder.parameters() if p.grad is not None and bool(p.grad.any())]
    assert len(moved) == len(list(network.decoder.parameters()))
    evaluate(overrides)
