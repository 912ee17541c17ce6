"""An evaluation in MLflow."""

from __future__ import annotations

from ignite.engine import Engine, Events

from vaevq_med.evaluation.handler import EvaluationHandler
from vaevq_med.trained.network import StoredTokenizer
from vaevq_med.training.tracking import MLflowTracker


class EvaluationTracker:
    """Log an evaluation to the MLflow run that trained the tokenizer, or to one of its own.

    Args:
        tracking_uri: MLflow tracking URI; ``none`` or None turns tracking off.
        experiment: experiment of a run of its own.
        stored: the evaluated checkpoint.
        evaluation: the handler that measures.
        split: prefix of the metrics' names.
    """

    def __init__(
        self,
        *,
        tracking_uri: str | None,
        experiment: str,
        stored: StoredTokenizer,
        evaluation: EvaluationHandler,
        split: str,
    ) -> None:
        self.tracker = MLflowTracker(tracking_uri=tracking_uri, experiment=experiment, config=stored.config)
        self.stored = stored
        self.evaluation = evaluation
        self.split = split

    def attach(self, engine: Engine) -> None:
        """Register the event; has to come after the measuring handler."""
        if self.tracker.enabled:
            engine.add_event_handler(Events.COMPLETED, self._completed)

    def _completed(self, engine: Engine) -> None:
        tracker = self.tracker
        with tracker.guard():
            tracker.start_run(self.stored.run_id, resume=False)
            figures = {f"{self.split}/{name}": value for name, value in engine.state.metrics.items()}
            tracker.log_metrics(figures, self.stored.iteration)
            folder = self.evaluation.output_dir
            for path in sorted(folder.iterdir()) if folder is not None else []:
                tracker.log_artifact(path, f"evaluation/{self.split}")
            if self.stored.run_id is not None and tracker.run_id == self.stored.run_id:
                tracker.close()
            else:
                tracker.end_run("FINISHED")
