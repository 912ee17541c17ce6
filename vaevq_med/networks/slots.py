"""One-dimensional tokens: an image as a sequence of slots, which may be nested so that any first ones make an image.

The encoder appends n learned slots to the patches of a vision transformer and keeps what became of the slots alone
(TiTok, arXiv 2406.07550); the decoder fills the plane with mask tokens, which attend to the slots. For nested tokens
(Semanticist, arXiv 2503.08685) slots attend to the patches and to the slots before them alone, and in training the
decoder is given the first b slots of each image, b uniform from 1 to n, with learned null slots in place of the
others: nested dropout (arXiv 1402.0915). Semanticist's decoder is a diffusion model of a VAE's latents; this one gives
pixels.

The grid of the latent is ``1 n``, so that quantizers, token stores and generators of rows and columns take it. A slot
stands for no place of the image. The image size is fixed, as it is what the bits a pixel are counted by.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.backbone import BaseEncoder
from vaevq_med.networks.ranges import check_sizes
from vaevq_med.networks.transformer import TransformerStack, check_patches, patch_grid
from vaevq_med.networks.vit import PatchDecoder, Patchify, PatchPositions, Unpatchify


def slot_factors(image_size: int, num_slots: int) -> tuple[int, int]:
    """Image sizes over those of the grid ``1 n``, an axis each; their product is the pixels that a slot stands for.

    Raises:
        VaevqMedError: the slots do not divide the side.

    >>> slot_factors(256, 32)
    (256, 8)
    """
    check_sizes(image_size=image_size, num_slots=num_slots)
    if image_size % num_slots:
        raise VaevqMedError(
            f"num_slots is {num_slots} with image_size {image_size}; expected a divisor of it, the same in encoder and "
            "decoder (the overlay nested_1d_small_cpu has 32)"
        )
    return image_size, image_size // num_slots


def _new_tokens(count: int, width: int) -> nn.Parameter:
    """``[count, width]``, from N(0, 0.02^2)."""
    return nn.Parameter(0.02 * torch.randn(count, width))


def slots_see(num_patches: int, num_slots: int, device: torch.device | None = None) -> Tensor:
    """Who attends (row) to whom (column) in patches followed by slots, bool ``[P + n, P + n]``.

    Patches attend to patches, slots to patches and to slots up to themselves. A patch that saw a slot would carry it
    to the slots before.

    >>> slots_see(1, 2).int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [1, 1, 1]], dtype=torch.int32)
    """
    places = torch.arange(num_patches + num_slots, device=device)
    rank = (places - num_patches + 1).clamp_min(0)  # 0 of patches, from 1 of slots
    return rank[:, None] >= rank[None, :]


class NestedDropout(nn.Module):
    """The first slots of each image, and learned null slots in place of the others (arXiv 1402.0915, 2503.08685).

    In training b is drawn for each image: 0 with the probability ``null_share``, otherwise uniform from 1 to n. The
    draw comes from the global generator of the slots' device, as the posterior's noise does. In evaluation all slots
    that are given are kept.

    Args:
        num_slots: n.
        width: channels of a slot.
        null_share: in [0, 1): share of the images without any slot.

    Raises:
        VaevqMedError: the share is out of its range.
    """

    def __init__(self, *, num_slots: int, width: int, null_share: float = 0.1) -> None:
        super().__init__()
        if not 0 <= null_share < 1:
            raise VaevqMedError(f"null_share is {null_share}; expected from 0 to below 1")
        self.null_share = null_share
        self.null = _new_tokens(num_slots, width)

    def draw(self, count: int) -> Tensor:
        """Numbers of slots to keep, int64 ``[count]``, on the device of the null slots."""
        uniform = torch.rand(2, count, device=self.null.device)
        kept = 1 + (uniform[0] * len(self.null)).long().clamp_max(len(self.null) - 1)
        return torch.where(uniform[1] < self.null_share, 0, kept)

    def kept(self, slots: Tensor, count: Tensor) -> Tensor:
        """The first ``count`` ``[B]`` of slots ``[B, m, width]``, m at most n, and null slots: ``[B, n, width]``."""
        batch, given = slots.shape[:2]
        null = self.null.expand(batch, -1, -1)
        whole = torch.cat([slots, null[:, given:].to(slots.dtype)], dim=1)
        is_kept = torch.arange(len(self.null), device=slots.device) < count.clamp_max(given)[:, None]  # [B, n]
        return torch.where(is_kept.unsqueeze(2), whole, null.to(slots.dtype))

    def forward(self, slots: Tensor) -> Tensor:
        """Slots ``[B, m, width]`` to ``[B, n, width]``."""
        if self.training:
            return self.kept(slots, self.draw(len(slots)))
        return self.kept(slots, torch.full((len(slots),), slots.shape[1], device=slots.device))


class SlotEncoder(BaseEncoder):
    """Images to n slots by a vision transformer.

    Args:
        num_slots: n, a divisor of ``image_size``.
        causal: whether a slot sees the patches and the slots before it alone, see :func:`slots_see`; otherwise all
            see all.
        in_channels: image channels C.
        image_size: pixels of a side of every image.
        patch_size: pixels of a patch's side.
        width: channels of a token, a multiple of 4.
        depth: blocks, at least 1.
        num_heads: attention heads, a divisor of ``width``.
        mlp_ratio: hidden width of the perceptrons over ``width``.

    Attributes:
        z_channels: channels out, the width.

    Raises:
        VaevqMedError: a size is out of its range or does not fit the others.

    Example:
        >>> encoder = SlotEncoder(num_slots=8, in_channels=1, image_size=32, width=16, depth=1, num_heads=2)
        >>> encoder(torch.zeros(1, 1, 32, 32)).shape
        torch.Size([1, 16, 1, 8])
    """

    patchwise: ClassVar[bool] = False

    def __init__(
        self,
        *,
        num_slots: int,
        causal: bool = False,
        in_channels: int = 3,
        image_size: int = 256,
        patch_size: int = 16,
        width: int = 512,
        depth: int = 8,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        check_patches(image_size=image_size, patch_size=patch_size, width=width, depth=depth)
        self.spatial_dims = 2
        self.in_channels = in_channels
        self.z_channels = width
        self.image_size = image_size
        self.patch_size = patch_size
        self.causal = causal
        self.downsampling_factors = slot_factors(image_size, num_slots)
        self.plane = PatchPositions(image_size=image_size, patch_size=patch_size, width=width, positions="sinusoidal")
        self.layers = TransformerStack(width=width, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio)
        self.patchify = Patchify(in_channels=in_channels, patch_size=patch_size, width=width)
        self.slots = _new_tokens(num_slots, width)
        self._levels = [list(self.layers.blocks)]

    @property
    def first_layer(self) -> Tensor:
        """See the base class."""
        return self.patchify.weight

    def compile_layers(self) -> None:
        """See the base class."""
        self.layers.compile()

    def check_images(self, images: Tensor) -> None:
        """Refuse images of any size but ``image_size``.

        Raises:
            VaevqMedError: as for the base class, or the size is another.
        """
        super().check_images(images)
        if tuple(images.shape[2:]) != (self.image_size, self.image_size):
            height, width = images.shape[2:]
            raise VaevqMedError(
                f"the image is {height}x{width}; expected {self.image_size}x{self.image_size}, the one size of a "
                "tokenizer of slots"
            )

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[B, width, 1, n]`` of images ``[B, C, S, S]`` in [-1, 1].

        Raises:
            VaevqMedError: as for :meth:`check_images`.
        """
        self.check_images(images)
        patches = self.plane(self.patchify(images), patch_grid(images.shape[2:], self.patch_size))  # [B, P, width]
        slots = self.slots.expand(len(images), -1, -1)
        count = patches.shape[1]
        mask = slots_see(count, len(self.slots), images.device) if self.causal else None
        tokens = self.layers(torch.cat([patches, slots.to(patches.dtype)], dim=1), mask)
        return tokens[:, count:].mT.unsqueeze(2)


