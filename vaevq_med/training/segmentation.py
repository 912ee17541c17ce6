"""Training of a segmentation network on MONAI's ``SupervisedTrainer``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from monai.engines import SupervisedTrainer
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from vaevq_med.losses.segmentation import SegmentationLoss
from vaevq_med.networks.outputs import LossOutput
from vaevq_med.networks.quantizers.base import Quantizer
from vaevq_med.networks.segmenter import SliceSegmenter
from vaevq_med.training.base import BaseTrainer, DiscardError
from vaevq_med.training.distributed import require_ddp, unwrapped
from vaevq_med.training.micro_batches import AUTO
from vaevq_med.training.optim import check_trained_parts


class SegmentationTrainer(BaseTrainer):
    """Minimize a :class:`SegmentationLoss` over stacks of slices.

    ``engine.state.output`` holds the batch (``image``) and the loss (``loss``); ``engine.state.terms`` holds every
    unweighted term, the gradient's norm and the learning rate of the iteration. Noise and perturbations come from
    torch's global generators, which checkpoints store.

    Args:
        device: where to train.
        max_epochs: epochs to train.
        train_data_loader: yields dictionaries of a ``RegionDataset``.
        epoch_length: iterations an epoch.
        network: the segmentation network.
        optimizer: of its parameters.
        loss: of the same network, or its DDP wrapper.
        schedulers: learning-rate schedulers, each stepped once an iteration.
        ema: averaged copy of the network, updated after each step; the teacher, where there is one.
        precision: see :class:`BaseTrainer`.
        micro_batch_size: see :class:`BaseTrainer`. The Dice loss, which is that of a whole batch, is that of each part.
        max_grad_norm: clip the gradient's norm to this; None does not clip.
        log_interval: see :class:`BaseTrainer`.
        train_handlers: ignite handlers.
        inferer: MONAI inferer that calls ``loss``.
        **kwargs: passed on to ``SupervisedTrainer``.

    Raises:
        VaevqMedError: there are several processes, and ``loss`` is not wrapped.
        TrainingError: while running, a term or the gradient's norm is not finite; no parameter has been changed by that
            iteration.
    """

    def __init__(
        self,
        *,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: Iterable[Any],
        epoch_length: int,
        network: SliceSegmenter,
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
        require_ddp(loss, "loss", "multi_gpu")
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

    def _one_update(self) -> contextlib.AbstractContextManager[Any]:
        """In which the codebook, where there is one, takes all parts of a batch for one."""
        quantizer: Quantizer | None = self.network.quantizer  # type: ignore[assignment]
        return contextlib.nullcontext() if quantizer is None else quantizer.one_update()

    def _iteration(self, engine: SupervisedTrainer, batchdata: dict[str, Any]) -> dict[str, Any]:
        started = time.perf_counter()
        inner: SegmentationLoss = unwrapped(self.loss)  # type: ignore[assignment]
        images, regions = (
            torch.as_tensor(batchdata[key]).to(engine.state.device, non_blocking=True)
            for key in (Keys.IMAGE, "regions")
        )
        labeled = torch.as_tensor(batchdata["labeled"])  # stays here: a choice by it must not wait for the device
        batch_size = images.shape[0]
        self.loss.train()

        def probe(count: int) -> Any:
            with contextlib.suppress(DiscardError), self._one_update():
                with self._autocast():
                    found = inner(images[:count], regions[:count], labeled[:count])
                raise DiscardError
            return found

        self._plan(probe, batch_size)

        def compute(part: Tensor, part_regions: Tensor, part_labeled: Tensor) -> LossOutput:
            return self.inferer(part, self.loss, part_regions, part_labeled)

        terms = self._minimize(self.loss, (images, regions, labeled), compute, self._one_update)
        self._end_iteration(engine, terms, batch_size, started)
        return {Keys.IMAGE: images, Keys.LOSS: torch.as_tensor(terms["loss"])}
