"""What a trainer is told of its validation."""

from __future__ import annotations

from typing import Any

from ignite.engine import Engine, Events

from vaevq_med.core.errors import VaevqMedError


class ValidationSummary:
    """Hand the validation's figures to the trainer as ``state.validation``, empty where none took place.

    Args:
        evaluator: validation engine.
        interval: epochs between validations.

    Raises:
        VaevqMedError: the interval is below 1.
    """

    def __init__(self, *, evaluator: Engine, interval: int = 1) -> None:
        if interval < 1:
            raise VaevqMedError(f"val_interval: found {interval}, expected 1 or more")
        self.evaluator = evaluator
        self.interval = interval

    def attach(self, engine: Engine) -> None:
        """Register the event; has to come after the validation handler."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)

    def _epoch_completed(self, engine: Engine) -> None:
        took_place = engine.state.epoch % self.interval == 0
        state: Any = engine.state
        state.validation = dict(self.evaluator.state.metrics) if took_place else {}
