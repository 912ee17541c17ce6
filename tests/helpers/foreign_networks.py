"""Published tokenizers as functions of their state dictionaries: names and layers as their repositories have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Names:
    """How a repository names the parts of VQGAN's network."""

    block: Callable[[str, int, int, int], str]
    attention: Callable[[str, int, int, int], str]
    step: Callable[[str, int, int], str]
    middle: Callable[[str, int], str]


_SIDES = {"encoder": ("down", "downsample"), "decoder": ("up", "upsample")}
TAMING = Names(
    block=lambda side, level, levels, i: f"{side}.{_SIDES[side][0]}.{level}.block.{i}",
    attention=lambda side, level, levels, i: f"{side}.{_SIDES[side][0]}.{level}.attn.{i}",
    step=lambda side, level, levels: f"{side}.{_SIDES[side][0]}.{level}.{_SIDES[side][1]}.conv",
    middle=lambda side, j: f"{side}.mid.{('block_1', 'attn_1', 'block_2')[j]}",
)


def _counted(side: str, level: int, levels: int) -> str:
    return f"{side}.conv_blocks.{level if side == 'encoder' else levels - 1 - level}"


LLAMAGEN = Names(
    block=lambda side, level, levels, i: f"{_counted(side, level, levels)}.res.{i}",
    attention=lambda side, level, levels, i: f"{_counted(side, level, levels)}.attn.{i}",
    step=lambda side, level, levels: f"{_counted(side, level, levels)}.{_SIDES[side][1]}.conv",
    middle=lambda side, j: f"{side}.mid.{j}",
)


@dataclass(frozen=True)
class VQGAN:
    """A small one.

    Attributes:
        names: of its parts.
        attention: levels that have some.
        multipliers: of 32 channels, a level each.
        channels: of an image.
        latent: that the encoder gives.
        codes: that the decoder takes.
    """

    names: Names = TAMING
    attention: Sequence[int] = (2,)
    multipliers: Sequence[int] = (1, 1, 2)
    blocks: int = 2
    channels: int = 3
    latent: int = 16
    codes: int = 16
    axes: int = 2

    def state(self, seed: int = 0) -> dict[str, Tensor]:
        """Every tensor of encoder and decoder, drawn."""
        rng, found = torch.Generator().manual_seed(seed), {}

        def layer(name: str, *shape: int) -> None:
            for part, size in (("weight", shape), ("bias", shape[:1])):
                scale = max(1, torch.Size(size[1:]).numel()) ** -0.5 if len(size) > 1 else 0.1
                drawn = torch.randn(size, generator=rng) * scale
                found[f"{name}.{part}"] = drawn + (1 if part == "weight" and len(shape) == 1 else 0)

        def block(name: str, a: int, b: int) -> None:
            layer(f"{name}.norm1", a)
            layer(f"{name}.conv1", b, a, *[3] * self.axes)
            layer(f"{name}.norm2", b)
            layer(f"{name}.conv2", b, b, *[3] * self.axes)
            if a != b:
                layer(f"{name}.nin_shortcut", b, a, *[1] * self.axes)

        def attention(name: str, a: int) -> None:
            layer(f"{name}.norm", a)
            for part in ("q", "k", "v", "proj_out"):
                layer(f"{name}.{part}", a, a, *[1] * self.axes)

        widths, levels = [32 * m for m in self.multipliers], len(self.multipliers)
        for side in ("encoder", "decoder"):
            order = range(levels) if side == "encoder" else range(levels - 1, -1, -1)
            width = 32 if side == "encoder" else widths[-1]
            layer(f"{side}.conv_in", width, self.channels if side == "encoder" else self.codes, *[3] * self.axes)
            for number, level in enumerate(order):
                for i in range(self.blocks + (side == "decoder")):
                    block(self.names.block(side, level, levels, i), width, widths[level])
                    width = widths[level]
                    if level in self.attention:
                        attention(self.names.attention(side, level, levels, i), width)
                if number < levels - 1:
                    layer(self.names.step(side, level, levels), width, width, *[3] * self.axes)
            block(self.names.middle(side, 0), widths[-1], widths[-1])
            attention(self.names.middle(side, 1), widths[-1])
            block(self.names.middle(side, 2), widths[-1], widths[-1])
            layer(f"{side}.norm_out", width)
            layer(f"{side}.conv_out", self.latent if side == "encoder" else self.channels, width, *[3] * self.axes)
        return found

    def encode(self, state: State, x: Tensor) -> Tensor:
        """Features of images."""
        return self._half(state, "encoder", x)

    def decode(self, state: State, z: Tensor) -> Tensor:
        """Images of features."""
        return self._half(state, "decoder", z)

    def _half(self, state: State, side: str, h: Tensor) -> Tensor:
        levels = len(self.multipliers)
        h = conv(state, f"{side}.conv_in", h, padding=1)
        if side == "decoder":
            h = self._middle(state, side, h)
        for number in range(levels):
            level = number if side == "encoder" else levels - 1 - number
            for i in range(self.blocks + (side == "decoder")):
                h = residual(state, self.names.block(side, level, levels, i), h)
                if level in self.attention:
                    h = attend(state, self.names.attention(side, level, levels, i), h)
            if number < levels - 1 and side == "encoder":
                h = conv(state, self.names.step(side, level, levels), F.pad(h, (0, 1) * self.axes), stride=2)
            elif number < levels - 1:
                for axis in range(self.axes):
                    h = h.repeat_interleave(2, dim=2 + axis)
                h = conv(state, self.names.step(side, level, levels), h, padding=1)
        if side == "encoder":
            h = self._middle(state, side, h)
        return conv(state, f"{side}.conv_out", swish(norm(state, f"{side}.norm_out", h)), padding=1)

    def _middle(self, state: State, side: str, h: Tensor) -> Tensor:
        h = residual(state, self.names.middle(side, 0), h)
        return residual(state, self.names.middle(side, 2), attend(state, self.names.middle(side, 1), h))


