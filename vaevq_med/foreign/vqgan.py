"""The convolutional network of VQGAN under the names of taming-transformers, as encoder and decoder of this package.

``encoder.conv_in``; ``encoder.down.L.block.I`` and ``.attn.I``, ``encoder.down.L.downsample.conv``, L = 0 the finest;
``encoder.mid.block_1``, ``.attn_1``, ``.block_2``; ``encoder.norm_out``, ``encoder.conv_out``; ``decoder`` alike with
``up.L`` and ``upsample.conv``. Widths, levels and attention are read from the tensors themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vaevq_med.foreign.errors import ForeignError
from vaevq_med.foreign.weights import Tensors
from vaevq_med.trained.fitting import adapted_channels

_BASE = 256
"""Image size at which the levels with attention are counted; any other that f divides runs through the same layers."""


@dataclass(frozen=True)
class Halves:
    """Encoder and decoder of a file.

    Attributes:
        encoder: definition.
        decoder: definition.
        state: their state dictionary, under ``encoder.`` and ``decoder.``.
        in_channels: of an image.
        latent: channels that the encoder gives.
        codes: channels that the decoder takes.
        spatial_dims: 2 or 3.
    """

    encoder: dict[str, Any]
    decoder: dict[str, Any]
    state: dict[str, Tensor]
    in_channels: int
    latent: int
    codes: int
    spatial_dims: int


def read_halves(tensors: Tensors, *, resampling: str = "vqgan", biased: bool = True) -> Halves:
    """Take an encoder and a decoder.

    Args:
        tensors: under the names of taming-transformers.
        resampling: of ``networks.Encoder``.
        biased: whether every convolution has a bias; a missing one is zeros otherwise.

    Raises:
        ForeignError: a tensor is missing, has another shape, or widths are none of a VQGAN.
    """
    channels = tensors.shape("encoder.conv_in.weight")
    axes = len(channels) - 2
    # The decoder's own output, whose number of channels has to be the encoder's input.
    tensors.shape("decoder.conv_out.weight", channels[1], *[None] * (axes + 1))
    definitions: list[dict[str, Any]] = []
    state: dict[str, Tensor] = {}
    for side in ("encoder", "decoder"):
        half = _Half(tensors, side, biased)
        state |= dict(half.walk())
        shared = {
            "_target_": f"vaevq_med.networks.{side.capitalize()}",
            "spatial_dims": axes,
            ("in_channels" if side == "encoder" else "out_channels"): channels[1],
            "num_channels": half.width,
            "channel_mult": half.multipliers,
            "num_res_blocks": half.blocks if side == "encoder" else half.blocks - 1,
            "attention_resolutions": [_BASE // 2**level for level in half.attention],
            "image_size": _BASE,
            "middle_attention": half.middle,
            "z_channels": half.latent,
            "resampling": resampling,
        }
        definitions.append(shared)
    encoder, decoder = definitions
    if encoder["channel_mult"] and len(encoder["channel_mult"]) != len(decoder["channel_mult"]):
        raise ForeignError(
            f"{tensors.path}: found {len(encoder['channel_mult'])} levels of the encoder and "
            f"{len(decoder['channel_mult'])} of the decoder, expected as many"
        )
    return Halves(encoder, decoder, state, channels[1], int(encoder["z_channels"]), int(decoder["z_channels"]), axes)


class _Half:
    """An encoder's or a decoder's sizes, and its tensors under their names here."""

    def __init__(self, tensors: Tensors, side: str, biased: bool) -> None:
        self.tensors, self.side, self.biased = tensors, side, biased
        self.levels_of = f"{side}.{'down' if side == 'encoder' else 'up'}"
        levels = tensors.numbers(rf"{self.levels_of}\.(\d+)\.block\.")
        if not levels:
            tensors.shape(f"{self.levels_of}.0.block.0.conv1.weight")
        count = levels[-1] + 1
        self.blocks = len(tensors.numbers(rf"{self.levels_of}\.0\.block\.(\d+)\."))
        self.middle = f"{side}.mid.attn_1.norm.weight" in tensors
        self.attention = [level for level in range(count) if f"{self.levels_of}.{level}.attn.0.norm.weight" in tensors]
        first, last = f"{side}.conv_in.weight", f"{side}.conv_out.weight"
        self.latent = tensors.shape(last)[0] if side == "encoder" else tensors.shape(first)[1]
        widths = [tensors.shape(f"{self.levels_of}.{level}.block.0.conv2.weight")[0] for level in range(count)]
        # The encoder's first convolution has the width that the levels are multiples of; of a decoder any divisor does.
        self.width = tensors.shape(first)[0] if side == "encoder" else math.gcd(*widths)
        odd = [width for width in widths if width % self.width]
        if odd:
            raise ForeignError(
                f"{tensors.path}: found levels of {widths} channels, expected multiples of {self.width}, the width of "
                f"{tensors.expected}"
            )
        self.multipliers = [width // self.width for width in widths]

    def walk(self) -> Iterator[tuple[str, Tensor]]:
        """In the order of the layers."""
        side, place = self.side, 0
        yield from self._layer(f"{side}.conv_in", f"{side}.layers.0")
        order = range(len(self.multipliers))
        if side == "decoder":
            yield from self._middle(1)
            place, order = 1, range(len(self.multipliers) - 1, -1, -1)
        for number, level in enumerate(order):
            for block in range(self.blocks):
                place += 1
                yield from self._block(f"{self.levels_of}.{level}.block.{block}", f"{side}.layers.{place}")
                if level in self.attention:
                    place += 1
                    yield from self._attention(f"{self.levels_of}.{level}.attn.{block}", f"{side}.layers.{place}")
            if number < len(order) - 1:
                place += 1
                step = f"{self.levels_of}.{level}.{'downsample' if side == 'encoder' else 'upsample'}.conv"
                yield from self._layer(step, f"{side}.layers.{place}.conv")
        if side == "encoder":
            yield from self._middle(place + 1)
        head = f"{side}.layers.{place + 2}" if side == "encoder" else f"{side}.head"
        yield from self._layer(f"{side}.norm_out", f"{head}.0")
        yield from self._layer(f"{side}.conv_out", f"{head}.2", kernel=3)

    def _middle(self, place: int) -> Iterator[tuple[str, Tensor]]:
        here = f"{self.side}.layers.{place}"
        yield from self._block(f"{self.side}.mid.block_1", f"{here}.0")
        if self.middle:
            yield from self._attention(f"{self.side}.mid.attn_1", f"{here}.1")
        yield from self._block(f"{self.side}.mid.block_2", f"{here}.2")

    def _block(self, theirs: str, ours: str) -> Iterator[tuple[str, Tensor]]:
        for name in ("norm1", "conv1", "norm2", "conv2"):
            yield from self._layer(f"{theirs}.{name}", f"{ours}.{name}")
        if f"{theirs}.nin_shortcut.weight" in self.tensors:
            yield from self._layer(f"{theirs}.nin_shortcut", f"{ours}.shortcut")

    def _attention(self, theirs: str, ours: str) -> Iterator[tuple[str, Tensor]]:
        for name, own in (("norm", "norm"), ("q", "query"), ("k", "key"), ("v", "value"), ("proj_out", "projection")):
            yield from self._layer(f"{theirs}.{name}", f"{ours}.{own}")

    def _layer(self, theirs: str, ours: str, kernel: int = 1) -> Iterator[tuple[str, Tensor]]:
        weight = self.tensors.take(f"{theirs}.weight")
        yield f"{ours}.weight", centered(weight, kernel) if weight.ndim > 2 else weight
        missing = not self.biased and f"{theirs}.bias" not in self.tensors
        yield f"{ours}.bias", torch.zeros(len(weight)) if missing else self.tensors.take(f"{theirs}.bias")


def centered(kernel: Tensor, size: int) -> Tensor:
    """A kernel with zeros around it, so that its axes have a size, if they have less.

    >>> centered(torch.ones(1, 1, 1, 1), 3).flatten().tolist()
    [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    """
    margins = [max(0, size - length) // 2 for length in kernel.shape[2:]]
    return torch.nn.functional.pad(kernel, [margin for margin in reversed(margins) for _ in range(2)])


def identity(channels: int, axes: int = 2) -> dict[str, Tensor]:
    """A 1x1 convolution that changes nothing, for a network that has none."""
    return {"weight": torch.eye(channels).reshape(channels, channels, *[1] * axes), "bias": torch.zeros(channels)}


def of_gray(state: dict[str, Tensor], halves: Halves) -> dict[str, Tensor]:
    """The weights of a network of several channels as those of one of one.

    What it makes of a gray image is what the network makes of the image repeated to its channels, averaged over them:
    the first convolution's weights are added up, the last one's averaged.
    """
    first, last = "encoder.layers.0.weight", "decoder.head.2"
    halves.encoder["in_channels"] = halves.decoder["out_channels"] = 1
    return {
        **state,
        first: adapted_channels(state[first], 1, axis=1),
        **{f"{last}.{name}": adapted_channels(state[f"{last}.{name}"], 1, axis=0) for name in ("weight", "bias")},
    }
