"""What MLflow is told of a run, message by message: the calls of its client, and what its answers mean."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.training.outbox import Message, RefusedError

if TYPE_CHECKING:
    from mlflow import MlflowClient

KEY = "vaevq_med.run"
"""Tag by which a run is found again whose id never arrived."""
logger = logging.getLogger(__name__)
_MAX_PARAMS = 100
_GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE")
_REFUSALS = (*_GONE, "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS")
_IN_USE = "'active' state"
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # A call that fails is made again after a pause; MLflow's own repetitions, some minutes of them, would come on top.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
}
_TALKATIVE = {"alembic": logging.WARNING, "mlflow.store": logging.WARNING, "urllib3.connectionpool": logging.ERROR}


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


def is_local(tracking_uri: str) -> bool:
    """Whether a store is a file or a folder of this machine, and no server."""
    return tracking_uri.startswith(("sqlite:", "file:")) or "://" not in tracking_uri


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


class MLflowRuns:
    """Tell MLflow what messages say, each as a call.

    A message is a mapping with ``do`` and ``run``, a key that the run has from its beginning, long before MLflow gives
    it an id. ``start`` opens the run, a new one or that of an ``id``; ``metrics`` has ``points`` (name, value, time in
    milliseconds, step), ``tags`` has ``tags``, ``artifact`` a ``path`` and a ``folder``, and ``end`` a ``status``. All
    may be sent more than once.

    Args:
        tracking_uri: MLflow tracking URI.
        on_start: called with the key and the id of a run that was opened.
    """

    def __init__(self, tracking_uri: str, on_start: Callable[[str, str], None] = lambda key, run_id: None) -> None:
        self.tracking_uri = tracking_uri
        self.on_start = on_start
        self._client: MlflowClient | None = None
        self._ids: dict[str, str] = {}
        # Steps up to which a resumed run has its terms already.
        self._known: dict[str, int] = {}
        self._calls: dict[str, Callable[[Message], None]] = {
            "start": self._start,
            "metrics": self._metrics,
            "tags": self._tags,
            "artifact": self._artifact,
            "end": self._end,
        }
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        for name, level in _TALKATIVE.items():
            logging.getLogger(name).setLevel(level)
        import mlflow.tracking  # noqa: F401  (here, and not while another thread forks the workers of a data loader)

    @property
    def client(self) -> MlflowClient:
        """MLflow's client, made when it is first asked for."""
        if self._client is None:
            from mlflow import MlflowClient

            with one_at_a_time(self.tracking_uri):
                self._client = MlflowClient(tracking_uri=self.tracking_uri)  # makes the file's tables
        return self._client

    def send(self, message: Message) -> None:
        """Make the calls of a message.

        Raises:
            RefusedError: MLflow does not take it, now or later.
            VaevqMedError: it would, if somebody did what the message says.
            Exception: it does not answer.
        """
        from mlflow.exceptions import MlflowException

        try:
            self._calls[message["do"]](message)
        except FileNotFoundError as error:
            if message["do"] != "artifact" or Path(message["path"]).is_file():
                raise
            raise RefusedError(f"MLflow is not told of {message['path']}, which is gone") from error
        except MlflowException as error:
            if _IN_USE in str(error):
                raise VaevqMedError(
                    f"the run or its experiment is deleted; expected it in use: restore it ({_line(error)})"
                ) from error
            if message["do"] == "start" or error.error_code not in _REFUSALS:
                raise
            raise RefusedError(f"MLflow does not take {message['do']} ({_line(error)})") from error

    def _run_id(self, message: Message) -> str:
        """The id of a message's run: of this process, of the message, or by its tag."""
        key = message["run"]
        if key not in self._ids:
            found = message.get("id") or self._tagged(message)
            if found is None:
                raise RefusedError(f"MLflow does not take {message['do']}: it has no run {key}")
            self._ids[key] = found
        return self._ids[key]

    def _tagged(self, message: Message) -> str | None:
        experiment = self.client.get_experiment_by_name(message["experiment"])
        if experiment is None:
            return None
        runs = self.client.search_runs([experiment.experiment_id], f"tags.`{KEY}` = '{message['run']}'", max_results=1)
        return runs[0].info.run_id if runs else None

    def _start(self, message: Message) -> None:
        key = message["run"]
        # Without an id, it may be a run of a try whose answer was lost, or of an earlier process that got none.
        known = message.get("id") or self._ids.get(key) or self._tagged(message)
        run_id = None if known is None else self._resumed(known, message["resume"])
        if run_id is None:
            run_id = self._made(message)
            if known is not None:
                logger.warning("MLflow has no run %s any more; a new one, %s, goes on with it", known, run_id)
        elif "id" not in message and not self.client.get_run(run_id).data.params:
            self._config(run_id, message["config"])
        self._ids[key] = run_id
        self.on_start(key, run_id)

    def _resumed(self, run_id: str, resume: bool) -> str | None:
        from mlflow.exceptions import MlflowException

        try:
            if resume:
                self.client.update_run(run_id, status="RUNNING")
            else:
                self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code not in _GONE:
                raise
            return None
        history = self.client.get_metric_history(run_id, "train/loss")
        self._known[run_id] = max((point.step for point in history), default=0)
        return run_id

    def _made(self, message: Message) -> str:
        experiment_id, tags = self._experiment(message["experiment"]), {**message["tags"], KEY: message["run"]}
        run = self.client.create_run(experiment_id, message["began"], tags, message["run_name"])
        self._config(run.info.run_id, message["config"])
        return run.info.run_id

    def _config(self, run_id: str, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        flat = [Param(key, value) for key, value in sorted(flatten(config).items())]
        for first in range(0, len(flat), _MAX_PARAMS):
            self.client.log_batch(run_id, params=flat[first : first + _MAX_PARAMS])
        self.client.log_dict(run_id, dict(config), "config.json")

    def _experiment(self, name: str) -> str:
        """Id of the experiment, which another process may make at the same moment."""
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return self.client.create_experiment(name, artifact_location=artifact_location(self.tracking_uri))
            except MlflowException:
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise VaevqMedError(
                f"experiment {name!r} is deleted; expected one in use: name another with --experiment, or restore it "
                f"with MLFLOW_TRACKING_URI={self.tracking_uri} mlflow experiments restore --experiment-id "
                f"{found.experiment_id}"
            )
        return found.experiment_id

    def _metrics(self, message: Message) -> None:
        from mlflow.entities import Metric

        run_id = self._run_id(message)
        known = self._known.get(run_id, -1)
        points = [
            Metric(*point) for point in message["points"] if point[3] > known or not point[0].startswith("train/")
        ]
        if points:
            self.client.log_batch(run_id, metrics=points)

    def _tags(self, message: Message) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(name, value) for name, value in message["tags"].items()]
        self.client.log_batch(self._run_id(message), tags=tags)

    def _artifact(self, message: Message) -> None:
        self.client.log_artifact(self._run_id(message), message["path"], message["folder"])

    def _end(self, message: Message) -> None:
        self.client.set_terminated(self._run_id(message), status=message["status"], end_time=message["ended"])


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
