"""One image through a trained network: what goes in, and what comes out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vaevq_med.trained.network import StoredNetwork


def input_shape(stored: StoredNetwork, network: nn.Module) -> tuple[int, ...]:
    """The shape of one image, ``[C, H, W]``, or of one stack of slices, ``[C, d, H, W]``.

    Args:
        stored: its checkpoint, which says the size and, of stacks, the depth.
        network: it, built.
    """
    size = int(stored.value("image_size"))
    depth = getattr(network, "depth", None) or stored.value("depth", None)
    depth = depth if getattr(network, "takes_volumes", True) else None
    channels = getattr(network, "in_channels", None) or int(stored.value("in_channels"))
    return (channels, int(depth), size, size) if depth else (channels, size, size)


@torch.no_grad()
def output_of(network: nn.Module, shape: tuple[int, ...], *, seed: int = 0) -> Tensor:
    """What a network makes of one image of noise, uniform in [-1, 1].

    Args:
        network: in evaluation mode.
        shape: of the image, without the batch.
        seed: of the noise.

    Returns:
        With the batch of one, e.g. ``[1, C, H, W]``.
    """
    noise = torch.rand((1, *shape), generator=torch.Generator().manual_seed(seed))
    output: Tensor = network(2 * noise - 1)
    return output
