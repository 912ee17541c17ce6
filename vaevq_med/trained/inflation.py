"""Kernels of a tokenizer of slices as those of one of volumes.

Tail initialization (OD-VAE; CV-VAE starts alike): a 3D kernel is 0 but for one slice of it along z, which is the 2D
kernel. Video has a past, so OD-VAE takes the last slice; a scan has none, so it is the middle one here. What the
inflated network then makes of a volume:

- Where no step of it shrinks z, and where its normalizations and attention are within slices (``within_slices``), each
  slice comes back as the 2D network gives it back, to rounding.
- Normalizations and attention over the volume mix its slices. A volume of one repeated slice comes back as in 2D all
  the same, with and without steps along z.
- Where a step halves z, the two slices of a pair become one, which upsampling repeats. By ``halving`` their features
  are averaged (``mean``), which is the nearest to both, or those of the second stand for both (``center``): with
  ``center`` and ``within_slices`` all 2^n slices that share a position come back as the last of them does in 2D.
"""

from __future__ import annotations

from torch import Tensor, nn

from vaevq_med.networks.blocks import Downsample

HALVINGS = ("mean", "center")


def inflated_kernel(kernel: Tensor, depth: int, *, pairs: bool = False) -> Tensor:
    """A 3D kernel that does to slices what a 2D kernel does to images.

    Args:
        kernel: ``[out, in, h, w]``.
        depth: of the 3D kernel, odd.
        pairs: average the first two of three slices, for a step along z that halves it.

    Returns:
        ``[out, in, depth, h, w]``.

    Examples:
        >>> import torch
        >>> inflated_kernel(torch.ones(1, 1, 1, 1), 3).flatten().tolist()
        [0.0, 1.0, 0.0]
        >>> inflated_kernel(torch.ones(1, 1, 1, 1), 3, pairs=True).flatten().tolist()
        [0.5, 0.5, 0.0]
    """
    volume = kernel.new_zeros(*kernel.shape[:2], depth, *kernel.shape[2:])
    if pairs:
        volume[:, :, :2] = kernel.unsqueeze(2) / 2
    else:
        volume[:, :, depth // 2] = kernel
    return volume


def halving_kernels(network: nn.Module) -> set[str]:
    """Names of the kernels that halve z."""
    return {
        f"{name}.conv.weight"
        for name, module in network.named_modules()
        if isinstance(module, Downsample) and len(module.factors) == 3 and module.factors[0] == 2
    }


def is_flat_of(kernel: Tensor, like: Tensor) -> bool:
    """Whether a kernel is another one's but for z."""
    return kernel.ndim == 4 and like.ndim == 5 and like.shape == (*kernel.shape[:2], like.shape[2], *kernel.shape[2:])
