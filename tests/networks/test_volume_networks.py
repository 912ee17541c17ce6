"""Encoder, decoder and tokenizer of volumes, and a decoder of slices that sees their neighbors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.volumes import halves, volume_tokenizer
from torch import nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.blocks import AttentionBlock, Downsample, ShuffleUpsample, Upsample, slice_norm
from vaevq_med.networks.decoder import Decoder
from vaevq_med.networks.discriminator import PatchDiscriminator
from vaevq_med.networks.encoder import Encoder
from vaevq_med.networks.lean_convolution import upsampled_convolution
from vaevq_med.networks.quantizers import VectorQuantizer
from vaevq_med.networks.slices import slices_of, some_slices, stacked
from vaevq_med.networks.tokenizer import SliceContext, VisualTokenizer


def test_a_norm_of_slices_is_that_of_each_slice_alone() -> None:
    norm = slice_norm(8)
    nn.init.normal_(norm.weight)
    volume = torch.randn(2, 8, 3, 4, 5)
    alone = nn.GroupNorm(8, 8, eps=1e-6)
    alone.load_state_dict(norm.state_dict())
    expected = torch.stack([alone(volume[:, :, z]) for z in range(3)], dim=2)
    torch.testing.assert_close(norm(volume), expected)


def test_attention_within_slices_is_that_of_each_slice_alone() -> None:
    block = AttentionBlock(spatial_dims=3, num_channels=8, norm=slice_norm, within_slices=True)
    volume = torch.randn(2, 8, 3, 4, 4)
    expected = torch.cat([block(volume[:, :, z : z + 1]) for z in range(3)], dim=2)
    torch.testing.assert_close(block(volume), expected)
    over_all = AttentionBlock(spatial_dims=3, num_channels=8)
    assert not torch.allclose(over_all(volume), torch.cat([over_all(volume[:, :, z : z + 1]) for z in range(3)], dim=2))


def test_an_axis_that_is_kept_is_not_shrunk() -> None:
    down = Downsample(spatial_dims=3, num_channels=1, factors=(1, 2, 2))
    with torch.no_grad():
        down.conv.weight.zero_()[0, 0, 1, 0, 0] = 1  # the voxel itself
        down.conv.bias.zero_()
    x = torch.arange(2 * 4 * 4.0).view(1, 1, 2, 4, 4)
    assert torch.equal(down(x), x[:, :, :, ::2, ::2])
    up = Upsample(spatial_dims=3, num_channels=1, factors=(1, 2, 2))
    assert up(down(x)).shape == x.shape


@pytest.mark.parametrize("factors", [(2, 2, 2), (1, 2, 2)])
def test_upsampled_convolution_of_a_volume_is_that_of_the_layers(factors: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv3d(3, 4, 3, padding=1).double()
    x = torch.randn(2, 3, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    expected = convolution(F.interpolate(x, scale_factor=tuple(map(float, factors)), mode="nearest"))
    found = upsampled_convolution(x, convolution, factors)
    torch.testing.assert_close(found, expected)
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found).cos()
    inputs = [x, *convolution.parameters()]
    ours, theirs = (torch.autograd.grad((value * weights).sum(), inputs) for value in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("within_slices", [False, True])
@pytest.mark.parametrize(("downsampling", "grid"), [(None, (2, 4, 4)), ([[1, 2, 2]], (4, 4, 4))])
def test_shapes_and_gradients_of_volumes(within_slices: bool, downsampling: Any, grid: tuple[int, ...]) -> None:
    network = volume_tokenizer(downsampling=downsampling, within_slices=within_slices, attention_resolutions=[4])
    volumes = torch.randn(2, 1, 4, 8, 8)
    noise = network.draw_noise(volumes)
    assert noise is not None
    assert noise.shape[2:] == grid == network.grid_of((4, 8, 8))
    output = network.reconstruct_full(volumes, noise=noise)
    assert output.quantizer.indices.shape == (2, *grid, 1)
    assert output.reconstruction.shape == volumes.shape
    (output.reconstruction.square().mean() + output.quantizer.losses["codebook"]).backward()
    without = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert without == []
    network.eval()
    assert torch.equal(network.decode_indices(network.encode_indices(volumes)), network(volumes))


def test_activation_checkpointing_changes_no_gradient_of_a_volume() -> None:
    network = volume_tokenizer(within_slices=True)
    volumes = torch.randn(1, 1, 4, 8, 8)

    def gradients() -> list[torch.Tensor]:
        network.zero_grad()
        network(volumes).square().mean().backward()
        return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]

    plain = gradients()
    for half in (network.encoder, network.decoder):
        half.recompute_levels([0, 1])
    for one, other in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(one, other)


def test_no_attention_at_the_bottom() -> None:
    network = volume_tokenizer(middle_attention=False)
    assert not [module for module in network.modules() if isinstance(module, AttentionBlock)]
    assert network(torch.zeros(1, 1, 4, 8, 8)).shape == (1, 1, 4, 8, 8)


def test_within_slices_the_number_of_slices_does_not_matter() -> None:
    volume = torch.randn(1, 1, 16, 8, 8, dtype=torch.float64)
    # The convolutions reach 10 positions of the grid; the shorter volume ends 10 positions after the first six.
    for within_slices in (True, False):
        encoder = volume_tokenizer(within_slices=within_slices).double().eval().encoder
        long, short = (encoder(F.pad(volume, (0, 0, 0, 0, 0, end))) for end in (24, 16))
        assert torch.allclose(long[:, :, :6], short[:, :, :6], atol=1e-9) == within_slices


def test_slices_and_back_and_some_of_them() -> None:
    volume = torch.arange(2 * 3 * 5.0).view(2, 3, 5, 1, 1).expand(2, 3, 5, 4, 4)
    assert torch.equal(slices_of(volume)[7], volume[1, :, 2])
    assert torch.equal(stacked(slices_of(volume), 2), volume)
    torch.manual_seed(0)
    first, second = some_slices([volume, -volume], 3)
    assert torch.equal(first, -second)
    assert first.shape == (6, 3, 4, 4)
    chosen = [slices_of(volume)[:, 0, 0, 0].tolist().index(value) for value in first[:, 0, 0, 0].tolist()]
    assert [place // 5 for place in chosen] == [0, 0, 0, 1, 1, 1]
    assert len(set(chosen)) == 6
    images = [volume[:, :, 0]]
    assert some_slices(images, 2) is images


def test_the_discriminator_judges_slices_of_volumes() -> None:
    judge = PatchDiscriminator(in_channels=1, num_channels=4, num_layers=1, norm="none", num_slices=3)
    assert judge(torch.zeros(2, 1, 5, 16, 16)).shape[0] == 6
    assert judge(torch.zeros(2, 1, 16, 16)).shape[0] == 2


def test_a_context_starts_as_none_and_reaches_the_neighbors_alone() -> None:
    torch.manual_seed(0)
    plain = volume_tokenizer(spatial_dims=2).eval()
    context = volume_tokenizer(spatial_dims=2, slice_context=1).eval()
    state = plain.state_dict()
    state["post_quant_conv.weight"] = context.state_dict()["post_quant_conv.weight"]
    context.load_state_dict(state)
    with torch.no_grad():
        context.post_quant_conv.weight[:, :, 1] = plain.post_quant_conv.weight
    volume = torch.randn(2, 1, 5, 8, 8)
    slices = plain(slices_of(volume))
    torch.testing.assert_close(context(volume), stacked(slices, 2))
    assert torch.equal(context.encode_indices(volume), plain.encode_indices(slices_of(volume)).unflatten(0, (2, 5)))
    with torch.no_grad():
        context.post_quant_conv.weight[:, :, 0] = 1.0  # the slice below
    codes = torch.randn(1, 4, 5, 4, 4)
    changed = codes.clone()
    changed[:, :, 2] += 1
    differences = (context.decode(codes) - context.decode(changed)).abs().amax(dim=(0, 1, 3, 4))
    assert (differences > 1e-6).tolist() == [False, False, True, True, False]


def test_a_context_trains() -> None:
    network = volume_tokenizer(spatial_dims=2, slice_context=2)
    assert network.takes_volumes
    assert network.factors == (1, 2, 2)
    volumes = torch.randn(1, 1, 6, 8, 8)
    output = network.reconstruct_full(volumes, noise=network.draw_noise(volumes))
    assert output.latent.shape == (1, 4, 6, 4, 4)
    output.reconstruction.square().mean().backward()
    assert isinstance(network.post_quant_conv, SliceContext)
    assert (network.post_quant_conv.weight.grad[:, :, 0] != 0).any()


def test_without_a_context_the_tokenizer_has_what_it_had() -> None:
    torch.manual_seed(3)
    plain = volume_tokenizer(spatial_dims=2)
    assert isinstance(plain.post_quant_conv, nn.Conv2d)
    assert not plain.takes_volumes
    assert plain.factors == (2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"downsampling": [[1, 2]]}, r"downsampling is \[\[1, 2\]\]; expected 1 lists of 3"),
        ({"downsampling": [[1, 2, 4]]}, "each 1 or 2"),
        ({"downsampling": [[2, 2, 2]] * 2}, "expected 1 lists of 3"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(VaevqMedError, match=message):
        volume_tokenizer(**arguments)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(VaevqMedError, match="within_slices is true with spatial_dims 2"):
        volume_tokenizer(spatial_dims=2, within_slices=True)
    with pytest.raises(VaevqMedError, match="slice_context is 1 with spatial_dims 3"):
        volume_tokenizer(slice_context=1)
    with pytest.raises(VaevqMedError, match=r"expected a batch, channels and 3 axes"):
        volume_tokenizer()(torch.zeros(1, 1, 8, 8))
    with pytest.raises(VaevqMedError, match=r"expected volumes \[B, C, d, H, W\]"):
        volume_tokenizer(spatial_dims=2, slice_context=1)(torch.zeros(1, 1, 8, 8))
    with pytest.raises(VaevqMedError, match=r"is no multiple of the downsampling factor \(1, 2, 2\)"):
        volume_tokenizer(downsampling=[[1, 2, 2]])(torch.zeros(1, 1, 3, 8, 7))
    with pytest.raises(VaevqMedError, match=r"the size is \(3, 8, 8\); expected multiples of \(2, 2, 2\)"):
        volume_tokenizer().grid_of((3, 8, 8))
    encoder = Encoder(spatial_dims=3, **halves(downsampling=[[1, 2, 2]]), in_channels=1)
    with pytest.raises(VaevqMedError, match=r"the decoder enlarges by \(2, 2, 2\); expected \(1, 2, 2\)"):
        VisualTokenizer(
            encoder=encoder,
            decoder=volume_tokenizer().decoder,
            quantizer=VectorQuantizer(num_embeddings=8, embedding_dim=4),
            embedding_dim=4,
        )


def test_the_steps_of_open_magvit2_are_of_images() -> None:
    """Both ends padded, and four channels for each pixel: by hand, and refused for what has other axes."""
    down = Downsample(spatial_dims=2, num_channels=1, centered=True)
    down.conv.weight.data = torch.arange(9.0).reshape(1, 1, 3, 3)
    down.conv.bias.data.zero_()
    # The kernel's middle, 4, is on the first pixel of each pair, and what follows it in its row, 5, on the second.
    assert down(torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])).item() == 4.0
    assert down(torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]])).item() == 5.0
    up = ShuffleUpsample(num_channels=1)
    up.conv.weight.data.zero_()
    up.conv.bias.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert up(torch.zeros(1, 1, 1, 1)).tolist() == [[[[1.0, 2.0], [3.0, 4.0]]]]
    for kind in (Encoder, Decoder):
        with pytest.raises(VaevqMedError, match="resampling is 'magvit' with spatial_dims 3; expected 'vqgan', or"):
            kind(spatial_dims=3, resampling="magvit")
        with pytest.raises(VaevqMedError, match="resampling is 'bilinear'; expected one of vqgan, magvit"):
            kind(resampling="bilinear")
