"""Run the rows of a comparison one after the other, each as the commands that a user would type.

A finished row is kept, an interrupted one goes on from its checkpoint, a failing one is noted and the next begins.
"""

from __future__ import annotations

import csv
import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.files import atomic_write_text
from vaevq_med.core.folder import BusyError, OutputFolder
from vaevq_med.evaluation.options import BITS_NAME
from vaevq_med.images.generated import DRAWING_NAME
from vaevq_med.metrics.figures import Figure
from vaevq_med.study.bundle import first_difference, settings_hash
from vaevq_med.study.plan import Plan, Row

RECORD, STUDY = "comparison.json", "study.yaml"
STATE = ".comparison"
"""Folder of the lock of a comparison, and of each of its rows."""
_ROW_RECORD = "row.json"
_MAPPINGS = ("shared", "settings", "provenance", "tokenizer")
_ERROR_TAIL = 65_536
_BORDERS = ("╭", "╰", "┏", "┗")
"""What the first and last lines of a frame begin with, which rich draws around errors."""


@dataclass
class RowState:
    """How a row stands.

    Attributes:
        row: which.
        status: ``waiting``, the name of the command at work, ``finished``, ``kept`` (finished before) or ``failed``.
        seconds: spent on it by this call.
        detail: the last line of its log while it runs; the error once it failed.
        log: its log file.
    """

    row: Row
    status: str = "waiting"
    seconds: float = 0.0
    detail: str = ""
    log: Path | None = None

    @property
    def done(self) -> bool:
        """Whether its figures are there."""
        return self.status in ("finished", "kept")


@dataclass(frozen=True)
class RowResult:
    """What a finished row found.

    Attributes:
        row: which.
        metrics: ``overall`` of its evaluation, each with ``value`` and ``n``.
        provenance: of its evaluation: split, feature networks, hashes.
        conventions: how each figure is defined.
        run: what the training cost (``run.json``); empty where the bundle does not write it.
        images: rows of ``per_image.csv``.
        figures: of the metrics of single images that it was evaluated with.
    """

    row: Row
    metrics: Mapping[str, Mapping[str, Any]]
    provenance: Mapping[str, Any]
    conventions: Mapping[str, str]
    run: Mapping[str, Any]
    images: list[dict[str, str]]
    figures: tuple[Figure, ...] = ()

    @property
    def is_discrete(self) -> bool:
        """Whether what was decoded is given by indices."""
        return bool(self.provenance.get("is_discrete", True))

    def value(self, name: str) -> float | None:
        """A figure of the evaluation, the training or the network, else None; no bits of what has no indices."""
        if name.startswith("bits_") and not self.is_discrete:
            return None
        told = {**self.provenance.get("network", {}), **self.run}
        found = self.metrics[name]["value"] if name in self.metrics else told.get(name)
        return None if found is None else float(found)


def read_result(row: Row) -> RowResult:
    """Read the record of a finished row: its figures, and what its training cost."""
    run = read_json(row.trained.folder / "run.json") or {}
    images: list[dict[str, str]] = []
    try:
        record = json.loads((row.evaluation / "metrics.json").read_text(encoding="utf-8"))
        metrics, told = {**record["summary"]["overall"]}, record["provenance"]
        if row.plan.per_image:
            with (row.evaluation / "per_image.csv").open(newline="", encoding="utf-8") as file:
                images = list(csv.DictReader(file))
            if len(images) != int(told.get("n", len(images))):
                raise ValueError(f"{len(images)} of {told['n']} images in per_image.csv")
        else:
            metrics["n"] = {"value": told["n"]}
            run |= read_json(row.folder / "generated" / DRAWING_NAME) or {}
            bits = read_json(row.folder / BITS_NAME) or {}
            run |= {name: bits[name] for name in ("held_out_bits", "likelihood") if name in bits}
            for space in ("feature", "pixel"):
                share = record.get("memorization", {}).get(space, {}).get("share")
                if share is not None:
                    metrics[f"memorized_{space}"] = {"value": share}
        figures = tuple(Figure.of(figure) for figure in record.get("figures", []))
        return RowResult(row, metrics, told, record["conventions"], run, images, figures)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise VaevqMedError(
            f"{row.label}: found a damaged evaluation ({error}); remove {row.evaluation} and run again"
        ) from None


