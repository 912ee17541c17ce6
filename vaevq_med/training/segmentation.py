"""Training of a segmentation network on MONAI's ``SupervisedTrainer``."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
from monai.engines import SupervisedTrainer
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor

from vaevq_med.losses.segmentation import SegmentationLoss
from vaevq_med.networks.outputs import LossOutput
from vaevq_med.networks.quantizers.base import Quantizer
from vaevq_med.networks.segmenter import SliceSegmenter
from vaevq_med.training.base import DiscardError
from vaevq_med.training.distributed import unwrapped
from vaevq_med.training.one_loss import OneLossTrainer


class SegmentationTrainer(OneLossTrainer):
    """Minimize a :class:`SegmentationLoss` over stacks of slices.

    ``engine.state.output`` holds the batch (``image``) and the loss (``loss``); ``engine.state.terms`` holds every
    unweighted term, the gradient's norm and the learning rate of the iteration. Noise and perturbations come from
    torch's global generators, which checkpoints store.

    Arguments and errors are those of the base class; the batches are those of a ``RegionDataset``, and ``ema`` is the
    teacher, where there is one. The Dice loss, which is that of a whole batch, is that of each micro-batch.
    """

    overlay = "multi_gpu"
    network: SliceSegmenter

    def _one_update(self) -> contextlib.AbstractContextManager[Any]:
        """In which the codebook, where there is one, takes all parts of a batch for one."""
        quantizer: Quantizer | None = self.network.quantizer
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
