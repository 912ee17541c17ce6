"""Convolutions that keep little for the backward pass, against autograd's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vaevq_med.networks.lean_convolution import norm_swish, norm_swish_convolution, upsampled_convolution


def gradients(output: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output).cos()
    return list(torch.autograd.grad((output * weights).sum(), inputs))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_norm_swish_convolution_is_that_of_the_layers(dims: int, channels_last: bool) -> None:
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 8, eps=1e-6).double()
    convolution = (nn.Conv2d if dims == 2 else nn.Conv3d)(8, 5, 3, padding=1).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 8, *[6] * dims, dtype=torch.float64)
    if channels_last:
        x = x.to(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)
    x.requires_grad_()
    inputs = [x, *norm.parameters(), *convolution.parameters()]
    expected = convolution(F.silu(norm(x)))
    found = norm_swish_convolution(x, norm, convolution)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)
    alone = norm_swish(x, norm)
    torch.testing.assert_close(alone, F.silu(norm(x)))
    for ours, theirs in zip(gradients(alone, inputs[:3]), gradients(F.silu(norm(x)), inputs[:3]), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_upsampled_convolution_is_that_of_the_layers() -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 4, 3, padding=1).double()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    expected = convolution(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    found = upsampled_convolution(x, convolution)
    torch.testing.assert_close(found, expected)
    inputs = [x, *convolution.parameters()]
    for ours, theirs in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_only_the_input_is_kept() -> None:
    norm, convolution = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=1)
    x = torch.randn(1, 4, 16, 16, requires_grad=True)
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        norm_swish_convolution(x, norm, convolution)
    large = [tensor for tensor in kept if tensor.numel() >= x.numel()]
    assert [tensor.data_ptr() for tensor in large] == [x.data_ptr()]


def test_autocast_computes_in_its_type_and_keeps_moments_in_fp32() -> None:
    torch.manual_seed(0)
    norm, convolution = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=1)
    # A large mean: moments taken in bf16 would lose the deviation altogether.
    x = 300 + torch.randn(1, 4, 64, 64)
    x = x.bfloat16().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = norm_swish_convolution(x, norm, convolution)
    assert found.dtype is torch.bfloat16
    expected = convolution(F.silu(norm(x)))
    assert float((found - expected).detach().norm() / expected.norm()) < 0.02
    found.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype is torch.float32
    assert norm.weight.grad is not None
