"""Backbone, posterior, discriminator and tokenizer, and that MONAI's inferers take it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.quantizer_cases import all_cases
from helpers.toy_networks import tokenizer
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.blocks import AttentionBlock, Downsample, ResidualBlock, Upsample
from vaevq_med.networks.decoder import Decoder
from vaevq_med.networks.discriminator import PatchDiscriminator
from vaevq_med.networks.encoder import Encoder, vqgan_preset
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.quantizers import SimVQ, VectorQuantizer
from vaevq_med.networks.tokenizer import TrainingForward, VisualTokenizer, released_estimator

ALL_CASES = all_cases()


def count(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


# Measured on taming's own code, with three channels and z_channels 256.
@pytest.mark.parametrize(("factor", "encoder", "decoder"), [(8, 28.56, 41.42), (16, 29.30, 42.45)])
def test_presets_have_the_published_number_of_parameters(factor: int, encoder: float, decoder: float) -> None:
    preset = vqgan_preset(factor)
    with torch.device("meta"):
        assert count(Encoder(in_channels=3, **preset)) == pytest.approx(encoder, abs=0.01)
        assert count(Decoder(out_channels=3, **preset)) == pytest.approx(decoder, abs=0.01)


def test_every_preset_downsamples_by_its_factor() -> None:
    for factor in (4, 8, 16):
        with torch.device("meta"):
            encoder = Encoder(in_channels=1, **vqgan_preset(factor))
            features = encoder(torch.zeros(1, 1, 256, 256))
        assert features.shape == (1, 256, 256 // factor, 256 // factor)
        assert encoder.downsampling_factor == factor
    with pytest.raises(VaevqMedError, match="factor 5"):
        vqgan_preset(5)


def test_attention_stands_where_it_is_listed() -> None:
    def attentions(resolutions: list[int]) -> int:
        preset = {**vqgan_preset(8), "attention_resolutions": resolutions}
        with torch.device("meta"):
            return sum("Attention" in type(m).__name__ for m in Encoder(in_channels=1, **preset).modules())

    # One in the middle, always; two residual blocks at the listed resolution.
    assert attentions([]) == 1
    assert attentions([32]) == 3


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("variational", [False, True])
def test_shapes_and_the_same_image_from_indices(levels: int, channels: int, variational: bool) -> None:
    network = tokenizer(levels=levels, channels=channels, variational=variational)
    images = torch.rand(2, channels, 32, 32) * 2 - 1
    side = 32 // 2**levels
    indices = network.encode_indices(images)
    assert indices.shape == (2, side, side, 1)
    reconstruction = network(images)
    assert reconstruction.shape == images.shape
    assert torch.equal(network.decode_indices(indices), reconstruction)
    certain = torch.nn.functional.one_hot(indices[..., 0], network.num_embeddings).float()
    assert torch.equal(network.decode_soft(certain), reconstruction)
    output = TrainingForward(network)(images)
    assert output.latent.shape == (2, 4, side, side)
    assert (output.reconstruction_continuous is not None) == (output.posterior is not None) == variational


def test_an_image_that_does_not_fit_the_grid_is_refused() -> None:
    with pytest.raises(VaevqMedError, match="30"):
        tokenizer(levels=2)(torch.zeros(1, 1, 30, 30))


def test_both_paths_of_one_decoder_call_equal_two_calls() -> None:
    network = tokenizer()
    images = torch.rand(2, 1, 32, 32) * 2 - 1
    calls = []
    network.decoder.register_forward_hook(lambda *_: calls.append(1))
    output = network.reconstruct_full(images, torch.Generator().manual_seed(3))
    assert len(calls) == 1
    posterior = network.encode(images)
    sample = posterior.sample(torch.Generator().manual_seed(3))
    torch.testing.assert_close(output.reconstruction_continuous, network.decode(sample), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        output.reconstruction, network.decode(network.quantize(sample).codes), atol=1e-5, rtol=1e-5
    )


def test_quantize_from_chooses_the_latent() -> None:
    images = torch.rand(1, 1, 32, 32) * 2 - 1
    for choice in ("sample", "mean"):
        network = tokenizer(quantize_from=choice)
        mean = network.encode(images).mean
        assert torch.equal(network.reconstruct_full(images).latent, mean) == (choice == "mean")
    with pytest.raises(VaevqMedError, match="expected one of sample, mean"):
        tokenizer(quantize_from="mode")


def test_released_estimator_gradients_by_hand() -> None:
    mean = torch.tensor([0.5, -1.0]).view(1, 2, 1, 1).requires_grad_()
    logvar = torch.tensor([0.0, 2.0]).view(1, 2, 1, 1).requires_grad_()
    codes = torch.tensor([2.0, 3.0]).view(1, 2, 1, 1).requires_grad_()
    posterior = DiagonalGaussian(mean, logvar)
    value = released_estimator(codes, posterior)
    assert torch.equal(value, codes)
    upstream = torch.tensor([1.0, 10.0]).view(1, 2, 1, 1)
    to_mean, to_std, to_codes = torch.autograd.grad(value, (mean, posterior.std, codes), upstream)
    assert torch.equal(to_mean, upstream)
    assert torch.equal(to_codes, upstream)
    torch.testing.assert_close(to_std, upstream * (codes - mean).detach() / posterior.std.detach())


def test_released_estimator_trains_the_codebook_through_the_decoder() -> None:
    images = torch.rand(1, 1, 32, 32) * 2 - 1
    for estimator in ("straight_through", "released"):
        network = tokenizer(estimator=estimator)
        output = network.reconstruct_full(images)
        (gradient,) = torch.autograd.grad(
            output.reconstruction.sum(), network.quantizer.projection.weight, allow_unused=True
        )
        assert (gradient is not None) == (estimator == "released")


def test_posterior_kl_equals_torch_distributions() -> None:
    mean, logvar = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    reference = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(DiagonalGaussian(mean, logvar).kl(), reference)


def test_posterior_sample_is_reparameterized() -> None:
    mean, logvar = torch.zeros(1, 1, 2, 2, requires_grad=True), torch.full((1, 1, 2, 2), 2.0, requires_grad=True)
    noise = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(5))
    sample = DiagonalGaussian(mean, logvar).sample(torch.Generator().manual_seed(5))
    torch.testing.assert_close(sample, math.e * noise)
    to_mean, to_logvar = torch.autograd.grad(sample.sum(), (mean, logvar))
    torch.testing.assert_close(to_mean, torch.ones_like(noise))
    torch.testing.assert_close(to_logvar, 0.5 * math.e * noise)


def test_posterior_is_fp32_whatever_it_is_given() -> None:
    half = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    posterior = DiagonalGaussian(half, half)
    assert {posterior.mean.dtype, posterior.logvar.dtype, posterior.std.dtype} == {torch.float32}


def test_residual_block_by_torch_functions() -> None:
    block = ResidualBlock(spatial_dims=2, in_channels=32, out_channels=64)
    x = torch.randn(2, 32, 5, 6)

    def half(x: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d) -> Tensor:
        x = F.group_norm(x, 32, norm.weight, norm.bias, 1e-6)
        return F.conv2d(x * torch.sigmoid(x), conv.weight, conv.bias, padding=1)

    expected = half(half(x, block.norm1, block.conv1), block.norm2, block.conv2)
    expected = expected + F.conv2d(x, block.shortcut.weight, block.shortcut.bias)
    torch.testing.assert_close(block(x), expected)


def test_attention_by_explicit_softmax() -> None:
    block = AttentionBlock(spatial_dims=2, num_channels=8)
    x = torch.randn(2, 8, 3, 4)
    query, key, value = (layer(block.norm(x)).flatten(2) for layer in (block.query, block.key, block.value))
    weights = torch.softmax(torch.einsum("bci,bcj->bij", query, key) / 8**0.5, dim=2)
    attended = torch.einsum("bij,bcj->bci", weights, value).view_as(x)
    torch.testing.assert_close(block(x), x + block.projection(attended))


def test_downsampling_pads_right_and_bottom_and_upsampling_repeats() -> None:
    """As taming does; padding on the left would shift the grid."""
    down, up = Downsample(spatial_dims=2, num_channels=1), Upsample(spatial_dims=2, num_channels=1)
    with torch.no_grad():
        down.conv.weight.fill_(1)
        down.conv.bias.zero_()
        up.conv.weight.zero_()
        up.conv.weight[..., 1, 1] = 1
        up.conv.bias.zero_()
    x = torch.arange(1.0, 17).view(1, 1, 4, 4)
    assert down(x).flatten().tolist() == [54.0, 45.0, 72.0, 54.0]
    assert up(x[..., :2, :2])[0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [5, 5, 6, 6], [5, 5, 6, 6]]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("quantizer", ["simvq", "fsq-projection", "softvq-hard-plain", "gaussian-grouped"])
@pytest.mark.parametrize("size", [(16,), (4, 6), (4, 6, 8)])
def test_signals_images_and_volumes(size: tuple[int, ...], quantizer: str) -> None:
    torch.manual_seed(0)
    shared: dict[str, Any] = {
        "spatial_dims": len(size), "num_channels": 4, "channel_mult": [1, 2], "num_res_blocks": 1,
        "attention_resolutions": [], "z_channels": 4,
    }  # fmt: skip
    inner = ALL_CASES[quantizer].make()
    dim, grid = inner.embedding_dim, tuple(side // 2 for side in size)
    network = VisualTokenizer(
        encoder=Encoder(in_channels=1, **shared),
        decoder=Decoder(out_channels=1, **shared),
        quantizer=inner,
        embedding_dim=dim,
    )
    images = torch.randn(2, 1, *size)
    output = network.reconstruct_full(images, noise=network.draw_noise(images))
    assert output.latent.shape == (2, dim, *grid)
    assert output.reconstruction.shape == images.shape
    network.eval()
    indices = network.encode_indices(images)
    assert indices.shape == (2, *grid, inner.num_codebooks)
    assert torch.equal(network.decode_indices(indices), network(images))
    torch.testing.assert_close(torch.jit.trace(network, images, check_trace=False)(images), network(images))
    if inner.num_codebooks == 1:
        assert torch.equal(network.decode_samples(network.index_quantize(images)), network(images))


def test_backbone_refuses_what_does_not_fit() -> None:
    with pytest.raises(VaevqMedError, match="has 3 channels"):
        tokenizer()(torch.zeros(1, 3, 32, 32))
    with pytest.raises(VaevqMedError, match=r"has \[7\]"):
        Encoder(attention_resolutions=[7])
    with pytest.raises(VaevqMedError, match="channel_mult is empty"):
        Decoder(channel_mult=[], attention_resolutions=[])
    with pytest.raises(VaevqMedError, match="spatial_dims is 4"):
        Encoder(spatial_dims=4)


def test_posterior_samples_have_its_moments() -> None:
    mean = torch.full((1, 1, 200, 200), 3.0)
    posterior = DiagonalGaussian(mean, torch.full_like(mean, 2.0).log())
    sample = posterior.sample(torch.Generator().manual_seed(0))
    assert float(sample.mean()) == pytest.approx(3, abs=0.03)
    assert float(sample.var()) == pytest.approx(2, rel=0.03)
    assert torch.equal(posterior.mode(), mean)


def test_posterior_stays_finite_at_extremes() -> None:
    logvar = torch.tensor([-1e4, 1e4]).view(1, 2, 1, 1)
    posterior = DiagonalGaussian(torch.zeros(1, 2, 1, 1), logvar)
    assert bool(posterior.std.isfinite().all())
    assert float(posterior.std.min()) > 0


def test_patch_discriminator_is_the_published_one() -> None:
    discriminator = PatchDiscriminator(in_channels=3)
    assert count(discriminator) == pytest.approx(2.77, abs=0.01)
    assert discriminator(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    assert PatchDiscriminator(in_channels=3, num_layers=2)(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 62, 62)
    convolutions = [m for m in discriminator.modules() if isinstance(m, nn.Conv2d)]
    assert float(torch.cat([c.weight.flatten() for c in convolutions]).std()) == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize(("norm", "kind"), [("batch", nn.BatchNorm2d), ("group", nn.GroupNorm), ("none", None)])
def test_patch_discriminator_norms(norm: str, kind: type[nn.Module] | None) -> None:
    discriminator = PatchDiscriminator(in_channels=1, num_channels=8, norm=norm)
    norms = [m for m in discriminator.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]
    assert [type(m) for m in norms] == ([] if kind is None else [kind] * 3)
    # Only batch normalization lets an image's logits depend on the others.
    images = torch.randn(2, 1, 32, 32)
    alone = discriminator(images[:1])
    assert torch.allclose(discriminator(images)[:1], alone, atol=1e-6) == (norm != "batch")


def test_patch_discriminator_refuses_options() -> None:
    with pytest.raises(VaevqMedError, match="norm is 'layer'"):
        PatchDiscriminator(norm="layer")
    with pytest.raises(VaevqMedError, match="num_layers is 0"):
        PatchDiscriminator(num_layers=0)
    with pytest.raises(VaevqMedError, match="has 1 channels"):
        PatchDiscriminator(in_channels=3)(torch.zeros(1, 1, 32, 32))


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(VaevqMedError, match="embedding_dim is 4"):
        tokenizer(quantizer=VectorQuantizer(num_embeddings=4, embedding_dim=5))
    with pytest.raises(VaevqMedError, match="variational false"):
        tokenizer(variational=False, estimator="released")


@pytest.mark.parametrize("assignment", ["euclidean", "posterior"])
def test_first_stage_interface(assignment: str) -> None:
    network = tokenizer(quantizer=SimVQ(num_embeddings=16, embedding_dim=4, assignment=assignment))
    images = torch.rand(2, 1, 32, 32) * 2 - 1
    assert torch.equal(network.encode_stage_2_inputs(images), network.encode(images).mean)
    indices = network.index_quantize(images)
    assert indices.shape == (2, 8, 8)
    assert torch.equal(network.decode_samples(indices), network(images))
    # A generated latent has no posterior: whatever the assignment, its nearest codewords are decoded.
    latent = torch.randn(1, 4, 8, 8)
    codebook = network.quantizer.codebook()
    nearest = (latent.permute(0, 2, 3, 1)[..., None, :] - codebook).square().sum(-1).argmin(-1)
    assert torch.equal(network.decode_stage_2_outputs(latent), network.decode_samples(nearest))
    assert network.num_embeddings == 16


def test_last_layer_makes_the_image() -> None:
    network = tokenizer(channels=3)
    assert network.last_layer.shape == (3, 8, 3, 3)
    with torch.no_grad():
        network.last_layer.zero_()
    image = network(torch.rand(1, 3, 32, 32))
    assert torch.equal(image, image[..., :1, :1].expand_as(image))


def test_monai_latent_diffusion_inferer_runs_unmodified() -> None:
    from monai.inferers import LatentDiffusionInferer
    from monai.networks.nets import DiffusionModelUNet
    from monai.networks.schedulers import DDIMScheduler

    network = tokenizer(levels=2)
    unet = DiffusionModelUNet(
        spatial_dims=2, in_channels=4, out_channels=4, channels=(8, 8), attention_levels=(False, False),
        num_res_blocks=1, norm_num_groups=4,
    )  # fmt: skip
    scheduler = DDIMScheduler(num_train_timesteps=10)
    scheduler.set_timesteps(2)
    inferer = LatentDiffusionInferer(scheduler, scale_factor=1.0)
    images = torch.rand(1, 1, 32, 32) * 2 - 1
    noise = torch.randn(1, 4, 8, 8)
    predicted = inferer(images, network, unet, noise, torch.tensor([3]))
    assert predicted.shape == noise.shape
    sampled = inferer.sample(noise, network, unet, verbose=False)
    assert sampled.shape == images.shape
    # What is decoded are codewords, whatever was generated.
    latent = network.encode_stage_2_inputs(images)
    assert torch.equal(network.decode_stage_2_outputs(latent), network(images))


@pytest.mark.filterwarnings("ignore")
def test_monai_transformer_inferer_runs_unmodified() -> None:
    from monai.inferers import VQVAETransformerInferer
    from monai.networks.nets import DecoderOnlyTransformer
    from monai.utils.ordering import Ordering

    network = tokenizer(levels=3)
    transformer = DecoderOnlyTransformer(
        num_tokens=17, max_seq_len=16, attn_layers_dim=8, attn_layers_depth=1, attn_layers_heads=2
    )
    ordering = Ordering("raster_scan", spatial_dims=2, dimensions=(1, 4, 4))
    images = torch.rand(1, 1, 32, 32) * 2 - 1
    inferer = VQVAETransformerInferer()
    assert inferer(images, network, transformer, ordering).shape == (1, 16, 17)
    start = torch.full((1, 1), network.num_embeddings)
    sampled = inferer.sample((4, 4), start, network, transformer, ordering, verbose=False)
    assert sampled.shape == images.shape


def test_gradients_reach_everything_that_is_trained() -> None:
    from vaevq_med.losses.dcr import DCRLoss
    from vaevq_med.losses.kl import KLLoss
    from vaevq_med.losses.objective import TokenizerObjective
    from vaevq_med.losses.rcs import RCSLoss
    from vaevq_med.losses.reconstruction import ReconstructionLoss

    network = tokenizer().train()
    terms = {"reconstruction": ReconstructionLoss(), "kl": KLLoss(), "rcs": RCSLoss(), "dcr": DCRLoss()}
    objective = TokenizerObjective(terms=terms, weights=dict.fromkeys(terms, 1.0))
    images: Tensor = torch.rand(2, 1, 32, 32) * 2 - 1
    objective.generator(images, TrainingForward(network)(images)).total.backward()
    without = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
