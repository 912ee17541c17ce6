"""Whole volumes to one grid of indices and back."""

from __future__ import annotations

import pytest
import torch
from helpers.volumes import volume_tokenizer

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.tokens.volumes import decode_volume, encode_volume, factors_of, padded


@pytest.mark.parametrize("variational", [False, True])
def test_in_one_piece_it_is_the_tokenizer(variational: bool) -> None:
    network = volume_tokenizer(variational=variational).eval()
    volume = torch.randn(1, 1, 4, 8, 8)
    indices = encode_volume(network, volume)
    assert torch.equal(indices, network.encode_indices(volume))
    with torch.no_grad():
        assert torch.equal(decode_volume(network, indices, size=(4, 8, 8)), network(volume))


def test_any_size_is_padded_and_cut() -> None:
    network = volume_tokenizer().eval()
    volume = torch.randn(1, 1, 5, 7, 6)
    assert torch.equal(padded(volume, (2, 2, 2))[:, :, 5, :7, :6], volume[:, :, 4])
    indices = encode_volume(network, volume)
    assert indices.shape == (1, 3, 4, 3, 1)
    assert decode_volume(network, indices, size=(5, 7, 6)).shape == volume.shape


@pytest.mark.parametrize("tile", [(2, 4, 4), (5, 4, 4), (99, 99, 99)])
def test_tiles_along_z_are_one_piece_where_norms_are_within_slices(tile: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    # Latents in float64 are far enough from the boundaries between codewords for sums in another order.
    network = volume_tokenizer(within_slices=True).double().eval()
    volume = torch.randn(1, 1, 48, 8, 8, dtype=torch.float64)
    # The encoder's convolutions reach 10 positions.
    assert torch.equal(encode_volume(network, volume, tile=tile, halo=(10, 0, 0)), encode_volume(network, volume))


def test_a_halo_that_is_too_small_is_seen() -> None:
    torch.manual_seed(0)
    network = volume_tokenizer(within_slices=True).double().eval()
    volume = torch.randn(1, 1, 32, 8, 8, dtype=torch.float64)
    found = encode_volume(network, volume, tile=(1, 4, 4), halo=(0, 0, 0))
    assert (found != encode_volume(network, volume)).any()


def test_decoding_in_windows_blends_them() -> None:
    torch.manual_seed(0)
    network = volume_tokenizer(within_slices=True).eval()
    indices = torch.randint(0, 16, (1, 24, 2, 2, 1))
    whole = decode_volume(network, indices, size=(48, 4, 4))
    errors = {}
    for window in (24, 16, 4):
        found = decode_volume(network, indices, size=(48, 4, 4), tile=(window, 2, 2), overlap=0.5)
        errors[window] = float((found - whole).abs().mean() / whole.abs().mean())
    assert errors[24] < 1e-5
    assert 1e-5 < errors[16] < errors[4]
    # Windows of 4 begin every 2 positions, 4 slices: the steps there are no larger than others.
    steps = found.diff(dim=2).abs().mean(dim=(0, 1, 3, 4))
    at_windows = steps[3::4]
    assert float(at_windows.mean()) < 1.3 * float(steps.mean())


@pytest.mark.parametrize("tile", [None, (3, 4, 4)])
def test_a_tokenizer_of_images_takes_volumes_slice_by_slice(tile: tuple[int, int, int] | None) -> None:
    network = volume_tokenizer(spatial_dims=2).eval()
    volume = torch.randn(1, 1, 7, 8, 8)
    assert factors_of(network) == (1, 2, 2)
    indices = encode_volume(network, volume, tile=tile)
    assert indices.shape == (1, 7, 4, 4, 1)
    found = decode_volume(network, indices, size=(7, 8, 8), tile=tile)
    with torch.no_grad():
        expected = torch.stack([network(volume[:, :, z]) for z in range(7)], dim=2)
    torch.testing.assert_close(found, expected)


def test_tiles_that_are_none_are_refused() -> None:
    network = volume_tokenizer().eval()
    with pytest.raises(VaevqMedError, match=r"tiles of \[0, 1, 1\]"):
        encode_volume(network, torch.zeros(1, 1, 4, 8, 8), tile=(0, 1, 1))
