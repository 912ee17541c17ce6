"""Exponential moving average of a network's weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from vaevq_med.core.errors import VaevqMedError


class _MovingAverage(AveragedModel):
    """Torch's class with a count of updates that stays on the CPU: its own waits for a GPU at each update."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move towards the model's floating values, take over its integers; at first, take over all."""
        count = int(self.n_averaged)
        pairs = [
            (own.detach(), other.detach())
            for kind in ("parameters", "buffers")
            for own, other in zip(getattr(self.module, kind)(), getattr(model, kind)(), strict=True)
        ]
        moving = [pair for pair in pairs if count and pair[0].is_floating_point()]
        for own, other in pairs:
            if not (count and own.is_floating_point()):
                own.copy_(other)
        if moving:
            decay = min(self.decay, (1 + count) / (10 + count))
            torch._foreach_lerp_([own for own, _ in moving], [other for _, other in moving], 1 - decay)
        self.n_averaged += 1


def exponential_moving_average(model: nn.Module, decay: float = 0.999) -> AveragedModel:
    """An averaged copy of ``model``, parameters and buffers, updated by ``update_parameters``.

    The decay warms up as ``min(decay, (1 + n) / (10 + n))`` after ``n`` updates, so that a short run's average
    is not held back by its random start.

    Args:
        model: the network to follow; its copy is kept in evaluation mode.
        decay: weight of the old average, in [0, 1).

    Returns:
        A kind of torch's ``AveragedModel``; the copy is its ``module``.
    """
    if not 0.0 <= decay < 1.0:
        raise VaevqMedError(f"ema_decay: found {decay}, expected a number in [0, 1)")
    copy = _MovingAverage(model, decay)
    for parameter in copy.parameters():
        parameter.requires_grad_(False)
    return copy.eval()
