"""Gates of a two-level quantizer: which cells have fine codes beside their coarse one (DQ-VAE, arXiv 2305.11718).

Most of an MRI slice is black, and a share of all cells would make the whole brain fine. So r* counts the open cells for
each content token, a cell whose pixels are not all alike; of natural images nearly all are.

The threshold of a score is found while training: a moving average of the ones that would have opened the share of each
batch. That of several processes, or of a batch in parts, is that of one process with everything.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.outputs import Posterior
from vaevq_med.networks.patches import patch_entropy, patches_of
from vaevq_med.networks.processes import mean_of_processes, mean_without_gradient
from vaevq_med.networks.quantizers.base import FollowsLatents, channels_last
from vaevq_med.networks.quantizers.open_cells import budget, content, threshold_of_share
from vaevq_med.networks.ranges import check_sizes


@dataclass(frozen=True)
class GateOutput:
    """What a gate made of a latent.

    Attributes:
        opened: 1 for a cell that has its fine codes, else 0, ``[B, *grid]``, with a gradient where the gate learns;
            None where all are open.
        losses: unweighted scalars by name.
    """

    opened: Tensor | None
    losses: Mapping[str, Tensor] = field(default_factory=dict)


class Gate(nn.Module, ABC):
    """Which cells of a latent have fine codes.

    Args:
        share: r*, open cells for each cell with content, in [0, 1]: 0 closes and 1 opens all of them, exactly.

    Attributes:
        sees_images: whether the images tell something: what has content, if nothing else.
        width: channels of the latent that it takes; None where any will do.

    Raises:
        VaevqMedError: the share is out of its range.
    """

    sees_images: bool = True
    width: int | None = None

    def __init__(self, *, share: float = 0.5) -> None:
        super().__init__()
        if not isinstance(share, int | float) or not 0 <= share <= 1:
            raise VaevqMedError(f"share is {share!r}; expected a number in [0, 1]")
        self.share = float(share)

    def forward(self, z: Tensor, posterior: Posterior | None = None, images: Tensor | None = None) -> GateOutput:
        """The gate of a latent.

        Args:
            z: ``[B, D, *grid]``, a cell a position, in fp32.
            posterior: what it came from.
            images: ``[B, C, *size]`` in [-1, 1].
        """
        if self.share == 1:
            return GateOutput(None)
        if self.share == 0:
            return GateOutput(torch.zeros_like(z[:, 0]).detach())
        return self.decide(z, posterior, images)

    @abstractmethod
    def decide(self, z: Tensor, posterior: Posterior | None, images: Tensor | None) -> GateOutput:
        """:meth:`forward` of a share between 0 and 1."""


class FollowingGate(FollowsLatents, Gate):
    """A gate with a threshold of a score, found while training or fixed.

    Args:
        share: r*, see :class:`Gate`.
        threshold: a fixed one, in place of one that is found for the share; the share is then whatever it gives.
        decay: weight of the past in a threshold that is found, in [0, 1).

    Raises:
        VaevqMedError: an option is out of its range.
    """

    threshold: Tensor
    updates: Tensor

    def __init__(self, *, share: float = 0.5, threshold: float | None = None, decay: float = 0.9) -> None:
        super().__init__(share=share)
        if not 0 <= decay < 1:
            raise VaevqMedError(f"decay is {decay}; expected a number in [0, 1)")
        if threshold is not None and not (isinstance(threshold, int | float) and math.isfinite(threshold)):
            raise VaevqMedError(f"threshold is {threshold!r}; expected a finite number, or None")
        self.decay = decay
        self.fixed = threshold is not None
        self.register_buffer("threshold", torch.tensor(0.0 if threshold is None else float(threshold)))
        self.register_buffer("updates", torch.tensor(0.0))

    def above(self, score: Tensor, has_content: Callable[[], Tensor]) -> Tensor:
        """1 for each score ``[B, *grid]`` above the threshold as it was before this batch, which then moves it.

        Args:
            score: of each cell.
            has_content: gives 1 or 0 for each, and is asked only where the threshold moves.
        """
        with torch.no_grad():
            opened = (score > self.threshold).to(score.dtype)
            if self.training and not self.fixed:
                self.follow(score.flatten(), has_content().flatten())
            return opened

    @torch.no_grad()
    def update(self, score: Tensor, has_content: Tensor) -> None:  # type: ignore[override]
        """Move the threshold by scores and whether each is of content, ``[N]``, on every process alike.

        Without content, or where a score is not finite, nothing moves.
        """
        found, count = threshold_of_share(score, has_content, share=self.share)
        moves = (count > 0) & found.isfinite()
        step = torch.where(self.updates == 0, 1.0, 1 - self.decay) * moves
        found = torch.where(moves, found, self.threshold)
        self.threshold.lerp_(found.to(self.threshold.dtype), step.to(self.threshold.dtype))
        self.updates.add_(moves)


class ThresholdGate(FollowingGate):
    """Opens the cells whose score is above the threshold; no gradient passes.

    The arguments are those of :class:`FollowingGate`.
    """

    @abstractmethod
    def score(self, z: Tensor, posterior: Posterior | None, images: Tensor | None) -> Tensor | None:
        """Of each cell, ``[B, *grid]``; None where nothing is known, so that all are open."""

    def decide(self, z: Tensor, posterior: Posterior | None, images: Tensor | None) -> GateOutput:
        """By the threshold as it was before this batch."""
        with torch.no_grad():
            score = self.score(z, posterior, images)
            if score is None:
                return GateOutput(None)
            return GateOutput(self.above(score, lambda: content(images, z.shape[2:], z)))


class EntropyGate(ThresholdGate):
    """Opens cells whose pixels have many gray levels (DQ-VAE's recommended form), by :func:`patch_entropy`.

    Args:
        share: r*, see :class:`Gate`.
        threshold: as for :class:`ThresholdGate`, in nats.
        decay: as there.
        centered: lay the bins around each patch's mean, so that a patch of one gray has entropy 0, whatever the gray;
            false is the published form, of which a gray between two bins has log 2.
    """

    def __init__(
        self, *, share: float = 0.5, threshold: float | None = None, decay: float = 0.9, centered: bool = True
    ) -> None:
        super().__init__(share=share, threshold=threshold, decay=decay)
        self.centered = centered

    def score(self, z: Tensor, posterior: Posterior | None, images: Tensor | None) -> Tensor | None:
        """The entropy of the cell's patch, in nats; its channels averaged."""
        return None if images is None else patch_entropy(images, z.shape[2:], centered=self.centered)


class VarianceGate(ThresholdGate):
    """Opens cells whose pixels differ most from their mean; the arguments are those of :class:`ThresholdGate`."""

    def score(self, z: Tensor, posterior: Posterior | None, images: Tensor | None) -> Tensor | None:
        """The variance of the cell's pixels, of images in [-1, 1]; a mean over the channels."""
        return None if images is None else patches_of(images, z.shape[2:]).var(dim=-1, correction=0).mean(dim=-1)


class PosteriorGate(ThresholdGate):
    """Opens cells of whose latent the encoder is sure: VLQ's variance alone decides (VAEVQ, arXiv 2511.06863).

    To second order the posterior's ``1 / sigma^2`` is 1 plus the curvature of the reconstruction's loss over the KL's
    weight (``coherent.py``): it is high where an error of the code costs most. No image is needed to decide; while a
    threshold is found, it says what has content.

    The arguments are those of :class:`ThresholdGate`; the threshold is in nats.
    """

    def score(self, z: Tensor, posterior: Posterior | None, images: Tensor | None) -> Tensor | None:
        """``-log sigma^2``, a mean over the cell's channels.

        Raises:
            VaevqMedError: there is no posterior in training.
        """
        if posterior is None:
            if self.training:
                raise VaevqMedError(
                    "a PosteriorGate needs the encoder's posterior; found none: set network_def#variational to true, "
                    "or take another gate"
                )
            return None
        return -posterior.logvar.float().mean(dim=1)


class LearnedGate(FollowingGate):
    """A router of two layers that learns which cells to open, held to its budget by a loss.

    In training the gate is a hard sample with the gradient of a soft one (Gumbel-softmax, arXiv 1611.01144). The fine
    codes are multiplied by it, which is the gradient that it gets from the decoder. The loss is ``open_cells.budget``;
    DQ-VAE's weight is 20. In evaluation it opens the cells whose log odds are above a threshold that is found for r*
    while training: the likelier of the two, as published, would open none where every cell is open at a third of the
    draws.

    Args:
        embedding_dim: channels of each of a cell's positions.
        cell_size: n, positions of a cell.
        share: r*, see :class:`Gate`.
        hidden: width of the router.
        temperature: of the soft sample, above 0.
        threshold: of the log odds in evaluation, a fixed one: 0 opens by the likelier of the two, as published.
        decay: as for :class:`FollowingGate`.

    Raises:
        VaevqMedError: an option is out of its range.
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        cell_size: int = 4,
        share: float = 0.5,
        hidden: int = 64,
        temperature: float = 1.0,
        threshold: float | None = None,
        decay: float = 0.9,
    ) -> None:
        super().__init__(share=share, threshold=threshold, decay=decay)
        check_sizes(embedding_dim=embedding_dim, cell_size=cell_size, hidden=hidden)
        if not temperature > 0:
            raise VaevqMedError(f"temperature is {temperature}; expected above 0")
        self.temperature = temperature
        self.width = cell_size * embedding_dim
        self.router = nn.Sequential(
            nn.LayerNorm(self.width), nn.Linear(self.width, hidden), nn.SiLU(), nn.Linear(hidden, 2)
        )

    def forward(self, z: Tensor, posterior: Posterior | None = None, images: Tensor | None = None) -> GateOutput:
        """The gate of a latent, as :meth:`Gate.forward`."""
        output = super().forward(z, posterior, images)
        if "budget" in output.losses or not self.training:
            return output
        # All open or all closed: the budget is met, and the router takes part, for whose gradient DDP waits.
        return GateOutput(output.opened, {"budget": 0 * self.router(channels_last(z)).sum()})

    def decide(self, z: Tensor, posterior: Posterior | None, images: Tensor | None) -> GateOutput:
        """By the router's logits of each cell."""
        logits = self.router(channels_last(z))  # [B, *grid, 2]
        has_content = content(images, z.shape[2:], z) if self.training else torch.ones_like(z[:, 0])
        likely = self.above((logits[..., 1] - logits[..., 0]).detach(), lambda: has_content)
        if not self.training:
            return GateOutput(likely)
        opened = F.gumbel_softmax(logits, tau=self.temperature, hard=True)[..., 1]
        # The straight-through sum rounds: a gate is 0 or 1 to the bit.
        opened = opened.detach().round() + (opened - opened.detach())
        num_open = mean_of_processes(opened.sum())
        known = torch.stack([has_content.sum(), torch.ones_like(has_content).sum()])
        num_content, num_cells = mean_without_gradient(known).unbind()
        return GateOutput(opened, {"budget": budget(num_open, num_content, num_cells, share=self.share)})
