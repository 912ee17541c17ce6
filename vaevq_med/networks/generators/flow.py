"""Rectified flow over latents (arXiv 2209.03003): a straight way from the data to noise, beside LDM's noise prediction.

``x_t = (1 - t) x_0 + t e`` for t in [0, 1], e standard normal; the network predicts the velocity ``e - x_0``, and
Euler's steps go back from t = 1. Training draws t from a logit-normal distribution (arXiv 2403.03206), and as in
LightningDiT (arXiv 2501.01423) the cosine of the velocities may count beside their squared difference. Two networks:
LDM-4's U-Net, and a transformer of LightningDiT's parts (patch 1, RMSNorm, SwiGLU, rotary positions, adaLN-Zero).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.options import is_int
from vaevq_med.networks.base import Tokenizer
from vaevq_med.networks.generators.base import Draw, Setting
from vaevq_med.networks.generators.captured import Graphs
from vaevq_med.networks.generators.ddim import NoisePredictor, integrated_images, latent_draws
from vaevq_med.networks.generators.drawing import GUIDANCE_SCALE
from vaevq_med.networks.generators.latent_diffusion import LatentDiffusionUNet
from vaevq_med.networks.generators.llama_blocks import axial_rotations
from vaevq_med.networks.generators.scaled import ScaledPredictor
from vaevq_med.networks.generators.trunk import TimeEmbedding, check_trunk, make_blocks, start
from vaevq_med.networks.ranges import check_range, check_sizes

FLOW_SETTINGS = MappingProxyType(
    {
        "guidance_scale": Setting(1.5, *GUIDANCE_SCALE),
        "num_steps": Setting(50, lambda value: is_int(value, 1, sys.maxsize), "a whole number from 1"),
        "quantize": Setting(True, lambda value: isinstance(value, bool), "True or False"),
    }
)


class FlowPath:
    """The straight way from a latent to noise, and the times at which it is learned.

    Args:
        num_train_timesteps: what t is multiplied by for the network; times are not rounded.

    Attributes:
        prediction_type: what a network of it gives, in the manner of MONAI's schedules.

    Raises:
        VaevqMedError: it is below 1.
    """

    prediction_type = "velocity"

    def __init__(self, num_train_timesteps: int = 1000) -> None:
        check_sizes(num_train_timesteps=num_train_timesteps)
        self.num_train_timesteps = num_train_timesteps

    def times(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Times t in (0, 1), logit-normal (arXiv 2403.03206), ``[count]``."""
        return torch.randn(count, generator=generator).sigmoid()

    def noisy(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """``(1 - t) x_0 + t e`` of latents and noise ``[B, D, h, w]`` at times ``[B]``."""
        share = times.to(latents.dtype)[:, None, None, None]
        return (1 - share) * latents + share * noise

    def velocity(self, latents: Tensor, noise: Tensor) -> Tensor:
        """``e - x_0``."""
        return noise - latents


class EulerSteps:
    """Equal steps of a flow from t = 1 to 0.

    MONAI's ``RFlowScheduler`` takes the same; it rounds the times to 16 bits, and the steps do not know of that.

    Args:
        num_steps: S.
        path: trained with.

    Raises:
        VaevqMedError: S is below 1.

    Example:
        >>> EulerSteps(4, FlowPath()).timesteps
        tensor([1000.,  750.,  500.,  250.])
    """

    def __init__(self, num_steps: int, path: FlowPath) -> None:
        check_sizes(num_steps=num_steps)
        self.num_steps = num_steps
        self.timesteps = path.num_train_timesteps * (1 - torch.arange(num_steps) / num_steps)

    def step(self, model_output: Tensor, timestep: float, sample: Tensor) -> tuple[Tensor, None]:
        """The sample a step nearer to the data, by the velocity at a time."""
        return sample - model_output / self.num_steps, None


def flow_images(
    network: NoisePredictor,
    tokenizer: Tokenizer,
    labels: Tensor | None = None,
    *,
    num_images: int | None = None,
    grid_size: tuple[int, ...],
    path: FlowPath,
    num_steps: int = 50,
    guidance_scale: float = 1.5,
    quantize: bool = True,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    graphs: Graphs | None = None,
) -> Tensor:
    """Draw images by Euler's steps along a path; the other arguments are those of :func:`generate_images`."""
    return integrated_images(
        network,
        tokenizer,
        labels,
        num_images=num_images,
        grid_size=grid_size,
        scheduler=EulerSteps(num_steps, path),
        guidance_scale=guidance_scale,
        quantize=quantize,
        dtype=dtype,
        generator=generator,
        graphs=graphs,
    )


def flow_draws(
    network: NoisePredictor,
    tokenizer: Tokenizer,
    grid: tuple[int, ...],
    settings: Mapping[str, Any],
    trained_with: Callable[[str], Any],
) -> Draw:
    """What draws latents and decodes them; the arguments are those of :meth:`Generator.draws`."""
    path = FlowPath(int(trained_with("num_train_timesteps")))
    return latent_draws(flow_images, network, tokenizer, grid_size=grid, path=path, **settings)


class FlowUNet(LatentDiffusionUNet):
    """LDM-4's U-Net as a network of velocities; the arguments are those of :class:`LatentDiffusionUNet`."""

    predicts = "velocity"
    settings = FLOW_SETTINGS

    def draws(
        self,
        tokenizer: Tokenizer,
        *,
        grid: tuple[int, ...],
        settings: Mapping[str, Any],
        trained_with: Callable[[str], Any],
    ) -> Draw:
        """Draws by Euler's steps."""
        return flow_draws(self, tokenizer, grid, settings, trained_with)


class FlowTransformer(ScaledPredictor):
    """A transformer of velocities, a token a position of the latent.

    It starts as zero.

    Args:
        in_channels: D, channels of the tokenizer's latent.
        num_classes: labels are below it, and it is the null class; 0 for none.
        width: channels of a token.
        depth: blocks.
        num_heads: attention heads; ``width / num_heads`` is a multiple of 4.
        num_train_timesteps: of the :class:`FlowPath` that it is trained with.

    Raises:
        VaevqMedError: a number is out of its range, or sizes do not fit together.

    Example:
        >>> network = FlowTransformer(in_channels=4, num_classes=3, width=16, depth=1, num_heads=2)
        >>> network(torch.zeros(2, 4, 8, 6), torch.tensor([0.0, 999.0]), torch.tensor([2, 3])).shape
        torch.Size([2, 4, 8, 6])
    """

    predicts = "velocity"
    settings = FLOW_SETTINGS

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int = 0,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        num_train_timesteps: int = 1000,
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, num_train_timesteps=num_train_timesteps)
        check_trunk(width=width, depth=depth, num_heads=num_heads, num_classes=num_classes, shares={})
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.num_train_timesteps = num_train_timesteps
        self.head_dim = width // num_heads
        self.class_embedding = nn.Embedding(num_classes + 1, width)
        self.time_embedding = TimeEmbedding(width)
        self.entry = nn.Linear(in_channels, width)
        none = dict.fromkeys(("attention_dropout", "residual_dropout", "ffn_dropout"), 0.0)
        self.blocks = make_blocks(
            width=width, depth=depth, num_heads=num_heads, dropouts=none, causal=False, modulated=True
        )
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.exit = nn.Linear(width, in_channels)
        start(self, zero=[self.exit, *(block.get_submodule("modulation") for block in self.blocks)])

    def sizes(self, tokens: Mapping[str, Any], where: str) -> dict[str, tuple[Any, Any]]:
        """The embedding dimension, of a grid of rows and columns."""
        self.check_plane(tokens, where)
        return {"embedding_dim": (tokens["tokenizer"]["embedding_dim"], self.in_channels)}

    def draws(
        self,
        tokenizer: Tokenizer,
        *,
        grid: tuple[int, ...],
        settings: Mapping[str, Any],
        trained_with: Callable[[str], Any],
    ) -> Draw:
        """Draws by Euler's steps."""
        return flow_draws(self, tokenizer, grid, settings, trained_with)

    def network_calls(self, *, grid: tuple[int, ...], settings: Mapping[str, Any]) -> int:
        """One a step."""
        return int(settings["num_steps"])

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
        """The velocity at ``x``, ``[B, D, h, w]``.

        Args:
            x: noisy scaled latents, ``[B, D, h, w]``.
            timesteps: ``num_train_timesteps`` times t, ``[B]`` or one for all.
            context: labels ``[B]``; the null class when absent.

        Raises:
            VaevqMedError: a shape that does not fit, or a label out of range.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise VaevqMedError(f"the latent has shape {tuple(x.shape)}; expected [B, {self.in_channels}, h, w]")
        if context is None:
            context = torch.full((x.shape[0],), self.null_class, device=x.device)
        if context.shape != (x.shape[0],):
            raise VaevqMedError(f"labels have shape {tuple(context.shape)}; expected [{x.shape[0]}]")
        check_range("labels", context, self.null_class)
        times = timesteps.expand(x.shape[0]) / self.num_train_timesteps
        condition = self.class_embedding(context.long()) + self.time_embedding(times)
        height, width = x.shape[2:]
        rotations = axial_rotations(height, width, self.head_dim, device=x.device)[1:]
        tokens = self.entry(x.flatten(2).mT)
        for block in self.blocks:
            tokens = block(tokens, rotations, condition=condition)
        return self.exit(self.norm(tokens)).mT.unflatten(2, (height, width))
