"""The noise predictor of LDM-4 (latent diffusion, arXiv 2112.10752, App. E: class-conditional ImageNet).

MONAI's U-Net in that configuration: width 192 times (1, 2, 3, 5), two residual blocks a level, one spatial transformer
of one head at the lower three resolutions, cross-attention to one learned vector a class. MONAI's
``LatentDiffusionInferer`` runs it unmodified with labels as ``conditioning`` and :attr:`null_class` as
``cfg_fill_value``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from monai.networks.nets import DiffusionModelUNet
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.options import is_int
from vaevq_med.networks.base import Tokenizer
from vaevq_med.networks.generators.base import Draw, Setting
from vaevq_med.networks.generators.ddim import diffusion_draws
from vaevq_med.networks.generators.drawing import GUIDANCE_SCALE
from vaevq_med.networks.generators.scaled import ScaledPredictor
from vaevq_med.networks.ranges import check_range, check_sizes


class LatentDiffusionUNet(ScaledPredictor):
    """Predicts the noise in a latent ``[B, D, h, w]`` at a time, given a class.

    One index more than the classes is the *null class*, which stands for no class: training puts it in place of a share
    of the labels, and classifier-free guidance contrasts the two. Without classes it is the only one.

    Args:
        in_channels: D, channels of the tokenizer's latent.
        num_classes: labels 0 to ``num_classes - 1``; 0 for an unconditional model.
        num_channels: width at the latent's own resolution.
        channel_mult: width of each resolution over ``num_channels``, each half as fine as the one before.
        attention_levels: whether each resolution has spatial transformers; by default all but the finest.
        num_res_blocks: residual blocks a level.
        cross_attention_dim: length of a class's vector.

    Raises:
        VaevqMedError: sizes that do not fit together.

    Example:
        >>> network = LatentDiffusionUNet(in_channels=4, num_classes=3, num_channels=32, channel_mult=(1, 2))
        >>> network(torch.zeros(2, 4, 8, 8), torch.tensor([0, 999]), torch.tensor([2, network.null_class])).shape
        torch.Size([2, 4, 8, 8])
    """

    settings = MappingProxyType(
        {
            "guidance_scale": Setting(1.5, *GUIDANCE_SCALE),
            "num_steps": Setting(250, lambda value: is_int(value, 1, sys.maxsize), "a whole number from 1"),
            "quantize": Setting(True, lambda value: isinstance(value, bool), "True or False"),
        }
    )

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int = 0,
        num_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 5),
        attention_levels: Sequence[bool] | None = None,
        num_res_blocks: int = 2,
        cross_attention_dim: int = 512,
    ) -> None:
        super().__init__()
        levels = [level > 0 for level in range(len(channel_mult))] if attention_levels is None else attention_levels
        if len(levels) != len(channel_mult):
            raise VaevqMedError(
                f"attention_levels has {len(levels)} entries; expected one a level, {len(channel_mult)} as channel_mult"
            )
        check_sizes(in_channels=in_channels, num_channels=num_channels, channel_mult=min(channel_mult, default=0))
        check_sizes(num_res_blocks=num_res_blocks, cross_attention_dim=cross_attention_dim)
        if num_classes < 0:
            raise VaevqMedError(f"num_classes is {num_classes}; expected 0 or more")
        if num_channels % 32:
            raise VaevqMedError(f"num_channels is {num_channels}; expected a multiple of 32, the groups of GroupNorm")
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.downsampling = 2 ** (len(channel_mult) - 1)
        channels = [num_channels * factor for factor in channel_mult]
        self.coarsest_channels = channels[-1]
        self.class_embedding = nn.Embedding(num_classes + 1, cross_attention_dim)
        self.unet = DiffusionModelUNet(
            spatial_dims=2,
            in_channels=in_channels,
            out_channels=in_channels,
            num_res_blocks=num_res_blocks,
            channels=channels,
            attention_levels=tuple(bool(level) for level in levels),
            norm_num_groups=32,
            num_head_channels=channels,
            with_conditioning=True,
            transformer_num_layers=1,
            cross_attention_dim=cross_attention_dim,
        )

    def sizes(self, tokens: Mapping[str, Any], where: str) -> dict[str, tuple[Any, Any]]:
        """The embedding dimension; the grid has to be one that the network can halve and still normalize."""
        self.check_plane(tokens, where)
        grid = tokens["grid"]
        if any(side % self.downsampling for side in grid):
            raise VaevqMedError(
                f"{where}: found a grid of {grid[0]}x{grid[1]}, expected multiples of {self.downsampling}, as the "
                f"diffusion model halves it; shorten network_def#channel_mult"
            )
        if max(grid) == self.downsampling and self.coarsest_channels == 32:
            raise VaevqMedError(
                f"{where}: found a grid of {grid[0]}x{grid[1]}, which the diffusion model halves to one position of 32 "
                "channels, each normalized by itself, expected more of either; raise network_def#num_channels to 64"
            )
        return {"embedding_dim": (tokens["tokenizer"]["embedding_dim"], self.in_channels)}

    def draws(
        self,
        tokenizer: Tokenizer,
        *,
        grid: tuple[int, ...],
        settings: Mapping[str, Any],
        trained_with: Callable[[str], Any],
    ) -> Draw:
        """Draws by DDIM, with the times trained with."""
        num_train_timesteps = int(trained_with("num_train_timesteps"))
        return diffusion_draws(self, tokenizer, grid=grid, settings=settings, num_train_timesteps=num_train_timesteps)

    def network_calls(self, *, grid: tuple[int, ...], settings: Mapping[str, Any]) -> int:
        """One a step."""
        return int(settings["num_steps"])

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
        """The noise in ``x``.

        Args:
            x: noisy scaled latents, ``[B, D, h, w]``.
            timesteps: ``[B]``, or one for all, from 0.
            context: labels ``[B]``; the null class when absent.

        Returns:
            ``[B, D, h, w]``.

        Raises:
            VaevqMedError: a shape that does not fit, or a label out of range.
        """
        if (
            x.ndim != 4
            or x.shape[1] != self.in_channels
            or x.shape[2] % self.downsampling
            or x.shape[3] % self.downsampling
        ):
            raise VaevqMedError(
                f"the latent has shape {tuple(x.shape)}; expected [B, {self.in_channels}, h, w] with h and w "
                f"multiples of {self.downsampling}"
            )
        if context is None:
            context = torch.full((x.shape[0],), self.null_class, device=x.device)
        if context.shape != (x.shape[0],):
            raise VaevqMedError(f"labels have shape {tuple(context.shape)}; expected [{x.shape[0]}]")
        check_range("labels", context, self.null_class)
        embedded = self.class_embedding(context.long()).unsqueeze(1)
        return self.unet(x, timesteps=timesteps.expand(x.shape[0]), context=embedded)
