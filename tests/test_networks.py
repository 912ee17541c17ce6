"""Backbone, posterior, discriminator and tokenizer, and that MONAI's inferers take it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vaevq_med.errors import VaevqMedError
from vaevq_med.networks import Decoder, Encoder, PatchDiscriminator, TrainingForward, VisualTokenizer, vqgan_preset
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.quantizers import SimVQ, VectorQuantizer
from vaevq_med.networks.tokenizer import released_estimator


def count(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def tokenizer(*, levels: int = 2, channels: int = 1, variational: bool = True, **kwargs: Any) -> VisualTokenizer:
    torch.manual_seed(0)
    shared: dict[str, Any] = {
        "num_channels": 8,
        "channel_mult": [1] * levels + [2],
        "num_res_blocks": 1,
        "attention_resolutions": [],
        "image_size": 32,
        "z_channels": 8,
    }
    return VisualTokenizer(
        encoder=Encoder(in_channels=channels, **shared),
        decoder=Decoder(out_channels=channels, **shared),
        quantizer=kwargs.pop("quantizer", SimVQ(num_embeddings=16, embedding_dim=4)),
        embedding_dim=4,
        variational=variational,
        **kwargs,
    ).eval()


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
    with pytest.raises(VaevqMedError, match="'sample' or 'mean'"):
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


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(VaevqMedError, match="embedding_dim is 4"):
        tokenizer(quantizer=VectorQuantizer(num_embeddings=4, embedding_dim=5))
    with pytest.raises(VaevqMedError, match="variational false"):
        tokenizer(variational=False, estimator="released")


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
    from vaevq_med.losses import DCRLoss, KLLoss, RCSLoss, ReconstructionLoss, TokenizerObjective

    network = tokenizer().train()
    terms = {"reconstruction": ReconstructionLoss(), "kl": KLLoss(), "rcs": RCSLoss(), "dcr": DCRLoss()}
    objective = TokenizerObjective(terms=terms, weights=dict.fromkeys(terms, 1.0))
    images: Tensor = torch.rand(2, 1, 32, 32) * 2 - 1
    objective.generator(images, TrainingForward(network)(images)).total.backward()
    without = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