def read_json(path: Path, *names: str) -> dict[str, Any] | None:
    """A JSON object, with objects under the names of :data:`_MAPPINGS`, None where there is no such file.

    Raises:
        VaevqMedError: it is unreadable, or lacks one of ``names``.
    """
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VaevqMedError(f"{path}: found an unreadable file ({error}), expected a record of vaevq-med") from error
    found = isinstance(record, dict) and all(name in record for name in names)
    if not found or not all(isinstance(record.get(name, {}), dict) for name in _MAPPINGS):
        raise VaevqMedError(f"{path}: found no {' and '.join(names)}, expected a record of vaevq-med")
    return record


def read_plan_record(output: Path) -> dict[str, Any]:
    """What an output folder says of itself; empty for a new one."""
    return read_json(output / RECORD, "shared") or {}


def write_plan_record(plan: Plan, parent_run_id: str | None) -> None:
    """Note the study, the shared settings and the MLflow run, so that a later call goes on with them."""
    output = plan.study.output
    record = {"shared": plan.shared(), "parent_run_id": parent_run_id}
    try:
        output.mkdir(parents=True, exist_ok=True)
        atomic_write_text(output / STUDY, plan.study.text())
        atomic_write_text(output / RECORD, json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise VaevqMedError(
            f"{output}: found it not writable ({error.strerror}), expected a folder; choose another output"
        ) from None


def check_settings(plan: Plan) -> None:
    """Refuse an output folder whose rows were made with other settings."""
    record, shared = read_plan_record(plan.study.output), plan.shared()
    if record:
        _check_alike(f"{plan.study.output}: found a comparison", record["shared"], shared, plan.changeable)
    for row in plan.rows():
        stored = _stored(row)
        if stored is not None:
            _check_alike(f"{row.folder}: found a row", stored["settings"], row.settings(), row.redone)


def _check_alike(found: str, old: Mapping[str, Any], new: Mapping[str, Any], changeable: Container[str]) -> None:
    kept = ({key: value for key, value in one.items() if key not in changeable} for one in (old, new))
    difference = first_difference(*kept)
    if difference is not None:
        raise VaevqMedError(f"{found} with {difference}; choose another output")


def _stored(row: Row) -> dict[str, Any] | None:
    return read_json(row.folder / _ROW_RECORD, "hash", "status", "settings")


def is_finished(row: Row) -> bool:
    """Whether the row was trained and evaluated with these settings."""
    stored = _stored(row)
    if stored is None or stored["status"] != "finished" or stored["hash"] != settings_hash(row.settings()):
        return False
    if row.method.decodes and _evaluated(row) != _evaluated(row.trained):
        return False
    return (row.evaluation / "metrics.json").is_file()


def _kept_commands(row: Row, settings: Mapping[str, Any]) -> list[str]:
    """Commands of an unfinished row that ended with these settings in an earlier call, and left their files."""
    stored = _stored(row)
    if stored is None:
        return []
    outputs = row.outputs()
    ended = stored.get("ended", [*outputs] if stored["status"] == "finished" else [])
    changed = {name for key, name in row.redone.items() if stored["settings"].get(key) != settings[key]}
    return [*takewhile(lambda name: name in ended and name not in changed and outputs[name].is_file(), outputs)]


def _evaluated(row: Row) -> str | None:
    """Hash of the checkpoint that a row's figures are of."""
    record = read_json(row.evaluation / "metrics.json") or {}
    return record.get("provenance", {}).get("checkpoint_sha256")


def call(command: list[str], log: Path, on_line: Callable[[str], None]) -> int:
    """Run a command with its output in a file.

    Args:
        command: words.
        log: file that the output is appended to.
        on_line: called about once a second with the last line.

    Returns:
        Its exit code.

    Raises:
        VaevqMedError: there is no such program.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, once the command has written its checkpoint and ended.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore", "COLUMNS": "160"}
    with log.open("ab") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        try:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        except OSError as error:
            raise VaevqMedError(
                f"launch: found no program {command[0]!r} ({error.strerror}), expected one on the PATH"
            ) from error
        try:
            while True:
                try:
                    return process.wait(timeout=1)
                except subprocess.TimeoutExpired:
                    on_line(last_line(log))
        except KeyboardInterrupt:
            process.terminate()
            try:
                process.wait()
            except KeyboardInterrupt:
                process.kill()
                process.wait()
            raise


def _tail(log: Path, start: int = 0) -> list[str]:
    """Non-empty lines of the end of a log, from byte ``start`` at the earliest."""
    with log.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(start, file.tell() - _ERROR_TAIL))
        lines = file.read().decode(errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip()]


def last_line(log: Path) -> str:
    """The last line of a log; empty before the command has said anything."""
    lines = _tail(log)
    return "" if not lines or lines[-1].startswith("$ ") else lines[-1]


def error_line(log: Path, start: int = 0) -> str:
    """What a failed command said: its last ``vaevq-med:`` line, or its last line, without the frame around it.

    Args:
        log: file of its output.
        start: byte at which this attempt begins.
    """
    lines = [line.strip("│┃ ") for line in _tail(log, start) if not line.startswith(("$ ", *_BORDERS))]
    known = [line.removeprefix("vaevq-med:").strip() for line in lines if line.startswith("vaevq-med:")]
    return (known or lines or ["no output"])[-1]


def run_row(state: RowState, parent_run_id: str | None, on_update: Callable[[], None]) -> None:
    """Train and evaluate one row, unless that is done; a failure ends in ``state``, not in an exception.

    A row that another call is at work on, e.g. a task of an array job, counts as failed.

    Args:
        state: the row; updated as it goes.
        parent_run_id: MLflow run to nest it under.
        on_update: called whenever ``state`` has changed.
    """
    row = state.row
    try:
        with OutputFolder(row.folder, STATE, row.plan.study.label, "rows").lock():
            _run_row(state, parent_run_id, on_update)
    except BusyError as error:
        state.status, state.detail = "failed", str(error)
        on_update()


def _run_row(state: RowState, parent_run_id: str | None, on_update: Callable[[], None]) -> None:
    row = state.row
    if is_finished(row):
        state.status = "kept"
        on_update()
        return
    settings = row.settings()
    kept = _kept_commands(row, settings)
    record: dict[str, Any] = {"hash": settings_hash(settings), "status": "started", "settings": settings}
    if row.outputs():
        record["ended"] = kept
    began = time.monotonic()

    def note(**further: str) -> None:
        atomic_write_text(row.folder / _ROW_RECORD, json.dumps({**record, **further}, indent=1) + "\n")

    def show(line: str) -> None:
        state.detail, state.seconds = line, time.monotonic() - began
        on_update()

    def end(status: str, detail: str = "") -> None:
        note(status=status, **({"error": detail} if detail else {}))
        state.status = status
        show(detail)

    note()
    if row.method.decodes and not is_finished(row.trained):
        return end("failed", f"{row.trained.label} is not finished, which this row decodes")
    commands = row.commands(parent_run_id)
    # What comes before a command that has ended, e.g. the encoding, was for that alone.
    skipped = [*commands].index(kept[-1]) + 1 if kept else 0
    for status, command in [*commands.items()][skipped:]:
        state.status, state.log = status, row.folder / f"{status}.log"
        show("")
        start = state.log.stat().st_size if state.log.is_file() else 0
        code = call(command, state.log, show)
        if code != 0:
            return end("failed", f"{status} ended with exit code {code}: {error_line(state.log, start)}")
        if status in row.outputs():
            kept.append(status)
            note()
    end("finished")
