"""Experiment tracking in MLflow: parameters, every term, metrics, pictures and checkpoints of a run."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import platform
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ignite.engine import Engine, Events

from vaevq_med import __version__
from vaevq_med.training import distributed
from vaevq_med.training.events import RunEvents
from vaevq_med.training.mlflow_runs import MLflowRuns, is_local
from vaevq_med.training.outbox import Outbox

if TYPE_CHECKING:
    from vaevq_med.training.checkpoint import TrainingCheckpoint

_FOREIGN = re.compile(r"[^/\w.\- ]")  # MLflow on Windows has no place for a colon either
logger = logging.getLogger(__name__)
_MAX_METRICS = 1000
_ID, _KEY = "mlflow_run_id", "mlflow_run_key"
_LOCAL_PATIENCE = 60.0
"""Seconds that the end of a run waits for a store on this machine that takes nothing."""


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


class MLflowTracker:
    """Log a training run to MLflow; a resumed run goes on in the same MLflow run.

    A thread tells MLflow everything in order, so that training does not wait for a server. While that fails, what it is
    not told is kept in ``mlflow_unsent_*`` beside the checkpoints' folder, and sent once it answers, in this process or
    in one that resumes the run, or finds it finished.

    Args:
        tracking_uri: MLflow tracking URI, by default a SQLite file in the working directory; ``none`` or None turns
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
        patience: seconds that the run waits, at its beginning and at its end, for a server that takes nothing.

    Attributes:
        run_id: of the run, None before MLflow has given it one.
    """

    def __init__(
        self,
        *,
        tracking_uri: str | None = "sqlite:///mlflow.db",
        experiment: str = "vaevq_med",
        run_name: str | None = None,
        config: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        interval: int = 50,
        checkpoint: TrainingCheckpoint | None = None,
        log_checkpoints: bool = True,
        pictures: str | Path | None = None,
        parent_run_id: str | None = None,
        patience: float = 10.0,
    ) -> None:
        self.tracking_uri = "none" if tracking_uri is None else tracking_uri
        self.experiment = experiment
        self.run_name = run_name
        self.config = dict(config or {})
        self.tags = {key: str(value) for key, value in (tags or {}).items()}
        self.interval = interval
        self.checkpoint = checkpoint
        self.log_checkpoints = log_checkpoints
        self.pictures = None if pictures is None else Path(pictures)
        self.parent_run_id = parent_run_id
        self.patience = patience
        self.run_id: str | None = None
        self._key = ""
        self._outbox: Outbox | None = None
        self._buffer: list[tuple[str, float, int, int]] = []
        self._unread: list[tuple[int, int, Mapping[str, float]]] = []
        self._failed = False

    @property
    def enabled(self) -> bool:
        """Whether this process tracks."""
        return self.tracking_uri != "none" and distributed.is_main()

    @property
    def unsent(self) -> Path | None:
        """Folder of what could not be sent, of this store and experiment; None without a checkpoint beside it."""
        if self.checkpoint is None:
            return None
        place = hashlib.sha256(f"{self.tracking_uri} {self.experiment}".encode()).hexdigest()[:8]
        return self.checkpoint.directory.parent / f"mlflow_unsent_{place}"

    def attach(self, engine: Engine) -> None:
        """Register the events, unless tracking is off."""
        if not self.enabled:
            return
        engine.register_events(*RunEvents)
        engine.add_event_handler(RunEvents.ALREADY_FINISHED, self._already_finished)
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)
        engine.add_event_handler(Events.COMPLETED | Events.TERMINATE, self._completed)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._exception)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Report the first failure to make something ready for MLflow as a warning and go on."""
        try:
            yield
        except Exception as error:
            if not self._failed:
                logger.warning("MLflow at %s failed (%s); the work goes on", self.tracking_uri, error)
            self._failed = True

    def _open(self) -> Outbox:
        runs = MLflowRuns(self.tracking_uri, self._run_started)
        outbox = Outbox(runs.send, self.unsent, on_failure=self._server_failed)
        outbox.start()
        return outbox

    def _server_failed(self, error: Exception | None) -> None:
        """Say that MLflow fails, or that it answers again; called by the thread."""
        if error is None:
            logger.warning("MLflow at %s answers again", self.tracking_uri)
            return
        kept = "" if self.unsent is None else f"; what it is not told is kept in {self.unsent} until it answers"
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:400]
        logger.warning("MLflow at %s failed (%s); the work goes on%s", self.tracking_uri, line, kept)

    def _run_started(self, key: str, run_id: str) -> None:
        """Note the id that MLflow gave a run; called by the thread."""
        if key != self._key:
            return
        self.run_id = run_id
        if self.checkpoint is not None:
            self.checkpoint.extra[_ID] = run_id

    def start_run(self, resumed_id: str | None = None, *, resume: bool = True, key: str | None = None) -> None:
        """Open the run: a new one, or the one that a checkpoint names.

        It waits for the id, but for some seconds only where the store is a server: then :attr:`run_id` comes later.

        Args:
            resumed_id: the run that a checkpoint names.
            resume: whether training goes on in it; otherwise its status is left alone.
            key: what the run was called before it had an id, where an earlier process got none.
        """
        self.run_id, self._key = resumed_id, key or uuid.uuid4().hex
        self._outbox = outbox = self._open()
        tags = {**self.tags, **{f"version.{name}": value for name, value in versions().items()}}
        if self.parent_run_id is not None:
            tags["mlflow.parentRunId"] = self.parent_run_id
        self._put("start", resume=resume, run_name=self.run_name, tags=tags, config=self.config, began=_now())
        outbox.wait(None if is_local(self.tracking_uri) else self.patience)

    def _put(self, do: str, **content: Any) -> None:
        if self._outbox is not None:
            known = {} if self.run_id is None else {"id": self.run_id}
            self._outbox.put({"do": do, "run": self._key, "experiment": self.experiment, **known, **content})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags of the run."""
        self._put("tags", tags={name: str(value)[:5000] for name, value in tags.items()})

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Buffer metrics; they are sent in batches. What MLflow has no place for in a name becomes ``_``."""
        self._buffer_metrics(metrics, step, _now())

    def _buffer_metrics(self, metrics: Mapping[str, float], step: int, now: int) -> None:
        self._buffer.extend((_FOREIGN.sub("_", name), float(value), now, step) for name, value in metrics.items())

    def flush(self) -> None:
        """Hand the buffered metrics over, without waiting for MLflow to take them."""
        unread, self._unread = self._unread, []
        for step, moment, terms in unread:
            self._buffer_metrics({f"train/{name}": value for name, value in terms.items()}, step, moment)
        buffer, self._buffer = self._buffer, []
        for first in range(0, len(buffer), _MAX_METRICS):
            self._put("metrics", points=buffer[first : first + _MAX_METRICS])

    def log_artifact(self, path: Path, folder: str | None = None, *, changes: bool = False) -> None:
        """Log a file, if it is there.

        Args:
            path: the file.
            folder: where it goes among the run's artifacts.
            changes: whether it may be written anew soon, so that a copy of it is logged.
        """
        if self._outbox is None or not path.is_file():
            return
        place = self._outbox.copied(path) if changes else path.resolve()
        copy = {"copy": str(place)} if place != path and changes else {}
        self._put("artifact", path=str(place), folder=folder, bytes=place.stat().st_size, **copy)

    def end_run(self, status: str) -> None:
        """Hand over what is buffered and the run's final status, and :meth:`close`."""
        self.flush()
        self._put("end", status=status, ended=_now())
        self.close()

    def close(self) -> None:
        """Hand over what is buffered, wait for MLflow to take it as long as it does, and say what is missing."""
        self.flush()
        outbox, self._outbox = self._outbox, None
        if outbox is None:
            return
        left = outbox.close(_LOCAL_PATIENCE if is_local(self.tracking_uri) else self.patience)
        if left:
            logger.warning("MLflow at %s was not told everything: %s", self.tracking_uri, self._missing(outbox))
        if outbox.lost:
            logger.warning("MLflow at %s was not told %d messages, which are lost", self.tracking_uri, outbox.lost)

    def _missing(self, outbox: Outbox) -> str:
        messages = list(outbox.messages())
        steps = [point[3] for message in messages for point in message.get("points", ())]
        files = sum(message["do"] == "artifact" for message in messages)
        parts = [f"metrics of the iterations {min(steps)} to {max(steps)}"] if steps else []
        parts += [f"{files} files"] if files else []
        words = f"{len(messages)} messages{' with ' if parts else ''}{' and '.join(parts)}"
        if self.unsent is None:
            return f"{words} are missing; the same command sends them again"
        return f"{words} are kept in {self.unsent}; the same command, or one that resumes the run, sends them"

    def _started(self, engine: Engine) -> None:
        with self.guard():
            stored = self.checkpoint.extra if self.checkpoint is not None else {}
            self.start_run(stored.get(_ID), key=stored.get(_KEY))
            stored[_KEY] = self._key
            if self.checkpoint is not None:
                tags = {**self.checkpoint.start_tags(), **self.checkpoint.change_tags()}
                if tags:
                    self.set_tags(tags)

    def _already_finished(self, engine: Engine) -> None:
        """Send what is left of the run that is finished."""
        with self.guard():
            if self.unsent is not None and self.unsent.is_dir():
                self._outbox = outbox = self._open()
                count = len(outbox)
                self.close()
                if not len(outbox):
                    logger.warning("MLflow at %s was told the %d messages that it missed", self.tracking_uri, count)

    def _iteration_completed(self, engine: Engine) -> None:
        step = engine.state.iteration
        # Not looked at before they are sent: that makes the host wait for a GPU.
        self._unread.append((step, _now(), engine.state.terms))  # type: ignore[attr-defined]
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
                self.log_artifact(picture, f"pictures/epoch_{engine.state.epoch:04d}", changes=True)

    def _completed(self, engine: Engine) -> None:
        interrupted = self.checkpoint is not None and self.checkpoint.interrupted_by is not None
        with self.guard():
            self.flush()
            if self.log_checkpoints and self.checkpoint is not None:
                for name in ("best.pt", "last.pt"):
                    self.log_artifact(self.checkpoint.directory / name, "checkpoints")
            self.end_run("KILLED" if interrupted else "FINISHED")

    def _exception(self, engine: Engine, error: BaseException) -> None:
        with self.guard():
            self.set_tags({"error": error})
            self.end_run("FAILED")


def _now() -> int:
    """Milliseconds."""
    return int(time.time() * 1000)
