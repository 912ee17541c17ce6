"""Validation of a generator: its training loss over a split, with the same draws each time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from ignite.engine import Events
from monai.engines import SupervisedEvaluator
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.generators.losses import GeneratorLoss
from vaevq_med.training.base_evaluator import BaseEvaluator


class GeneratorEvaluator(BaseEvaluator):
    """Average a :class:`GeneratorLoss` over a split.

    ``engine.state.metrics`` receives the loss's figures: ``loss``, and of an autoregressive model ``perplexity``. In
    several processes each goes over the whole split, with the same result.

    Args:
        device: where to evaluate.
        val_data_loader: yields dictionaries of a ``TokenDataset``.
        loss: of the network to evaluate, usually the averaged one; it runs in evaluation mode, where no label is
            dropped.
        precision: ``fp32``, or ``bf16`` for autocast.
        seed: of times and noise, drawn anew at each run of the evaluator.
        val_handlers: ignite handlers.
        **kwargs: passed on to ``SupervisedEvaluator``.

    Raises:
        VaevqMedError: there is no such precision, or while running, the loss is not finite.
    """

    def __init__(
        self,
        *,
        device: torch.device | str,
        val_data_loader: Iterable[Any],
        loss: GeneratorLoss,
        precision: str = "fp32",
        seed: int = 0,
        val_handlers: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            device=device,
            val_data_loader=val_data_loader,
            network=loss,
            precision=precision,
            seed=seed,
            val_handlers=val_handlers,
            **kwargs,
        )
        self.loss = loss
        self.generator = torch.Generator()
        # On the device, in float64: to read it in each batch would make the host wait.
        self._sum, self._count = torch.zeros((), dtype=torch.float64), 0
        self.add_event_handler(Events.EPOCH_COMPLETED, self._summarize)

    def run(self, global_epoch: int = 1) -> None:  # type: ignore[override]
        """Evaluate once; times and noise are the same at every call."""
        self.generator.manual_seed(self.seed)
        self._sum, self._count = torch.zeros((), dtype=torch.float64, device=self.state.device), 0
        super().run(global_epoch)

    def _iteration(self, engine: SupervisedEvaluator, batchdata: dict[str, Any]) -> dict[str, Any]:
        values, labels = (
            batchdata[key].to(engine.state.device, non_blocking=True) for key in (self.loss.key, Keys.LABEL)
        )
        self.loss.eval()
        with torch.no_grad(), self._autocast():
            loss: Tensor = self.inferer(values, self.loss, labels, self.generator)
        self._sum += loss.double() * len(values)
        self._count += len(values)
        return {Keys.LABEL: labels, Keys.LOSS: loss}

    def _summarize(self) -> None:
        mean = float(self._sum) / max(1, self._count)
        if not math.isfinite(mean):
            raise VaevqMedError(f"validation: found a loss of {mean}, expected a finite number")
        self.state.metrics.update(self.loss.figures(mean))
