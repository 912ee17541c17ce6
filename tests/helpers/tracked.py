"""A run of MLflow that a process of its own opens; without MONAI, whose import would take the longest."""

from __future__ import annotations

from vaevq_med.training.tracking import MLflowTracker


def open_run(uri: str) -> str | None:
    """Its id."""
    tracker = MLflowTracker(tracking_uri=uri, config={"set": {"network_def#variational": True}})
    tracker.start_run()
    return tracker.run_id
