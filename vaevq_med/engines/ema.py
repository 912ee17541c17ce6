"""Exponential moving average of a network's weights."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vaevq_med.errors import VaevqMedError

_Tensors = tuple[Tensor, ...] | list[Tensor]


def exponential_moving_average(model: nn.Module, decay: float = 0.999) -> AveragedModel:
    """An averaged copy of ``model``, parameters and buffers, updated by ``update_parameters``.

    The decay warms up as ``min(decay, (1 + n) / (10 + n))`` after ``n`` updates, so that a short run's average
    is not held back by its random start.

    Args:
        model: the network to follow; its copy is kept in evaluation mode.
        decay: weight of the old average, in [0, 1).

    Returns:
        torch's ``AveragedModel``; the copy is its ``module``.
    """
    if not 0.0 <= decay < 1.0:
        raise VaevqMedError(f"ema_decay: found {decay}, expected a number in [0, 1)")

    def average(averaged: _Tensors, current: _Tensors, updates: Tensor | int) -> None:
        count = int(updates)
        get_ema_multi_avg_fn(min(decay, (1 + count) / (10 + count)))(averaged, current, updates)

    copy = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    for parameter in copy.parameters():
        parameter.requires_grad_(False)
    return copy.eval()
