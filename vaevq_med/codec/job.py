"""Many cases, a file or a folder of each: in parallel, resumed after an interruption, nothing half written."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vaevq_med.core.errors import DataError, VaevqMedError
from vaevq_med.core.files import atomic_write_bytes, atomic_write_text
from vaevq_med.core.folder import REPORT, OutputFolder
from vaevq_med.core.jobs import do_jobs, usable_cores


@dataclass(frozen=True)
class Made:
    """What was made of a unit.

    Attributes:
        files: contents by the names of the files.
        figures: plain values for a report.
        notes: names of files, and what a user should know of them.
    """

    files: Mapping[str, bytes]
    figures: Mapping[str, Any]
    notes: Sequence[Sequence[str]] = ()


class Work(ABC):
    """What is done to each unit; can be sent to another process.

    Attributes:
        command: of the command line.
        kind: what a unit is called, e.g. ``case``.
        writes: what is written, e.g. ``compressed cases``.
    """

    command: ClassVar[str]
    kind: ClassVar[str] = "case"
    writes: ClassVar[str]

    @property
    @abstractmethod
    def mark(self) -> str:
        """Hash of the settings; files of others are not mixed."""

    @abstractmethod
    def units(self) -> Sequence[str]:
        """Names of the units, in order."""

    @abstractmethod
    def fingerprint(self, unit: str) -> str:
        """What a finished unit depends on; a DataError where its files cannot be read."""

    @abstractmethod
    def make(self, unit: str, threads: int) -> Made:
        """Do it; a VaevqMedError where it cannot be done."""

    @abstractmethod
    def place(self, unit: str, file: str) -> str:
        """Where a file of a unit belongs in the output folder."""

    def copied(self, unit: str) -> Mapping[str, Path]:
        """Files that stand unchanged beside what is made of a unit, by the names that they get there.

        They are no part of a unit's record, so that folders which were begun without them go on.
        """
        return {}

    @property
    def problems(self) -> Sequence[tuple[str, str]]:
        """Names of what cannot be done, and why."""
        return ()

    @property
    def notes(self) -> Sequence[str]:
        """Remarks on what is done."""
        return ()

    @property
    def device_type(self) -> str:
        """Where the network runs; elsewhere than on a CPU one process does all."""
        return "cpu"


@dataclass(frozen=True)
class Report:
    """What a run did.

    Attributes:
        output: file or folder.
        written: units that were done now.
        reused: those that had been done before.
        skipped: names, and why.
        notes: remarks.
        figures: by unit.
    """

    output: Path
    written: int
    reused: int
    skipped: Sequence[tuple[str, str]]
    notes: Sequence[str]
    figures: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Job:
    """Do a work into a folder, or, of one unit, into a file.

    Attributes:
        work: what is done.
        output: where to.
        workers: cores to use, or None for all.
        overwrite: replace what is there.
        single: whether ``output`` is a file.
    """

    work: Work
    output: Path
    workers: int | None = None
    overwrite: bool = False
    single: bool = False

    def run(
        self,
        *,
        on_start: Callable[[int], None] = lambda total: None,
        on_unit: Callable[[str], None] = lambda unit: None,
        on_skip: Callable[[str, str], None] = lambda name, reason: None,
    ) -> Report:
        """Do what is not done yet.

        What cannot be done is skipped, the others go on. Interrupted, it leaves finished units only, and the next run
        does the rest.

        Args:
            on_start: called once with the number of units to do.
            on_unit: called with the name of each unit that is done with.
            on_skip: called with the name of what is skipped, and the reason.

        Raises:
            VaevqMedError: nothing could be done, or a unit of which there is one alone.
            KeyboardInterrupt: interrupted; the units at hand are finished first.
        """
        if self.single:
            return self._run_single(on_start, on_unit)
        problems, units = dict(self.work.problems), self.work.units()
        alone = len(problems) + len(units) == 1  # what is wrong with it is told once, as the error
        for name, reason in () if alone else problems.items():
            on_skip(name, reason)
        folder = self._folder
        folder.check()
        if folder.holds_other(self.work.mark) and not self.overwrite:
            raise DataError(
                f"output {self.output}: found {folder.kind} made with other settings, expected those of this command; "
                "choose another folder, or replace them with --overwrite"
            )
        with folder.begun(self.work.mark):
            todo = [unit for unit in units if not self._finished(unit)]
            for name, reason in self._complete([unit for unit in units if unit not in todo]):
                problems[name] = reason
                if not alone:
                    on_skip(name, reason)
            processes, threads = self._share(len(todo))
            skipped = do_jobs(
                _write,
                {unit: (self.work, unit, folder, threads, self.overwrite) for unit in todo},
                kind=self.work.kind,
                workers=processes,
                on_start=on_start,
                on_unit=on_unit,
                on_skip=(lambda name, reason: None) if alone else on_skip,
            )
            return self._finish(units, {**problems, **skipped}, frozenset(todo))

    @property
    def _folder(self) -> OutputFolder:
        work = self.work
        return OutputFolder(self.output, f".{work.command}", work.command, work.writes, REPORT)

    def _share(self, jobs: int) -> tuple[int, int]:
        """Processes, and threads of each."""
        if self.work.device_type != "cpu":
            return 1, 1
        cores = self.workers or usable_cores()
        processes = max(1, min(cores, jobs))
        return processes, max(1, cores // processes)

    def _finished(self, unit: str) -> bool:
        record = self._folder.record(unit)
        try:
            mark = self.work.fingerprint(unit)
            return (
                record is not None
                and record["fingerprint"] == mark
                and all((self.output / name).stat().st_size == size for name, size in record["files"].items())
                and _digest((self.output / name).read_bytes() for name in record["files"]) == record["digest"]
            )
        except (DataError, OSError, KeyError, TypeError, AttributeError):
            return False

    def _complete(self, units: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Copy what is copied for finished units and is not there yet; those for which that cannot be, and why."""
        for unit in units:
            try:
                contents = {self.work.place(unit, file): own for file, own in _read_copied(self.work, unit).items()}
                with self._folder.writing():
                    for place, content in contents.items():
                        target = self.output / place
                        if target.is_file() and target.read_bytes() == content:
                            continue
                        if target.exists() and not self.overwrite:
                            raise DataError(_other(place))
                        atomic_write_bytes(target, content)
            except DataError as error:
                yield unit, str(error)

    def _finish(self, units: Sequence[str], problems: Mapping[str, str], new: frozenset[str]) -> Report:
        done = [unit for unit in units if unit not in problems]
        if not done:
            if len(problems) == 1:
                ((name, reason),) = problems.items()
                raise DataError(f"{self.work.kind} {name}: {reason}")
            raise DataError(f"found no {self.work.kind} that could be done, expected one ({len(problems)} skipped)")
        records = {unit: self._folder.record(unit) or {} for unit in done}
        skipped = tuple(sorted(problems.items()))
        self._tell({**self._before(units), **records}, skipped)
        notes = [*self.work.notes, *_notes_of(records)]
        figures = {unit: record["figures"] for unit, record in records.items()}
        written = sum(unit in new for unit in done)
        return Report(self.output, written, len(done) - written, skipped, notes, figures)

    def _before(self, units: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Records of what earlier commands made with the same settings of other units, and is still there."""
        found = {unit: self._folder.record(unit) or {} for unit in sorted(self._folder.units().difference(units))}
        return {
            unit: record
            for unit, record in found.items()
            if record.get("mark") == self.work.mark and all((self.output / name).is_file() for name in record["files"])
        }

    def _tell(self, records: Mapping[str, Mapping[str, Any]], skipped: Sequence[tuple[str, str]]) -> None:
        """Write the report of all that is in the folder, and of what this command or one before skipped."""
        kind = self.work.kind
        try:
            before = json.loads((self.output / REPORT).read_text(encoding="utf-8"))
            left = {str(one[kind]): str(one["reason"]) for one in before["skipped"]}
        except (OSError, ValueError, KeyError, TypeError):
            left = {}
        known = {*records, *self.work.units()}
        left = {name: reason for name, reason in left.items() if name not in known}
        told = {
            "command": self.work.command,
            "units": {unit: records[unit]["figures"] for unit in sorted(records)},
            "skipped": [{kind: name, "reason": reason} for name, reason in sorted({**left, **dict(skipped)}.items())],
            "notes": [*self.work.notes, *_notes_of(records)],
        }
        with self._folder.writing():
            atomic_write_text(self.output / REPORT, json.dumps(told, indent=1, ensure_ascii=False) + "\n")

    def _run_single(self, on_start: Callable[[int], None], on_unit: Callable[[str], None]) -> Report:
        units = self.work.units()
        problems = self.work.problems
        if len(units) != 1 or problems:
            reason = problems[0][1] if problems else f"found {len(units)} {self.work.kind}s"
            raise DataError(f"output {self.output}: {reason}, expected one {self.work.kind} for a file; name a folder")
        if self.output.is_dir():
            raise DataError(f"output {self.output}: found a folder, expected a file or nothing")
        on_start(1)
        cores = self.workers or usable_cores()
        made = self.work.make(units[0], cores if self.work.device_type == "cpu" else 1)
        reused = self._write_single(made)
        on_unit(units[0])
        notes = [*self.work.notes, *_notes_of({units[0]: {"notes": made.notes}})]
        return Report(self.output, int(not reused), int(reused), (), notes, {units[0]: made.figures})

    def _write_single(self, made: Made) -> bool:
        """Write the files of the only unit, the first as the output, others beside it; whether all were there."""
        targets = {self.output: next(iter(made.files.values()))}
        for name, content in [*made.files.items()][1:]:  # a picture
            targets[self.output.with_suffix(Path(name).suffix)] = content
        for path in targets:
            if path.exists() and not path.is_file():
                raise DataError(f"output {path}: found no regular file, expected one or nothing")
        present = {path: path.read_bytes() for path in targets if path.exists()}
        if present == targets:
            return True
        for path, content in present.items():
            if content != targets[path] and not self.overwrite:
                raise DataError(f"output {path}: found another file, expected none; --overwrite replaces it")
        self.output.parent.mkdir(parents=True, exist_ok=True)
        for path, content in targets.items():
            atomic_write_bytes(path, content)
        return False


def _digest(contents: Iterable[bytes]) -> str:
    """SHA-256 of files, one after the other."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return digest.hexdigest()


def _read_copied(work: Work, unit: str) -> dict[str, bytes]:
    """Contents of what is copied, by the names that it gets.

    Raises:
        DataError: a file cannot be read.
    """
    found = {}
    for file, path in work.copied(unit).items():
        try:
            found[file] = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path.name}: found no readable file ({error.strerror}), expected one to copy") from None
    return found


