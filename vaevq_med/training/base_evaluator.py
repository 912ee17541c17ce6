"""What the evaluators share: precision, and errors that end the run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from monai.engines import SupervisedEvaluator
from torch import nn

from vaevq_med.training.base import pass_errors_on
from vaevq_med.training.precision import autocast, autocast_dtype


class BaseEvaluator(SupervisedEvaluator):
    """MONAI's evaluator with a precision and a seed.

    Args:
        device: where to evaluate.
        val_data_loader: yields dictionaries.
        network: what is evaluated.
        precision: ``fp32``, ``bf16`` for autocast, or ``auto``, which is ``bf16`` on a GPU that has it.
        seed: of what is drawn anew at each run.
        val_handlers: ignite handlers.
        **kwargs: passed on to ``SupervisedEvaluator``.

    Raises:
        VaevqMedError: there is no such precision.
    """

    def __init__(
        self,
        *,
        device: torch.device | str,
        val_data_loader: Iterable[Any],
        network: nn.Module,
        precision: str = "fp32",
        seed: int = 0,
        val_handlers: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.autocast_dtype = autocast_dtype(precision, device)
        super().__init__(
            device=torch.device(device),
            val_data_loader=val_data_loader,
            network=network,
            val_handlers=val_handlers,
            decollate=False,
            **kwargs,
        )
        self.seed = seed
        pass_errors_on(self)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return autocast(self.state.device, self.autocast_dtype)
