"""A network of the same form that has learned nothing: what a frozen network does to a loss by its form alone."""

from __future__ import annotations

import math

import torch
from torch import nn


@torch.no_grad()
def redraw(network: nn.Module, seed: int) -> None:
    """Give a network new weights, the same for the same seed on every machine and process.

    Matrices and kernels are drawn from ``N(0, 2 / fan_in)``; scales become 1 and biases 0. Batch statistics become
    those of a start, mean 0 and variance 1.

    Args:
        network: to be changed in place.
        seed: of a generator of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn * math.sqrt(2 / parameter[0].numel()))
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.zero_()
        elif name.endswith("running_var"):
            buffer.fill_(1.0)
