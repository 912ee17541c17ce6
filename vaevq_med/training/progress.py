"""Progress of a run on the terminal: a bar where there is one, a line now and then where there is not."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from ignite.engine import Engine, Events
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vaevq_med.training import distributed


class ProgressReporter:
    """Show iterations, the time left and a few terms.

    Args:
        description: what the bar is called.
        terms: names in ``engine.state.terms`` to show.
        seconds: seconds between two lines where the output is not a terminal.
        total: iterations of the whole run; by default ``max_epochs * epoch_length``.
        metrics: names in the validation's figures to show; an evaluation shows all of them at its end.
        written: folder to name at the end of an evaluation.
    """

    def __init__(
        self,
        *,
        description: str = "train",
        terms: Sequence[str] = ("loss", "reconstruction", "perceptual"),
        seconds: float = 15.0,
        total: int | None = None,
        metrics: Sequence[str] = ("psnr", "ssim", "utilization", "perplexity", "utilization_sample"),
        written: str | Path | None = None,
    ) -> None:
        self.description = description
        self.terms = tuple(terms)
        self.seconds = seconds
        self.total = total
        self.metrics = tuple(metrics)
        self.written = written
        self.console = Console()
        self._progress: Progress | None = None
        self._shown = 0.0

    def attach(self, engine: Engine) -> None:
        """Register the events on the main process."""
        if not distributed.is_main():
            return
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)
        engine.add_event_handler(Events.COMPLETED | Events.TERMINATE | Events.EXCEPTION_RAISED, self._stop)
        engine.add_event_handler(Events.COMPLETED, self._completed)

    def _length(self, engine: Engine) -> int:
        if self.total is not None:
            return self.total
        return (engine.state.max_epochs or 1) * (engine.state.epoch_length or 1)

    def _started(self, engine: Engine) -> None:
        self._shown = time.monotonic()
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[terms]}"),
                console=self.console,
                refresh_per_second=4,
            )
            self._progress.start()
            self._task = self._progress.add_task(
                self.description, total=self._length(engine), completed=engine.state.iteration, terms=""
            )

    def _text(self, engine: Engine) -> str:
        terms = getattr(engine.state, "terms", {})
        return "  ".join(f"{name} {terms[name]:.4g}" for name in self.terms if name in terms)

    def _iteration_completed(self, engine: Engine) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=engine.state.iteration)
            # Looking at the terms makes the host wait for a GPU.
            if time.monotonic() - self._shown >= 1:
                self._shown = time.monotonic()
                self._progress.update(self._task, terms=self._text(engine))
        elif time.monotonic() - self._shown >= self.seconds:
            self._shown = time.monotonic()
            self.console.print(
                f"{self.description} {engine.state.iteration}/{self._length(engine)}  {self._text(engine)}",
                highlight=False,
            )

    def _epoch_completed(self, engine: Engine) -> None:
        metrics = getattr(engine.state, "validation", None)
        if metrics:
            shown = "  ".join(f"{name} {metrics[name]:.4g}" for name in self.metrics if name in metrics)
            self.console.print(f"epoch {engine.state.epoch}/{engine.state.max_epochs}  {shown}", highlight=False)

    def _completed(self, engine: Engine) -> None:
        if hasattr(engine.state, "terms"):
            return
        for name, value in engine.state.metrics.items():
            self.console.print(f"  {name:<28}{float(value):10.4f}", highlight=False)
        if self.written is not None:
            self.console.print(f"written to {self.written}", highlight=False, soft_wrap=True)

    def _stop(self, engine: Engine, *error: BaseException) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
