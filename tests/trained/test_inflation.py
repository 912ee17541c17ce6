"""A tokenizer of slices as the start of one of volumes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from helpers.volumes import volume_tokenizer

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.slices import slices_of, stacked
from vaevq_med.networks.tokenizer import VisualTokenizer
from vaevq_med.trained.inflation import inflated_kernel
from vaevq_med.trained.starting import StartReport, started_from, take_weights

PLANAR = [[1, 2, 2], [1, 2, 2]]
DEEP = {"channel_mult": [1, 2, 2]}


def trained_2d() -> VisualTokenizer:
    """A tokenizer of slices that is not at its start: biases and scales are drawn too."""
    torch.manual_seed(5)
    network = volume_tokenizer(spatial_dims=2, **DEEP).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def inflated(report: StartReport) -> list[str]:
    return [name for part in report.parts.values() for name in part.inflated]


def new(report: StartReport) -> list[str]:
    return [name for part in report.parts.values() for name in part.new]


def test_a_kernel_by_hand() -> None:
    kernel = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2)
    assert inflated_kernel(kernel, 3)[0, 0].tolist() == [[[0, 0], [0, 0]], [[1, 2], [3, 4]], [[0, 0], [0, 0]]]
    assert inflated_kernel(kernel, 1)[0, 0].tolist() == [[[1, 2], [3, 4]]]
    assert inflated_kernel(kernel, 3, pairs=True)[0, 0].tolist() == [[[0.5, 1], [1.5, 2]]] * 2 + [[[0, 0], [0, 0]]]
    # Convolved with two slices of 1 and 5, which a step of 2 makes one: their mean, 3.
    volume = torch.tensor([1.0, 5.0, 0.0]).view(1, 1, 3, 1, 1)
    pair = inflated_kernel(torch.ones(1, 1, 1, 1), 3, pairs=True)
    assert torch.nn.functional.conv3d(volume, pair, stride=2).item() == 3


def test_slices_pass_as_in_2d_where_nothing_shrinks_z() -> None:
    flat = trained_2d()
    deep = volume_tokenizer(downsampling=PLANAR, within_slices=True, **DEEP).eval()
    found = take_weights(deep, flat.state_dict())
    assert new(found) == found.unused == []
    assert len(inflated(found)) > 20
    volume = torch.randn(2, 1, 5, 8, 8)
    torch.testing.assert_close(deep(volume), stacked(flat(slices_of(volume)), 2), atol=1e-4, rtol=1e-3)
    expected = flat.encode_indices(slices_of(volume)).unflatten(0, (2, 5))
    assert torch.equal(deep.encode_indices(volume), expected)


def test_the_slices_of_a_position_come_back_as_the_last_of_them() -> None:
    flat = trained_2d()
    deep = volume_tokenizer(within_slices=True, **DEEP).eval()
    take_weights(deep, flat.state_dict(), halving="center")
    volume = torch.randn(1, 1, 8, 8, 8)
    found = deep(volume)
    for first in (0, 4):
        expected = flat(volume[:, :, first + 3])
        for z in range(first, first + 4):
            torch.testing.assert_close(found[:, :, z], expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("halving", ["mean", "center"])
@pytest.mark.parametrize("within_slices", [False, True])
def test_a_repeated_slice_comes_back_as_in_2d(halving: str, within_slices: bool) -> None:
    flat = trained_2d()
    deep = volume_tokenizer(within_slices=within_slices, **DEEP).eval()
    take_weights(deep, flat.state_dict(), halving=halving)
    one = torch.randn(1, 1, 8, 8)
    volume = one.unsqueeze(2).expand(-1, -1, 8, -1, -1)
    found = deep(volume)
    for z in range(8):
        torch.testing.assert_close(found[:, :, z], flat(one), atol=1e-4, rtol=1e-3)


def test_a_decoder_with_a_context_starts_as_the_tokenizer_of_slices() -> None:
    flat = trained_2d()
    context = volume_tokenizer(spatial_dims=2, slice_context=1, **DEEP).eval()
    assert inflated(take_weights(context, flat.state_dict())) == ["post_quant_conv.weight"]
    volume = torch.randn(1, 1, 3, 8, 8)
    torch.testing.assert_close(context(volume), stacked(flat(slices_of(volume)), 1))


def test_a_report_tells_what_was_not_taken() -> None:
    weights = {name: value for name, value in trained_2d().state_dict().items() if name != "quant_conv.bias"}
    found = take_weights(volume_tokenizer(**DEEP), {**weights, "other": torch.zeros(1)})
    assert (new(found), found.unused) == (["quant_conv.bias", "quant_conv.weight"], ["other"])
    assert "2 left new (quant_conv.bias not there, quant_conv.weight)" in str(found.parts["latent"])
    assert found.lines()[-1] == "not used: 1 tensors (other)"


def test_another_network_is_refused_in_one_line() -> None:
    with pytest.raises(VaevqMedError, match=r"encoder\.\S+: found (nothing|shape \[.*\]) in the weights to start from"):
        take_weights(volume_tokenizer(channel_mult=[1, 2]), trained_2d().state_dict())
    with pytest.raises(VaevqMedError, match="halving is 'first'"):
        take_weights(volume_tokenizer(**DEEP), trained_2d().state_dict(), halving="first")


def test_a_network_starts_from_a_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flat, path = trained_2d(), tmp_path / "flat.pt"
    averaged = {name: value + 1 for name, value in flat.state_dict().items()}
    torch.save({"format": 1, "network": flat.state_dict(), "ema": averaged}, path)
    with caplog.at_level(logging.WARNING):
        deep = started_from(volume_tokenizer(**DEEP), path)
    assert "kernels inflated" in caplog.text
    torch.testing.assert_close(deep.quantizer.codebook(), flat.quantizer.codebook() + 1)
    untouched = volume_tokenizer(**DEEP)
    before = {name: value.clone() for name, value in untouched.state_dict().items()}
    started_from(untouched, None)
    assert all(torch.equal(value, before[name]) for name, value in untouched.state_dict().items())
    with pytest.raises(VaevqMedError, match="nowhere"):
        started_from(untouched, tmp_path / "nowhere.pt")
    with pytest.raises(VaevqMedError, match=r"init_from .*flat\.pt: encoder"):
        started_from(volume_tokenizer(channel_mult=[1, 2]), path)
