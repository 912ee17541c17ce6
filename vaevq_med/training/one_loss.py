"""Trainers of one network that minimize one loss, a module that knows the network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from vaevq_med.training.base import BaseTrainer
from vaevq_med.training.distributed import require_ddp
from vaevq_med.training.micro_batches import AUTO
from vaevq_med.training.optim import check_trained_parts


class OneLossTrainer(BaseTrainer):
    """Minimize a loss of a network; a derived class says what of a batch it is given.

    Args:
        device: where to train.
        max_epochs: epochs to train.
        train_data_loader: yields dictionaries.
        epoch_length: iterations an epoch.
        network: what is trained.
        optimizer: of its parameters.
        loss: of the same network, or its DDP wrapper.
        schedulers: learning-rate schedulers, each stepped once an iteration.
        ema: averaged copy of the network, updated after each step.
        precision: see :class:`BaseTrainer`.
        micro_batch_size: see :class:`BaseTrainer`.
        max_grad_norm: clip the gradient's norm to this; None does not clip.
        log_interval: see :class:`BaseTrainer`.
        train_handlers: ignite handlers.
        inferer: MONAI inferer that calls ``loss``.
        **kwargs: passed on to ``SupervisedTrainer``.

    Attributes:
        overlay: of the bundle, that wraps the loss for several processes.

    Raises:
        VaevqMedError: there are several processes, and ``loss`` is not wrapped; or there are trained parts outside the
            network.
        TrainingError: while running, the loss or gradient norm is not finite; no parameter has been changed by that
            iteration.
    """

    overlay: ClassVar[str]

    def __init__(
        self,
        *,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: Iterable[Any],
        epoch_length: int,
        network: nn.Module,
        optimizer: Optimizer,
        loss: nn.Module,
        schedulers: Sequence[Any] = (),
        ema: AveragedModel | None = None,
        precision: str = "fp32",
        micro_batch_size: int | str | None = AUTO,
        max_grad_norm: float | None = 1.0,
        log_interval: int = 50,
        train_handlers: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        require_ddp(loss, "loss", self.overlay)
        check_trained_parts(network, optimizer, loss, "loss_def")
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            train_data_loader=train_data_loader,
            epoch_length=epoch_length,
            network=network,
            optimizer=optimizer,
            loss_function=loss,
            schedulers=schedulers,
            ema=ema,
            precision=precision,
            micro_batch_size=micro_batch_size,
            max_grad_norm=max_grad_norm,
            log_interval=log_interval,
            **kwargs,
        )
        self.loss = loss
        self._attach(train_handlers)
