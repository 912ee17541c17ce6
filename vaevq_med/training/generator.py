"""Training of a second-stage generator on MONAI's ``SupervisedTrainer``."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from monai.engines import SupervisedTrainer
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from vaevq_med.networks.generators.losses import GeneratorLoss
from vaevq_med.networks.outputs import LossOutput
from vaevq_med.training.base import BaseTrainer
from vaevq_med.training.distributed import require_ddp, unwrapped
from vaevq_med.training.micro_batches import AUTO


class GeneratorTrainer(BaseTrainer):
    """Minimize a :class:`GeneratorLoss` over the batches of a token store.

    ``engine.state.output`` holds the batch's labels (``label``) and the loss (``loss``); ``engine.state.terms`` holds
    loss, gradient norm and learning rate of the iteration. Times, noise and dropped labels come from torch's
    global generators, which checkpoints store.

    Args:
        device: where to train.
        max_epochs: epochs to train.
        train_data_loader: yields dictionaries of a ``TokenDataset``.
        epoch_length: iterations an epoch.
        network: the generator.
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

    Raises:
        VaevqMedError: there are several processes, and ``loss`` is not wrapped.
        TrainingError: while running, the loss or gradient norm is not finite; no parameter has been changed by that
            iteration.
    """

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
        require_ddp(loss, "loss", "generator_multi_gpu")
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

    def _iteration(self, engine: SupervisedTrainer, batchdata: dict[str, Any]) -> dict[str, Any]:
        started = time.perf_counter()
        inner: GeneratorLoss = unwrapped(self.loss)  # type: ignore[assignment]
        values, labels = (batchdata[key].to(engine.state.device, non_blocking=True) for key in (inner.key, Keys.LABEL))
        batch_size = values.shape[0]
        self.loss.train()

        def probe(count: int) -> Tensor:
            with self._autocast():
                return inner(values[:count], labels[:count])

        self._plan(probe, batch_size)

        def compute(part: Tensor, part_labels: Tensor) -> LossOutput:
            return LossOutput(self.inferer(part, self.loss, part_labels), {})

        terms = self._minimize(self.loss, (values, labels), compute)
        self._end_iteration(engine, terms, batch_size, started)
        return {Keys.LABEL: labels, Keys.LOSS: torch.as_tensor(terms["loss"])}
