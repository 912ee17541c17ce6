"""The output folder of a command that can be taken up again: one run at a time, one setting, nothing half written."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vaevq_med.core.errors import DataError
from vaevq_med.core.files import atomic_write_text, is_temporary_of

RECIPE = "recipe.json"
REPORT = "report.json"
SPLIT_FILE = "splits.json"
_MARK = "recipe.sha256"


class BusyError(DataError):
    """Another run is at work in an output folder."""


@dataclass(frozen=True)
class OutputFolder:
    """Where a command writes, so that a run which ends early, however it ends, can be taken up again.

    A hidden folder in it holds the lock, the mark (the hash of the settings that it was begun with), and a record of
    each unit of work that is done.

    Attributes:
        path: the folder.
        state: name of the hidden folder.
        command: the command, for messages.
        kind: what it writes, for messages, e.g. ``slices``.
        result: the file that is written last, and removed before what it describes is replaced.
        copies: whether the result alone makes a folder one of the command's, so that it goes on in a copy without the
            hidden folder.
    """

    path: Path
    state: str
    command: str
    kind: str
    result: str = "dataset.json"
    copies: bool = False

    @property
    def records(self) -> Path:
        """The hidden folder."""
        return self.path / self.state

    def check(self) -> None:
        """Refuse what this command did not begin.

        Raises:
            DataError: it is a file, holds something else, or cannot be read.
        """
        with self.writing():
            if self.path.exists() and not self.path.is_dir():
                raise DataError(f"output {self.path}: found a file, expected a folder or nothing")
            own = self.records.is_dir() or (self.copies and (self.path / self.result).exists())
            if self.path.is_dir() and not own and any(not self._left(entry) for entry in self.path.iterdir()):
                raise DataError(
                    f"output {self.path}: found a folder with other things in it, expected none, an empty one, or one "
                    f"of an earlier {self.command}"
                )

    def _left(self, path: Path) -> bool:
        """Whether it is what a killed writer left of one of the folder's files."""
        return is_temporary_of(path.name, (self.result, RECIPE, REPORT, SPLIT_FILE))

    def is_of_another(self, mark: str) -> bool:
        """Whether it was begun with settings of another hash."""
        file = self.records / _MARK
        with self.writing():
            return file.is_file() and file.read_bytes().strip() != mark.encode()

    def holds_other(self, mark: str) -> bool:
        """Whether something was finished in it with settings of another hash."""
        return bool(self.units() or (self.path / self.result).exists()) and self.is_of_another(mark)

    @contextlib.contextmanager
    def begun(self, mark: str) -> Iterator[None]:
        """One run at a time, on settings of a hash; where nothing was finished, nothing is left of it.

        Args:
            mark: the hash.

        Raises:
            BusyError: another run is at work in it.
            DataError: it cannot be written.
        """
        is_new = not self.path.exists()
        with self.lock():
            self.begin(mark)
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    if not self.units() and [*self.path.iterdir()] == [self.records]:
                        shutil.rmtree(self.records)
                        if is_new:
                            self.path.rmdir()

    def begin(self, mark: str | None = None) -> None:
        """Remove what a killed run left, and note the settings before anything is made with them.

        Args:
            mark: hash of the settings, where the folder keeps one.
        """
        with self.writing():
            for partial in self.records.glob("*.partial"):
                shutil.rmtree(partial, ignore_errors=True)
            left = [*self.records.glob(".*.*.*"), *filter(self._left, self.path.glob(".*.*.*"))]
            for file in left:
                file.unlink()
            if mark is not None:
                if self.is_of_another(mark):
                    (self.path / self.result).unlink(missing_ok=True)
                atomic_write_text(self.records / _MARK, mark + "\n")

    def refuse_other(self, found: Mapping[str, Any], expected: Mapping[str, Any], what: str, replace: str) -> None:
        """Refuse a folder that was begun with other settings.

        Args:
            found: its settings.
            expected: those of this run.
            what: was found, e.g. ``a token store``.
            replace: how to choose another folder, or replace what is there.

        Raises:
            DataError: naming the first setting that differs.
        """
        words = difference(found, expected)
        if words is not None:
            raise DataError(f"output {self.path}: found {what} of {words}; {replace}")

    def refuse_record(self, expected: Mapping[str, Any], what: str) -> None:
        """Refuse to replace the result, a record of tokenizers, of other settings, or one that cannot be read.

        Args:
            expected: settings of this run; ``tokenizers`` has the hash of each by its name.
            what: was found, e.g. ``probes``.

        Raises:
            DataError: naming the first setting that differs.
        """
        path = self.path / self.result
        if not path.exists():
            return
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            found = {name: record[name] for name in expected if name in record}
            found["tokenizers"] = {row["name"]: row["checkpoint"] for row in record["tokenizers"]}
        except (OSError, ValueError, KeyError, TypeError):
            found = {}
        self.refuse_other(found, expected, what, "choose another folder, or remove this one")

    def record(self, unit: str) -> dict[str, Any] | None:
        """What was noted of a finished unit; None where it is not finished, or the record is damaged."""
        try:
            found = json.loads((self.records / f"{unit}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def units(self) -> set[str]:
        """Names of the units that have a record."""
        return {file.stem for file in self.records.glob("*.json")}

    @contextlib.contextmanager
    def unit(self, name: str) -> Iterator[Path]:
        """An empty folder to make a unit in, which is gone afterwards; see :meth:`commit`."""
        partial = self.records / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def commit(self, name: str, record: Mapping[str, Any], places: Mapping[str, str]) -> None:
        """Put what was made of a unit in place, and then note that it is done.

        Args:
            name: of the unit.
            record: what to note.
            places: for each file or folder of :meth:`unit`, where it belongs in the output; one that was not made is
                removed from there.
        """
        note, partial = self.records / f"{name}.json", self.records / f"{name}.partial"
        pairs = [(partial / made, self.path / place) for made, place in places.items()]
        for place in (place for made, place in pairs if not made.exists()):
            if place.is_dir():
                shutil.rmtree(place)
            place.unlink(missing_ok=True)
        note.unlink(missing_ok=True)
        for made, place in ((made, place) for made, place in pairs if made.exists()):
            if place.is_dir():
                shutil.rmtree(place)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(made, place)
        atomic_write_text(note, json.dumps(record, ensure_ascii=False) + "\n")

    def free_bytes(self) -> int:
        """Space on its disk."""
        path = self.path.resolve()
        return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Say in one line that it cannot be written."""
        try:
            yield
        except OSError as error:
            raise DataError(
                f"output {self.path}: found it not writable ({error.strerror or error}), expected a folder with room "
                "to write"
            ) from None

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One run at a time, where the platform has file locks.

        The lock is of the open file, which forked workers share: those of a run that was killed keep the next one out
        until they have ended too. A lock that a child lets go of, as that of filelock is, would not.

        Raises:
            BusyError: another run is at work in it.
            DataError: it cannot be written.
        """
        with self.writing():
            self.records.mkdir(parents=True, exist_ok=True)
            file = (self.records / "lock").open("w")
        with file:
            try:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BusyError(
                    f"output {self.path}: found another {self.command} at work in it, expected none"
                ) from None
            except (ImportError, OSError):
                pass
            yield


def difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """The first setting in which two descriptions differ, in words, or None.

    Args:
        found: nested dictionaries of plain values.
        expected: the same.

    Examples:
        >>> difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}})
        'a.c 2, expected 3'
    """
    before, after = dict(_leaves(found)), dict(_leaves(expected))
    for name in (*after, *before):
        if before.get(name) != after.get(name):
            return f"{name} {_short(before.get(name, 'unset'))}, expected {_short(after.get(name, 'unset'))}"
    return None


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else str(key))
    elif name:
        yield name, value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