def conv(state: State, name: str, x: Tensor, **further: int) -> Tensor:
    layer = F.conv3d if x.ndim == 5 else F.conv2d
    return layer(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **further)


def norm(state: State, name: str, x: Tensor) -> Tensor:
    """Of 32 groups, by mean and variance."""
    groups = x.reshape(len(x), 32, -1)
    mean, variance = groups.mean(dim=2, keepdim=True), groups.var(dim=2, unbiased=False, keepdim=True)
    even = ((groups - mean) / (variance + 1e-6).sqrt()).reshape(x.shape)
    weight, bias = (state[f"{name}.{part}"].reshape(-1, *[1] * (x.ndim - 2)) for part in ("weight", "bias"))
    return even * weight + bias


def swish(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def residual(state: State, name: str, x: Tensor) -> Tensor:
    h = conv(state, f"{name}.conv1", swish(norm(state, f"{name}.norm1", x)), padding=1)
    h = conv(state, f"{name}.conv2", swish(norm(state, f"{name}.norm2", h)), padding=1)
    return h + (conv(state, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in state else x)


def attend(state: State, name: str, x: Tensor) -> Tensor:
    h = norm(state, f"{name}.norm", x)
    q, k, v = (conv(state, f"{name}.{part}", h).flatten(2) for part in ("q", "k", "v"))
    weights = (torch.einsum("bci,bcj->bij", q, k) * q.shape[1] ** -0.5).softmax(dim=2)
    return x + conv(state, f"{name}.proj_out", torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape))


def magvit_state(*, latent: int, codes: int, decoder_width: int, seed: int = 0) -> dict[str, Tensor]:
    """Encoder and decoder of SimVQ's repository with 32 channels, levels 1 and 2, two blocks a level."""
    rng, found = torch.Generator().manual_seed(seed), {}

    def layer(name: str, *shape: int, bias: bool = True) -> None:
        scale = torch.Size(shape[1:]).numel() ** -0.5 if len(shape) > 1 else 0.1
        found[f"{name}.weight"] = torch.randn(shape, generator=rng) * scale + (len(shape) == 1)
        if bias:
            found[f"{name}.bias"] = torch.randn(shape[:1], generator=rng) * 0.1

    def block(name: str, a: int, b: int) -> None:
        layer(f"{name}.norm1", a)
        layer(f"{name}.norm2", b)
        layer(f"{name}.conv1", b, a, 3, 3, bias=False)
        layer(f"{name}.conv2", b, b, 3, 3, bias=False)
        if a != b:
            layer(f"{name}.nin_shortcut", b, a, 1, 1, bias=False)

    layer("encoder.conv_in", 32, 3, 3, 3, bias=False)
    for level, (a, b) in enumerate(((32, 32), (32, 64))):
        block(f"encoder.down.{level}.block.0", a, b)
        block(f"encoder.down.{level}.block.1", b, b)
    layer("encoder.down.0.downsample", 32, 32, 3, 3)
    for i in range(2):
        block(f"encoder.mid_block.{i}", 64, 64)
    layer("encoder.norm_out", 64)
    layer("encoder.conv_out", latent, 64, 1, 1)
    narrow, wide = decoder_width, 2 * decoder_width
    layer("decoder.conv_in", wide, codes, 3, 3)
    for i in range(2):
        block(f"decoder.mid_block.{i}", wide, wide)
        block(f"decoder.up.1.block.{i}", wide, wide)
        block(f"decoder.up.0.block.{i}", wide if i == 0 else narrow, narrow)
    layer("decoder.up.1.upsample.conv1", 4 * wide, wide, 3, 3)
    layer("decoder.norm_out", narrow)
    layer("decoder.conv_out", 3, narrow, 3, 3)
    return found


def magvit_encode(state: State, x: Tensor) -> Tensor:
    """Features of images by that encoder."""
    h = conv(state, "encoder.conv_in", x, padding=1)
    for level in range(2):
        for i in range(2):
            h = residual(state, f"encoder.down.{level}.block.{i}", h)
        if level == 0:
            h = conv(state, "encoder.down.0.downsample", h, stride=2, padding=1)
    for i in range(2):
        h = residual(state, f"encoder.mid_block.{i}", h)
    return conv(state, "encoder.conv_out", swish(norm(state, "encoder.norm_out", h)))


def magvit_decode(state: State, z: Tensor) -> Tensor:
    """Images of codes by that decoder."""
    h = conv(state, "decoder.conv_in", z, padding=1)
    for i in range(2):
        h = residual(state, f"decoder.mid_block.{i}", h)
    for i in range(2):
        h = residual(state, f"decoder.up.1.block.{i}", h)
    h = depth_to_space(conv(state, "decoder.up.1.upsample.conv1", h, padding=1))
    for i in range(2):
        h = residual(state, f"decoder.up.0.block.{i}", h)
    return conv(state, "decoder.conv_out", swish(norm(state, "decoder.norm_out", h)), padding=1)


def depth_to_space(x: Tensor) -> Tensor:
    """Block size 2, the place in the block before the channel (ONNX's DCR order)."""
    count = x.shape[1] // 4
    out = x.new_zeros(len(x), count, 2 * x.shape[2], 2 * x.shape[3])
    for row in range(2):
        for column in range(2):
            place = (2 * row + column) * count
            out[:, :, row::2, column::2] = x[:, place : place + count]
    return out


def small(seed: int, *shape: int) -> Tensor:
    """Numbers in [-1, 1]."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
