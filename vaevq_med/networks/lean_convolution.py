"""GroupNorm with swish, and the convolutions behind it and behind upsampling, that keep little for the backward pass.

Autograd keeps the input of every layer: of ``convolution(swish(norm(x)))`` that is ``x``, the normalized ``x``, its
swish, and under autocast copies of them in fp32, although all of them follow from ``x`` at the cost of one pass over
it. The functions here keep ``x`` and the groups' moments, in the type that the convolution computes in, and form the
rest again: at full resolution that is a third of the memory. Moments are taken in fp32 whatever the type of ``x``.
They can be differentiated once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

aten = torch.ops.aten


def norm_swish(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """``swish(norm(x))`` of ``[B, C, ...]``, in the type of autocast where that is on.

    Args:
        x: any floating type.
        norm: with a scale and a shift.

    Example:
        >>> value = norm_swish(torch.tensor([[[[1.0, 3.0]]]]), nn.GroupNorm(1, 1))
        >>> value.allclose(torch.tensor([-0.2689, 0.7311]), 1e-3)
        True
    """
    return _NormSwish.apply(x.to(_dtype(x)), norm.weight, norm.bias, norm.num_groups, norm.eps)


def norm_swish_convolution(x: Tensor, norm: nn.GroupNorm, convolution: nn.Conv2d | nn.Conv3d) -> Tensor:
    """``convolution(swish(norm(x)))`` of ``[B, C, ...]``.

    Args:
        x: any floating type.
        norm: with a scale and a shift.
        convolution: with a bias, of stride 1.
    """
    x, weight, bias = _in_type(x, convolution)
    return _NormSwishConvolution.apply(
        x, norm.weight, norm.bias, weight, bias, norm.num_groups, norm.eps, convolution.padding
    )


def upsampled_convolution(
    x: Tensor, convolution: nn.Conv2d | nn.Conv3d, factors: Sequence[int] | None = None
) -> Tensor:
    """``convolution(u)`` with ``u`` ``[B, C, 2H, 2W]`` the nearest-neighbor doubling of ``x`` ``[B, C, H, W]``.

    Args:
        x: any floating type; an image or a volume.
        convolution: with a bias, of stride 1.
        factors: by which each axis grows in place of 2.
    """
    x, weight, bias = _in_type(x, convolution)
    return _UpsampledConvolution.apply(x, weight, bias, convolution.padding, tuple(factors or (2,) * (x.ndim - 2)))


def _in_type(x: Tensor, convolution: nn.Conv2d | nn.Conv3d) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` and the convolution's weight and bias in the type that it computes in."""
    assert convolution.bias is not None
    dtype = _dtype(x)
    return x.to(dtype), convolution.weight.to(dtype), convolution.bias.to(dtype)


def _dtype(x: Tensor) -> torch.dtype:
    """The type of autocast where that is on, else that of ``x``."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()


def _wide(x: Tensor) -> Tensor:
    """``x`` in fp32 at least, in which moments are taken, and in the one layout that a GPU's kernels for them know."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _normalize(x: Tensor, scale: Tensor, shift: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The normalized ``x``, and the groups' means and inverse deviations ``[B, groups]``, all in fp32 at least."""
    return aten.native_group_norm(_wide(x), scale, shift, x.shape[0], x.shape[1], x[0, 0].numel(), groups, eps)


def _normalize_backward(
    gradient: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, scale and shift, given that of the normalized ``x``."""
    sizes = x.shape[0], x.shape[1], x[0, 0].numel()
    to_x, to_scale, to_shift = aten.native_group_norm_backward(
        gradient.contiguous(), _wide(x), mean, rstd, scale, *sizes, groups, [True, True, True]
    )
    return to_x.to(x.dtype), to_scale, to_shift


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, ...]) -> Tensor:
    ones, zeros = [1] * len(padding), [0] * len(padding)
    return aten.convolution(x, weight, bias, ones, list(padding), ones, False, zeros, 1)


def _convolve_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, weight and bias."""
    ones, zeros = [1] * len(padding), [0] * len(padding)
    return aten.convolution_backward(
        gradient, x, weight, [len(weight)], ones, list(padding), ones, False, zeros, 1, [True, True, True]
    )


class _NormSwish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, groups: int, eps: float) -> Tensor:
        with _no_autocast(x):
            normalized, mean, rstd = _normalize(x, scale, shift, groups, eps)
            ctx.save_for_backward(x, scale, shift, mean, rstd)
            ctx.settings = groups, eps
            return aten.silu(normalized).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, mean, rstd = ctx.saved_tensors
        groups, eps = ctx.settings
        with _no_autocast(x):
            normalized = _normalize(x, scale, shift, groups, eps)[0]
            gradient = aten.silu_backward(gradient, normalized)  # in the wider of the two types
            del normalized
            return *_normalize_backward(gradient, x, scale, mean, rstd, groups), None, None


class _NormSwishConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        padding: tuple[int, ...],
    ) -> Tensor:
        with _no_autocast(x):
            normalized, mean, rstd = _normalize(x, scale, shift, groups, eps)
            ctx.save_for_backward(x, scale, shift, mean, rstd, weight)
            ctx.settings = groups, eps, padding
            swish = aten.silu(normalized).to(x.dtype)
            del normalized
            return _convolve(swish, weight, bias, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, mean, rstd, weight = ctx.saved_tensors
        groups, eps, padding = ctx.settings
        with _no_autocast(x):
            normalized = _normalize(x, scale, shift, groups, eps)[0]
            swish = aten.silu(normalized).to(x.dtype)
            to_swish, to_weight, to_bias = _convolve_backward(gradient, swish, weight, padding)
            # Each of these is as large as the input: what is read no more makes room for what follows.
            del swish
            to_normalized = aten.silu_backward(to_swish, normalized)  # in the wider of the two types
            del to_swish, normalized
            to_x, to_scale, to_shift = _normalize_backward(to_normalized, x, scale, mean, rstd, groups)
        return to_x, to_scale, to_shift, to_weight, to_bias, None, None, None


class _UpsampledConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, ...], factors: tuple[int, ...]
    ) -> Tensor:
        with _no_autocast(x):
            ctx.save_for_backward(x, weight)
            ctx.padding, ctx.factors = padding, factors
            return _convolve(_enlarge(x, factors), weight, bias, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        with _no_autocast(x):
            enlarged = _enlarge(x, ctx.factors)
            to_enlarged, to_weight, to_bias = _convolve_backward(gradient, enlarged, weight, ctx.padding)
            size = list(enlarged.shape[2:])
            del enlarged
            if x.ndim == 4:
                to_x = aten.upsample_nearest2d_backward(to_enlarged, size, list(x.shape), None, None)
            else:
                to_x = aten.upsample_nearest3d_backward(to_enlarged, size, list(x.shape), None, None, None)
        return to_x, to_weight, to_bias, None, None


def _enlarge(x: Tensor, factors: tuple[int, ...]) -> Tensor:
    """``[B, C, H, W] -> [B, C, 2H, 2W]``, each pixel four times; volumes alike, by a factor for each axis."""
    size = [factor * length for factor, length in zip(factors, x.shape[2:], strict=True)]
    if x.ndim == 4:
        return aten.upsample_nearest2d(x, size, None, None)
    return aten.upsample_nearest3d(x, size, None, None, None)
