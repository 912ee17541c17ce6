"""Residual blocks between the codes and the decoder."""

from __future__ import annotations

import pytest
import torch
from helpers.toy_networks import tokenizer

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks import Rectifier
from vaevq_med.trained.network import network_hash


def rectifier(**options: int) -> Rectifier:
    return Rectifier(**{"embedding_dim": 4, "num_channels": 8, "num_blocks": 1, **options})


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_it_starts_as_nothing_to_the_bit_and_learns(spatial_dims: int) -> None:
    module = rectifier(spatial_dims=spatial_dims)
    codes = torch.randn(2, 4, *[5] * spatial_dims)
    assert torch.equal(module(codes), codes)
    (module(codes) - 1).square().sum().backward()
    assert module.layers[-1].weight.grad.abs().sum() > 0
    with torch.no_grad():
        module.layers[-1].bias.add_(0.5)
    torch.testing.assert_close(module(codes), codes + 0.5)


@pytest.mark.parametrize("variational", [False, True])
def test_codes_pass_it_and_the_continuous_path_does_not(variational: bool) -> None:
    network = tokenizer(variational=variational, rectifier=rectifier())
    plain = tokenizer(variational=variational)
    network.load_state_dict(plain.state_dict(), strict=False)
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(network(images), plain(images))
    with torch.no_grad():
        network.rectifier.layers[-1].bias.add_(0.5)
    indices = plain.encode_indices(images)
    codes = plain.quantizer.indices_to_codes(indices)
    expected = plain.decode(codes + 0.5)
    for found in (network(images), network.decode_indices(indices), network.decode_stage_2_outputs(codes)):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    if variational:
        noise = network.draw_noise(images)
        found, other = (one.reconstruct_full(images, noise=noise) for one in (network, plain))
        torch.testing.assert_close(
            found.reconstruction_continuous, other.reconstruction_continuous, atol=1e-5, rtol=1e-4
        )
        assert not torch.allclose(found.reconstruction, other.reconstruction, atol=1e-3)


def test_without_it_nothing_is_in_the_weights() -> None:
    """So that no hash of a checkpoint moves."""
    network = tokenizer()
    assert not any("rectifier" in name for name in network.state_dict())
    assert network_hash({}, network.state_dict()) == network_hash({}, tokenizer(rectifier=None).state_dict())


def test_other_axes_are_refused() -> None:
    with pytest.raises(VaevqMedError, match="the rectifier's spatial_dims is 3; expected the encoder's, 2"):
        tokenizer(rectifier=rectifier(spatial_dims=3))


def test_within_slices_a_slice_that_repeats_is_what_it_is_alone() -> None:
    """A 3D rectifier whose kernels are 2D ones at their middle makes of each slice what the 2D one makes of it."""
    flat = Rectifier(embedding_dim=4, num_channels=32)
    deep = Rectifier(embedding_dim=4, num_channels=32, spatial_dims=3, within_slices=True)
    whole = Rectifier(embedding_dim=4, num_channels=32, spatial_dims=3)
    torch.manual_seed(0)
    for one in flat.parameters():
        torch.nn.init.normal_(one, 0, 0.1)
    for other in (deep, whole):
        for name, value in other.named_parameters():
            own = dict(flat.named_parameters())[name].data
            value.data = torch.stack([0 * own, own, 0 * own], 2) if own.ndim == 4 else own
    codes = torch.randn(2, 4, 3, 8, 8)
    expected = torch.stack([flat(codes[:, :, z]) for z in range(3)], 2)
    torch.testing.assert_close(deep(codes), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(whole(codes), expected, atol=1e-3)
    with pytest.raises(VaevqMedError, match="within_slices is true with spatial_dims 2"):
        Rectifier(embedding_dim=4, within_slices=True)
