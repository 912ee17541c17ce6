"""Experiment tracking in MLflow: parameters, every term, metrics, pictures and checkpoints of a run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from ignite.engine import Engine, Events

from vaevq_med import __version__
from vaevq_med.training import distributed

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from vaevq_med.training.checkpoint import TrainingCheckpoint

_FOREIGN = re.compile(r"[^/\w.\- ]")  # MLflow on Windows has no place for a colon either
logger = logging.getLogger(__name__)
_MAX_PARAMS = 100
_MAX_METRICS = 1000
# Points kept while the server fails: an hour or so of training.
_MAX_BUFFERED = 100_000


def followed(value: Any, config: Mapping[str, Any]) -> Any:
    """What a reference (``@objective::weights::kl``) leads to, where that is a plain value; else ``value`` itself.

    >>> followed("@weights#kl", {"weights": {"kl": 0.5}}), followed("@network", {"network": {"_target_": "Net"}})
    (0.5, '@network')
    >>> followed("@network", {"network": "$@network_def.to(@device)"})
    '@network'
    """
    found, seen = value, set[str]()
    while isinstance(found, str) and found.startswith("@") and found not in seen:
        seen.add(found)
        parts = found.removeprefix("@").replace("#", "::").split("::")
        found = config
        for part in parts:
            found = found.get(part) if isinstance(found, Mapping) else None
    plain = found is not None and not isinstance(found, Mapping | list) and not str(found).startswith(("$", "@"))
    return found if plain else value


def flatten(config: Any, prefix: str = "", whole: Mapping[str, Any] | None = None) -> dict[str, str]:
    """A nested configuration as MLflow parameters: ``objective.weights.rcs`` to ``"1.0"``.

    >>> flatten({"objective": {"weights": {"rcs": 1.0}}, "set": {"network_def#variational": True}})
    {'objective.weights.rcs': '1.0', 'set.network_def.variational': 'true'}
    """
    whole = config if whole is None and isinstance(config, Mapping) else whole or {}
    if isinstance(config, Mapping):
        items = [(str(key), value) for key, value in config.items()]
    elif isinstance(config, list) and any(isinstance(value, Mapping | list) for value in config):
        items = [(str(number), value) for number, value in enumerate(config)]
    else:
        config = followed(config, whole)
        return {prefix[:250]: (config if isinstance(config, str) else json.dumps(config, default=str))[:6000]}
    flat: dict[str, str] = {}
    for key, value in items:
        key = re.sub(r"[^\w\-. :/]", ".", key)  # MLflow takes no '#'
        flat |= flatten(value, f"{prefix}.{key}" if prefix else key, whole)
    return flat


def versions() -> dict[str, str]:
    """Versions of what a run depends on, and its hardware."""
    import monai
    import numpy

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    return {
        "vaevq_med": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "monai": monai.__version__,
        "numpy": numpy.__version__,
        "device": device,
        "processes": str(distributed.world_size()),
    }


def artifact_location(tracking_uri: str) -> str | None:
    """Where a new experiment's artifacts go: ``mlruns`` beside a SQLite file, otherwise the server's choice."""
    if not tracking_uri.startswith("sqlite:///"):
        return None
    return (Path(tracking_uri.removeprefix("sqlite:///")).resolve().parent / "mlruns").as_uri()


@contextlib.contextmanager
def one_at_a_time(tracking_uri: str) -> Iterator[None]:
    """Let one process at a time make and migrate a SQLite file, which MLflow's own lock leaves open.

    The lock is a file beside it, or in the temporary folder where that folder takes none.
    """
    if not tracking_uri.startswith("sqlite:///"):
        yield
        return
    path = Path(tracking_uri.removeprefix("sqlite:///")).resolve()
    name = f".{path.name}.lock"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(FileLock(path.with_name(name), timeout=300))
        except OSError:
            user = os.getuid() if hasattr(os, "getuid") else ""
            own = hashlib.sha256(f"{user} {path}".encode()).hexdigest()[:16]
            stack.enter_context(FileLock(Path(tempfile.gettempdir()) / f"vaevq_med_{own}{name}", timeout=300))
        yield


class MLflowTracker:
    """Log a training run to MLflow; a resumed run goes on in the same MLflow run.

    A tracking server that fails is reported once and never stops the training.

    Args:
        tracking_uri: MLflow tracking URI, by default a SQLite file in the working directory; ``none`` turns
            tracking off.
        experiment: experiment name, made if it does not exist.
        run_name: name of the run; by default MLflow invents one.
        config: resolved configuration, logged as parameters and as ``config.json``.
        tags: further tags, e.g. the data set's hash.
        interval: iterations between two writes of the buffered terms.
        checkpoint: the run's checkpoint handler, which stores the run id and whose files are logged.
        log_checkpoints: log ``best.pt`` and ``last.pt`` as artifacts at the end.
        pictures: folder whose PNG files are logged after each validation.
        parent_run_id: nest the run below this one.
    """

    def __init__(
        self,
        *,
        tracking_uri: str = "sqlite:///mlflow.db",
        experiment: str = "vaevq_med",
        run_name: str | None = None,
        config: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        interval: int = 50,
        checkpoint: TrainingCheckpoint | None = None,
        log_checkpoints: bool = True,
        pictures: str | Path | None = None,
        parent_run_id: str | None = None,
    ) -> None:
        self.tracking_uri = tracking_uri
        self.experiment = experiment
        self.run_name = run_name
        self.config = dict(config or {})
        self.tags = {key: str(value) for key, value in (tags or {}).items()}
        self.interval = interval
        self.checkpoint = checkpoint
        self.log_checkpoints = log_checkpoints
        self.pictures = None if pictures is None else Path(pictures)
        self.parent_run_id = parent_run_id
        self.run_id: str | None = None
        self._client: MlflowClient | None = None
        self._buffer: list[tuple[str, float, int, int]] = []
        self._unread: list[tuple[int, int, Mapping[str, float]]] = []
        self._logged_until = 0
        self._failed = False

    @property
    def enabled(self) -> bool:
        """Whether this process tracks."""
        return self.tracking_uri != "none" and distributed.is_main()

    def attach(self, engine: Engine) -> None:
        """Register the events, unless tracking is off."""
        if not self.enabled:
            return
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)
        engine.add_event_handler(Events.COMPLETED | Events.TERMINATE, self._completed)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._exception)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Report the first failure of the tracking server as a warning and go on."""
        try:
            yield
        except Exception as error:
            if not self._failed:
                logger.warning("MLflow at %s failed (%s); training goes on", self.tracking_uri, error)
            self._failed = True

    def _open(self) -> MlflowClient:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow.store").setLevel(logging.WARNING)
        from mlflow import MlflowClient

        with one_at_a_time(self.tracking_uri):
            return MlflowClient(tracking_uri=self.tracking_uri)  # makes the file's tables

    def start_run(self, resumed_id: str | None = None, *, resume: bool = True) -> None:
        """Open the run: a new one, or the one that a checkpoint names.

        Args:
            resumed_id: the run that a checkpoint names.
            resume: whether training goes on in it; otherwise its status is left alone.
        """
        from mlflow.exceptions import MlflowException

        self._client = client = self._open()
        if resumed_id is not None:
            try:
                if resume:
                    client.update_run(resumed_id, status="RUNNING")
                else:
                    client.get_run(resumed_id)
                self.run_id = resumed_id
                history = client.get_metric_history(resumed_id, "train/loss")
                self._logged_until = max((point.step for point in history), default=0)
                return
            except MlflowException:
                logger.warning("MLflow has no run %s any more; a new one is made", resumed_id)
        experiment_id = self._experiment(client)
        tags = {**self.tags, **{f"version.{name}": value for name, value in versions().items()}}
        if self.parent_run_id is not None:
            tags["mlflow.parentRunId"] = self.parent_run_id
        run = client.create_run(experiment_id, run_name=self.run_name, tags=tags)
        self.run_id = run.info.run_id
        self.log_config(self.config)

    def _experiment(self, client: MlflowClient) -> str:
        """Id of the experiment, which another process may make at the same moment."""
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(self.experiment)
        if found is not None:
            return found.experiment_id
        try:
            return client.create_experiment(self.experiment, artifact_location=artifact_location(self.tracking_uri))
        except MlflowException:
            found = client.get_experiment_by_name(self.experiment)
            if found is None:
                raise
            return found.experiment_id

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Log a configuration as parameters and as the artifact ``config.json``."""
        from mlflow.entities import Param

        if self._client is None or self.run_id is None:
            return
        flat = [Param(key, value) for key, value in sorted(flatten(config).items())]
        for first in range(0, len(flat), _MAX_PARAMS):
            self._client.log_batch(self.run_id, params=flat[first : first + _MAX_PARAMS])
        self._client.log_dict(self.run_id, dict(config), "config.json")

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Buffer metrics; they are written in batches. What MLflow has no place for in a name becomes ``_``."""
        self._buffer_metrics(metrics, step, int(time.time() * 1000))

    def _buffer_metrics(self, metrics: Mapping[str, float], step: int, now: int) -> None:
        del self._buffer[: max(0, len(self._buffer) - _MAX_BUFFERED)]
        self._buffer.extend((_FOREIGN.sub("_", name), float(value), now, step) for name, value in metrics.items())

    def flush(self) -> None:
        """Write the buffered metrics; what a failing server did not take stays for the next time."""
        from mlflow.entities import Metric

        unread, self._unread = self._unread, []
        for step, moment, terms in unread:
            self._buffer_metrics({f"train/{name}": value for name, value in terms.items()}, step, moment)
        if self._client is None or self.run_id is None:
            return
        while self._buffer:
            points = self._buffer[:_MAX_METRICS]
            self._client.log_batch(self.run_id, metrics=[Metric(*point) for point in points])
            del self._buffer[: len(points)]

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Log a file, if it is there."""
        if self._client is not None and self.run_id is not None and path.is_file():
            self._client.log_artifact(self.run_id, str(path), folder)

    def end_run(self, status: str) -> None:
        """Write what is buffered and set the run's final status."""
        self.flush()
        if self._client is not None and self.run_id is not None:
            self._client.set_terminated(self.run_id, status=status)

    def _started(self, engine: Engine) -> None:
        with self.guard():
            self.start_run(self.checkpoint.extra.get("mlflow_run_id") if self.checkpoint else None)
            if self.checkpoint is not None:
                self.checkpoint.extra["mlflow_run_id"] = self.run_id
                if self._client is not None and self.run_id is not None:
                    for name, words in self.checkpoint.change_tags().items():
                        self._client.set_tag(self.run_id, name, words)

    def _iteration_completed(self, engine: Engine) -> None:
        step = engine.state.iteration
        if step <= self._logged_until or self._client is None:
            return
        # Not looked at before they are written: that makes the host wait for a GPU.
        self._unread.append((step, int(time.time() * 1000), engine.state.terms))  # type: ignore[attr-defined]
        del self._unread[: max(0, len(self._unread) - _MAX_BUFFERED)]
        if step % self.interval == 0:
            with self.guard():
                self.flush()

    def _epoch_completed(self, engine: Engine) -> None:
        with self.guard():
            metrics = getattr(engine.state, "validation", None) or {}
            self.log_metrics({f"val/{name}": value for name, value in metrics.items()}, engine.state.iteration)
            self.log_metrics({"epoch": engine.state.epoch}, engine.state.iteration)
            self.flush()
            for picture in sorted(self.pictures.glob("*.png")) if self.pictures else []:
                self.log_artifact(picture, f"pictures/epoch_{engine.state.epoch:04d}")

    def _completed(self, engine: Engine) -> None:
        interrupted = self.checkpoint is not None and self.checkpoint.interrupted_by is not None
        with self.guard():
            if self.log_checkpoints and self.checkpoint is not None:
                for name in ("best.pt", "last.pt"):
                    self.log_artifact(self.checkpoint.directory / name, "checkpoints")
            self.end_run("KILLED" if interrupted else "FINISHED")

    def _exception(self, engine: Engine, error: BaseException) -> None:
        with self.guard():
            if self._client is not None and self.run_id is not None:
                self._client.set_tag(self.run_id, "error", str(error)[:5000])
            self.end_run("FAILED")
