"""The MLflow run that a study's rows are nested under; a failing server stops nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vaevq_med.study.plan import Plan
from vaevq_med.trained.network import StoredNetwork
from vaevq_med.training.tracking import MLflowTracker


def log_to_training(plan: Plan, checkpoint: Path, figures: Mapping[str, float]) -> None:
    """Log figures, by name, to the MLflow run of the training that wrote a checkpoint."""
    tracker = MLflowTracker(tracking_uri=plan.study.tracking_uri, experiment=plan.experiment())
    if not tracker.enabled:
        return
    with tracker.guard():
        stored = StoredNetwork(checkpoint)
        if stored.run_id is not None:
            tracker.start_run(stored.run_id, resume=False)
            tracker.log_metrics(figures, stored.iteration)
            tracker.close()


class ParentRun:
    """One run a study, with the table's figures.

    Args:
        plan: what is compared.
        run_id: the run of an earlier call, to go on with.
    """

    def __init__(self, plan: Plan, run_id: str | None = None) -> None:
        label, families = plan.study.label, dict.fromkeys(method.family or method.name for method in plan.methods)
        self._tracker = MLflowTracker(
            tracking_uri=plan.study.tracking_uri,
            experiment=plan.experiment(),
            run_name=f"{label} {', '.join(families)}",
            config=plan.shared(),
            tags={"vaevq_med.comparison": label},
        )
        self._run_id = run_id

    def open(self) -> str | None:
        """Start or take up the run; its id, None where tracking is off or fails."""
        if not self._tracker.enabled:
            return None
        with self._tracker.guard():
            self._tracker.start_run(self._run_id)
            if self._tracker.run_id is None:
                self._tracker.close()
        return self._tracker.run_id

    def close(self, status: str, figures: Mapping[str, float], files: Sequence[Path] = ()) -> None:
        """Log the table's figures and files, and end the run as ``FINISHED``, ``FAILED`` or ``KILLED``."""
        if self._tracker.run_id is None:
            return
        with self._tracker.guard():
            self._tracker.log_metrics(figures, 0)
            for path in files:
                self._tracker.log_artifact(path)
            self._tracker.end_run(status)