def _other(place: str) -> str:
    """That a file is not replaced."""
    return f"output {place}: found another file of this name; --overwrite replaces it"


def _write(work: Work, unit: str, folder: OutputFolder, threads: int, overwrite: bool) -> None:
    """A job of the pool."""
    try:
        mark = work.fingerprint(unit)
        copied = _read_copied(work, unit)
        made = work.make(unit, threads)
    except DataError:
        raise
    except VaevqMedError as error:  # of this unit alone
        raise DataError(str(error)) from None
    contents = {**made.files, **copied}
    places = {file: work.place(unit, file) for file in contents}
    for file, content in contents.items():
        target = folder.path / places[file]
        if not overwrite and target.is_file() and target.read_bytes() != content:
            raise DataError(_other(places[file]))
    with folder.unit(unit) as partial:
        for file, content in contents.items():
            (partial / file).write_bytes(content)
        record = {
            "fingerprint": mark,
            "mark": work.mark,
            "files": {places[file]: len(content) for file, content in made.files.items()},
            "digest": _digest(made.files.values()),
            "figures": dict(made.figures),
            "notes": [list(note) for note in made.notes],
        }
        folder.commit(unit, record, places)


def _notes_of(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Notes on files of some units, those that say the same as one."""
    files: dict[str, list[str]] = {}
    for name, text in (note for record in records.values() for note in record["notes"]):
        files.setdefault(text, []).append(name)
    return [f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {text}" for text, names in files.items()]
