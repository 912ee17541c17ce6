"""PatchGAN discriminator (Isola et al., arXiv 1611.07004), as in VQGAN (arXiv 2012.09841)."""

from __future__ import annotations

from torch import Tensor, nn

from vaevq_med.networks.blocks import check_channels, group_norm
from vaevq_med.networks.ranges import check_choice, check_sizes
from vaevq_med.networks.slices import some_slices


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches: 4x4 convolutions, LeakyReLU(0.2), a map of logits.

    ``num_layers`` convolutions of stride 2 (the first without normalization), one of stride 1, and one of
    stride 1 to a single channel. Weights start from N(0, 0.02), batch-normalization scales from N(1, 0.02).
    With three layers and three image channels: 2.77 M parameters, 30 x 30 logits at 256 x 256 pixels.

    Args:
        in_channels: image channels C.
        num_channels: width of the first layer; it doubles a layer up to eight-fold.
        num_layers: convolutions of stride 2.
        norm: ``"batch"`` (the original), ``"group"`` (independent of the batch: small batches, several
            processes) or ``"none"``.
        num_slices: of each volume that is judged, this many random slices.

    Raises:
        VaevqMedError: for another ``norm``, or fewer than one layer.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        num_channels: int = 64,
        num_layers: int = 3,
        norm: str = "batch",
        num_slices: int = 4,
    ) -> None:
        super().__init__()
        check_choice("norm", norm, ("batch", "group", "none"))
        check_sizes(num_layers=num_layers, num_slices=num_slices)
        self.in_channels = in_channels
        self.num_slices = num_slices
        layers: list[nn.Module] = [nn.Conv2d(in_channels, num_channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = num_channels
        for layer in range(1, num_layers + 1):
            next_width = num_channels * min(2**layer, 8)
            stride = 2 if layer < num_layers else 1
            layers.append(nn.Conv2d(width, next_width, 4, stride, 1, bias=norm == "none"))
            if norm == "batch":
                layers.append(nn.BatchNorm2d(next_width))
            elif norm == "group":
                layers.append(group_norm(next_width))
            layers.append(nn.LeakyReLU(0.2))
            width = next_width
        layers.append(nn.Conv2d(width, 1, 4, 1, 1))
        self.layers = nn.Sequential(*layers)
        self.apply(_initialize)

    def forward(self, images: Tensor) -> Tensor:
        """``[B, C, H, W]`` in [-1, 1] to logits ``[B, 1, h', w']``, high for real; of volumes, some slices."""
        check_channels(images, self.in_channels, "the discriminator's input")
        (images,) = some_slices([images], self.num_slices)
        return self.layers(images)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
