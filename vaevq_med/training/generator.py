"""Training of a second-stage generator on MONAI's ``SupervisedTrainer``."""

from __future__ import annotations

import time
from typing import Any

import torch
from monai.engines import SupervisedTrainer
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor

from vaevq_med.networks.generators.losses import GeneratorLoss
from vaevq_med.networks.outputs import LossOutput
from vaevq_med.training.distributed import unwrapped
from vaevq_med.training.one_loss import OneLossTrainer


class GeneratorTrainer(OneLossTrainer):
    """Minimize a :class:`GeneratorLoss` over the batches of a token store.

    ``engine.state.output`` holds the batch's labels (``label``) and the loss (``loss``); ``engine.state.terms`` holds
    loss, gradient norm and learning rate of the iteration. Times, noise and dropped labels come from torch's
    global generators, which checkpoints store.

    Arguments and errors are those of the base class; the batches are those of a ``TokenDataset``.
    """

    overlay = "generator_multi_gpu"

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
