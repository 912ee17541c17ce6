"""Whatever a trained network comes in, read as one: a checkpoint of training, or a packed bundle or its weights.

A packed bundle (``vaevq-med bundle pack``) holds the weights as plain state dictionaries, which MONAI's tools load, and
beside them ``models/trained.json``: what a checkpoint says of its training besides. A safetensors file carries the same
in its header, so that it can be moved alone. Bundles from before that have the settings of the network in
``configs/inference.json``. All of it is data that a stranger may have written: plain values alone are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.maker import MADE_BY
from vaevq_med.core.options import Options
from vaevq_med.networks.weight_file import header_of, is_safetensors, read_weight_file
from vaevq_med.trained.file import FORMAT, CheckpointError, as_checkpoint, is_state_dict, network_hash

MODELS = "models"
WEIGHTS = ("model.safetensors", "model.pt")
"""Files of weights of a packed bundle, the first that is there is read."""
RECORD = "trained.json"
HEADER = "vaevq_med"
_CONFIGS = "configs/inference.json"
_LARGEST_RECORD = 64 * 2**20
_EXPECTED = "a checkpoint of a training run, a packed bundle, or its models/model.pt or models/model.safetensors"


class TrainingRecord(Options):
    """What is known of the training of packed weights.

    Attributes:
        format: of this record.
        network: SHA-256 of the network's definition and weights.
        weights: ``ema`` where they are averages of those that were trained, ``network`` where they are these.
        iteration: that they are of.
        run: MLflow run that trained them, if any.
        version: of the package that packed them.
        config: settings of the training, plain values.
        data: what the data set said of itself, with hashes in place of the names of patients.
        feature_weights: hashes of the weights of the feature networks that the objective measured by.
        spent: what the training counted of itself: images, seconds, the device.
    """

    format: Literal[1] = 1
    network: str
    weights: Literal["ema", "network"]
    iteration: int = Field(ge=0)
    run: str | None = None
    version: str = ""
    config: dict[str, Any]
    data: dict[str, Any] = Field(default_factory=dict)
    feature_weights: dict[str, str] = Field(default_factory=dict)
    spent: dict[str, Any] = Field(default_factory=dict)

    def as_state(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The weights with all this as a checkpoint's dictionary has them."""
        return {
            "format": FORMAT,
            "version": self.version,
            "network": dict(tensors),
            "config": json.dumps(self.config),
            "data": self.data,
            "iteration": self.iteration,
            "extra": {"run_summary": self.spent, **({} if self.run is None else {"mlflow_run_id": self.run})},
            "feature_weights": self.feature_weights,
            "packed": self.weights,
        }


def weights_file(path: str | Path) -> Path:
    """The file that holds the weights: ``path``, or one of the packed bundle that ``path`` is the folder of.

    Raises:
        CheckpointError: it is a folder of something else.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    found = next((file for name in WEIGHTS if (file := path / MODELS / name).is_file()), None)
    if found is None:
        names = " or ".join(f"{MODELS}/{name}" for name in WEIGHTS)
        raise CheckpointError(f"{path}: found a folder without {names}, expected {_EXPECTED}")
    return found


def read_trained(path: str | Path) -> dict[str, Any]:
    """A trained network in any form that it is given in, as the dictionary that a training's checkpoint holds.

    Args:
        path: a checkpoint of a training run; the folder of a packed bundle; its ``models/model.pt`` or
            ``models/model.safetensors``, the latter also without its folder.

    Returns:
        ``network``, the state dictionary, and where both are there ``ema``, its average; ``config``, JSON text of the
        settings of the training; ``data``, ``iteration``, ``extra`` and what else a checkpoint has. Of packed weights
        ``packed`` says whether they are the average (``ema``) or not (``network``), and there is no other set; nothing
        to resume from is there.

    Raises:
        CheckpointError: there is no such file, it is something else or truncated, or the weights are not those that
            were packed.
    """
    file = weights_file(path)
    if not file.is_file():
        raise CheckpointError(
            f"{file}: found no checkpoint, expected one written by training, as checkpoints/best.pt of its output "
            "folder, or a packed bundle"
        )
    state = read_weight_file(file, _EXPECTED, CheckpointError)
    if not is_state_dict(state):
        return as_checkpoint(state, file)
    record = _record_of(file)
    if record is not None:
        found = as_checkpoint(record.as_state(state), file)
        _check_unchanged(file, record, state)
        return found
    return as_checkpoint(_before_records(file, state), file)


def is_described(file: Path) -> bool:
    """Whether a file of weights, or one about it, has the settings of the training for :func:`read_trained`."""
    beside = (file.with_name(RECORD), file.parent.parent / _CONFIGS)
    return file.is_file() and (
        any(path.is_file() for path in beside) or (is_safetensors(file) and HEADER in header_of(file))
    )


def _record_of(file: Path) -> TrainingRecord | None:
    """What stands in the file's header, or beside it."""
    if is_safetensors(file) and (told := header_of(file).get(HEADER)) is not None:
        return _parsed(told, f"{file}: header")
    beside = file.with_name(RECORD)
    return _parsed(_text(beside), str(beside)) if beside.is_file() else None


def _parsed(text: str, where: str) -> TrainingRecord:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: found invalid JSON ({error}), expected the record of a training") from None
    try:
        return TrainingRecord.read(values, where)
    except VaevqMedError as error:
        raise CheckpointError(str(error)) from None
    except RecursionError:
        raise CheckpointError(f"{where}: found objects too deep in one another, expected a training's record") from None


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST_RECORD:
            raise CheckpointError(f"{path}: found {path.stat().st_size} bytes, expected at most {_LARGEST_RECORD}")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: found no text ({error.reason}), expected JSON") from None


def _check_unchanged(file: Path, record: TrainingRecord, tensors: Mapping[str, Any]) -> None:
    found = network_hash(record.config.get("network_def"), tensors)
    if found != record.network:
        raise CheckpointError(
            f"{file}: found weights or a network_def of {found[:19]}, expected {record.network[:19]}, as they were "
            "packed: the file was altered, or is another bundle's; copy it again, or pack the checkpoint again"
        )


def _before_records(file: Path, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a bundle that was packed before there were records: what its configuration says of them."""
    root = file.parent.parent
    configs = root / _CONFIGS
    if not configs.is_file():
        raise CheckpointError(
            f"{file}: found weights alone, without the settings of their training ({RECORD} beside them), expected "
            f"{_EXPECTED}"
        )
    config = _object(_object(_object(configs).get("stored"), configs).get("config"), configs)
    made = root / MADE_BY
    told = _object(made) if made.is_file() else {}
    data = told.get("trained_on")
    known = isinstance(data, Mapping)
    record = TrainingRecord.model_construct(
        network="",
        weights="network" if told.get("weights") == "network" else "ema",
        iteration=told["iteration"] if isinstance(told.get("iteration"), int) else 0,
        config=config,
        data={key: value for key, value in data.items() if isinstance(value, str)} if known else {},  # type: ignore[union-attr]
    )
    return record.as_state(tensors)


def _object(value: Any, path: Path | None = None) -> dict[str, Any]:
    """A JSON object, or that of a file."""
    where = value if isinstance(value, Path) else path
    assert where is not None
    try:
        found = json.loads(_text(value)) if isinstance(value, Path) else value
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: found invalid JSON ({error}), expected an object") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: found no settings of the network, expected those of a packed bundle")
    return found