class SlotDecoder(PatchDecoder):
    """Slots to images by a vision transformer of slots and mask tokens; all attend to all.

    A nested one decodes the first slots alone, too, where the features have fewer than n positions; the others are its
    null slots then, all of them where there are no positions.

    Args:
        num_slots: n, a divisor of ``image_size``.
        nested: whether training drops slots, see :class:`NestedDropout`.
        null_share: of :class:`NestedDropout`.
        out_channels: image channels C.
        image_size: pixels of a side of every image.
        patch_size: pixels of the side of the patch that a mask token becomes.
        width: channels in, and of a token, a multiple of 4.
        depth: blocks, at least 1.
        num_heads: attention heads, a divisor of ``width``.
        mlp_ratio: hidden width of the perceptrons over ``width``.

    Attributes:
        num_prefixes: n where it is nested, otherwise 1.

    Raises:
        VaevqMedError: a size is out of its range or does not fit the others.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        nested: bool = False,
        null_share: float = 0.1,
        out_channels: int = 3,
        image_size: int = 256,
        patch_size: int = 16,
        width: int = 512,
        depth: int = 8,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        check_patches(image_size=image_size, patch_size=patch_size, width=width, depth=depth)
        self.z_channels = width
        self.num_slots = num_slots
        self.upsampling_factors = slot_factors(image_size, num_slots)
        self.grid = patch_grid((image_size, image_size), patch_size)
        self.plane = PatchPositions(image_size=image_size, patch_size=patch_size, width=width, positions="sinusoidal")
        self.places = _new_tokens(num_slots, width)
        self.mask_token = _new_tokens(1, width)
        self.nested = NestedDropout(num_slots=num_slots, width=width, null_share=null_share) if nested else None
        self.num_prefixes = num_slots if nested else 1
        self.layers = TransformerStack(width=width, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio)
        self.head = Unpatchify(width=width, out_channels=out_channels, patch_size=patch_size)
        self._levels = [list(self.layers.blocks)]

    def forward(self, features: Tensor, codes: Tensor | None = None) -> Tensor:
        """Images ``[B, C, S, S]``, nominally in [-1, 1], of features ``[B, width, 1, m]``; codes are not read.

        Raises:
            VaevqMedError: the features have another shape: m is n, or from 0 to n of a nested decoder.
        """
        given = features.shape[-1]
        least = self.num_slots if self.nested is None else 0
        if features.shape[1:] != (self.z_channels, 1, given) or not least <= given <= self.num_slots:
            expected = f"{self.num_slots}" if self.nested is None else f"0 to {self.num_slots}"
            raise VaevqMedError(
                f"the decoder's input has shape {tuple(features.shape)}; expected [B, {self.z_channels}, 1, n] of "
                f"{expected} slots"
            )
        slots = features.flatten(2).mT + self.places[:given]  # [B, m, width]
        if self.nested is not None:
            slots = cast(Tensor, self.nested(slots))
        masks = self.plane(self.mask_token.expand(self.grid[0] * self.grid[1], -1), self.grid)  # [P, width]
        tokens = self.layers(torch.cat([masks.expand(len(slots), -1, -1).to(slots.dtype), slots], dim=1))
        return self.head(tokens[:, : masks.shape[0]], self.grid)
