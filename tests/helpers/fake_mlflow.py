"""An MLflow server in this process: what its client is called with, while it is up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST


class FakeServer:
    """Keeps runs; in place of ``MlflowClient``, it answers as that does, or not at all while it is down."""

    def __init__(self) -> None:
        self.up = True
        self.deleted = False
        self.runs: dict[str, SimpleNamespace] = {}
        self.calls: list[str] = []

    def __call__(self, tracking_uri: str) -> FakeServer:
        return self

    def _answer(self, call: str, run_id: str | None = None) -> Any:
        self.calls.append(call)
        if not self.up:
            raise MlflowException(f"API request to /{call} failed with exception: Connection refused")
        if run_id is not None and run_id not in self.runs:
            raise MlflowException(f"Run with id={run_id} not found", RESOURCE_DOES_NOT_EXIST)
        return None if run_id is None else self.runs[run_id]

    def get_experiment_by_name(self, name: str) -> SimpleNamespace:
        self._answer("get_experiment_by_name")
        return SimpleNamespace(experiment_id="7", lifecycle_stage="deleted" if self.deleted else "active")

    def search_runs(self, experiment_ids: Sequence[str], text: str, max_results: int) -> list[SimpleNamespace]:
        self._answer("search_runs")
        return [run for run in self.runs.values() if any(f"'{value}'" in text for value in run.data.tags.values())]

    def create_run(self, experiment_id: str, start_time: int, tags: dict[str, str], run_name: str) -> SimpleNamespace:
        self._answer("create_run")
        run_id = f"run{len(self.runs)}"
        self.runs[run_id] = SimpleNamespace(
            info=SimpleNamespace(run_id=run_id, status="RUNNING"),
            data=SimpleNamespace(tags=dict(tags), params={}),
            metrics=[],
            files={},
        )
        return self.runs[run_id]

    def get_run(self, run_id: str) -> SimpleNamespace:
        return self._answer("get_run", run_id)

    def update_run(self, run_id: str, status: str) -> None:
        self._answer("update_run", run_id).info.status = status

    def set_terminated(self, run_id: str, status: str, end_time: int) -> None:
        self._answer("set_terminated", run_id).info.status = status

    def get_metric_history(self, run_id: str, name: str) -> list[Any]:
        return [point for point in self._answer("get_metric_history", run_id).metrics if point.key == name]

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> None:
        run = self._answer("log_batch", run_id)
        for param in params:
            if run.data.params.setdefault(param.key, param.value) != param.value:
                raise MlflowException(f"{param.key} has another value", INVALID_PARAMETER_VALUE)
        if any(metric.key == "refused" for metric in metrics):
            raise MlflowException("Invalid metric name", INVALID_PARAMETER_VALUE)
        run.data.tags |= {tag.key: tag.value for tag in tags}
        run.metrics.extend(metrics)

    def log_dict(self, run_id: str, content: dict[str, Any], name: str) -> None:
        self._answer("log_dict", run_id).files[name] = content

    def log_artifact(self, run_id: str, path: str, folder: str | None) -> None:
        self._answer("log_artifact", run_id).files[f"{folder}/{Path(path).name}"] = Path(path).read_bytes()
