"""A trained tokenizer of slices as the start of one of volumes.

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

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.blocks import Downsample
from vaevq_med.networks.ranges import check_choice
from vaevq_med.trained.packed import read_trained

logger = logging.getLogger(__name__)

HALVINGS = ("mean", "center")
_LAYERS = ("encoder.", "decoder.")
"""Whose tensors all have to be found."""

Network = TypeVar("Network", bound=nn.Module)


@dataclass
class Inflation:
    """What became of the weights.

    Attributes:
        taken: names of tensors that were taken as they are.
        inflated: names of those that became 3D kernels.
        left: names of the network's tensors that kept their own start.
        unused: names of the given ones that the network has no place for.
    """

    taken: list[str] = field(default_factory=list)
    inflated: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        words = f"{len(self.taken)} tensors taken, {len(self.inflated)} kernels inflated"
        for name, tensors in (("left at their own start", self.left), ("not used", self.unused)):
            if tensors:
                words += f", {len(tensors)} {name} ({', '.join(tensors[:4])}{', ...' if len(tensors) > 4 else ''})"
        return words


def inflated_kernel(kernel: Tensor, depth: int, *, pairs: bool = False) -> Tensor:
    """A 3D kernel that does to slices what a 2D kernel does to images.

    Args:
        kernel: ``[out, in, h, w]``.
        depth: of the 3D kernel, odd.
        pairs: average the first two of three slices, for a step along z that halves it.

    Returns:
        ``[out, in, depth, h, w]``.

    Examples:
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


@torch.no_grad()
def inflate(network: nn.Module, weights: Mapping[str, Tensor], *, halving: str = "mean") -> Inflation:
    """Start a network by the weights of one that is the same but for z.

    A tensor of the same shape is taken, a kernel with an axis less inflated; what else there is, in the quantizer and
    about the latent, keeps its start.

    Args:
        network: to start, e.g. a ``VisualTokenizer`` with ``spatial_dims`` 3 or with a ``slice_context``.
        weights: the state dictionary of the 2D one.
        halving: ``mean`` or ``center``, see the module.

    Raises:
        VaevqMedError: a tensor of the encoder or the decoder is not there, or has another shape.
    """
    check_choice("halving", halving, HALVINGS)
    halved = {
        f"{name}.conv.weight"
        for name, module in network.named_modules()
        if isinstance(module, Downsample) and len(module.factors) == 3 and module.factors[0] == 2
    }
    own = network.state_dict()
    found = Inflation(unused=sorted(weights.keys() - own.keys()))
    for name, value in own.items():
        given = weights.get(name)
        if given is not None and given.shape == value.shape:
            value.copy_(given)
            found.taken.append(name)
        elif (
            given is not None
            and given.ndim == 4
            and value.shape == (*given.shape[:2], value.shape[2], *given.shape[2:])
        ):
            value.copy_(inflated_kernel(given, value.shape[2], pairs=halving == "mean" and name in halved))
            found.inflated.append(name)
        elif name.startswith(_LAYERS):
            shape = "nothing" if given is None else f"shape {list(given.shape)}"
            raise VaevqMedError(
                f"{name}: found {shape} in the weights to start from, expected {list(value.shape)} or the same without "
                "z: the network has to be the 2D one but for spatial_dims and downsampling"
            )
        else:
            found.left.append(name)
    return found


def started_from(network: Network, init_from: str | Path | None, *, halving: str = "mean") -> Network:
    """A network that starts as the tokenizer of a checkpoint, by :func:`inflate`; a line tells what was taken.

    Args:
        network: to start.
        init_from: a checkpoint or a packed bundle, see :func:`vaevq_med.trained.packed.read_trained`, whose averaged
            weights are taken where there are some; None leaves the network as it is.
        halving: as for :func:`inflate`.

    Raises:
        VaevqMedError: there is no such checkpoint, or its network is another.
    """
    if init_from in (None, "null", "None"):
        return network
    state = read_trained(Path(str(init_from)))
    try:
        found = inflate(network, state.get("ema") or state["network"], halving=halving)
    except VaevqMedError as error:
        raise VaevqMedError(f"init_from {init_from}: {error}") from None
    logger.warning("Starting from %s: %s", init_from, found)
    return network
