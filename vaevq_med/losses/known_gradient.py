"""Losses whose gradient is known: taken at once, so that it can be looked at and used again, or chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vaevq_med.networks.outputs import TokenizerOutput


def cut_at_reconstructions(output: TokenizerOutput) -> TokenizerOutput:
    """The same output, whose reconstructions are the leaves of a graph of their own."""
    continuous = output.reconstruction_continuous
    return dataclasses.replace(
        output,
        reconstruction=output.reconstruction.detach().requires_grad_(),
        reconstruction_continuous=None if continuous is None else continuous.detach().requires_grad_(),
    )


def gradients(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of a scalar by each leaf, zero where the loss does not depend on it; its graph is used up."""
    if not loss.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(loss, list(leaves), allow_unused=True)
    return [torch.zeros_like(leaf) if one is None else one for one, leaf in zip(found, leaves, strict=True)]


def with_gradient(value: Tensor, inputs: Sequence[Tensor], known: Sequence[Tensor]) -> Tensor:
    """A scalar whose gradient by ``inputs`` is known.

    Args:
        value: the scalar.
        inputs: what it depends on.
        known: its gradient by each of them.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> with_gradient(torch.tensor(5.0), [x], [torch.tensor([3.0, 4.0])]).backward()
    >>> x.grad
    tensor([3., 4.])
    """
    return _WithGradient.apply(value, *inputs, *known)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[len(tensors) // 2 :])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        known = ctx.saved_tensors
        return None, *(one * upstream.to(one.dtype) for one in known), *(None for _ in known)
