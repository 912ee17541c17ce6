"""What every study of coded volumes does: a record a row, setting and item; what is there is not made again."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.files import atomic_write_text
from vaevq_med.core.folder import BusyError, OutputFolder
from vaevq_med.networks.features import FeatureNetwork, feature_network
from vaevq_med.prepare.volumes.case import Case
from vaevq_med.study.rates.candidates import Candidate
from vaevq_med.study.rates.file import VolumeStudy
from vaevq_med.study.rates.rows import candidates

Point = tuple[Candidate, float]
"""A row and a setting."""
Record = Mapping[str, Any]
Measure = Callable[[Candidate, float], tuple[Record, str]]


class Item(Protocol):
    """What is measured at once."""

    @property
    def name(self) -> str:
        """Of its folder of records."""

    @property
    def case(self) -> Case:
        """The examination."""

    def mark(self) -> str:
        """Hash of all that its content depends on."""


I = TypeVar("I", bound=Item)  # noqa: E741


def refuse_seen(name: str, seen: tuple[str, str] | None) -> None:
    """Refuse a network that was trained on a patient of the study.

    Args:
        name: what it is called in the study's file.
        seen: the patient, and the file of the training; None where there is none.

    Raises:
        VaevqMedError: naming both.
    """
    if seen is not None:
        raise VaevqMedError(
            f"{name}: found patient {seen[0]}, whom {seen[1]} was trained on, expected none; name other patients in "
            "split_file, or say split: training to code them all the same"
        )


@dataclass(frozen=True)
class RecordsReport:
    """What a study ends with.

    Attributes:
        output: folder of everything that was written.
        expected: records that the study has.
        missing: of them, those that are not there.
        problems: item, row and setting, and what went wrong there.
        busy: items that another call was at work on.
        files: tables, figures and the record; empty without any record.
        table: as Markdown; empty without any record.
    """

    output: Path
    expected: int
    missing: int
    problems: tuple[tuple[str, str], ...]
    busy: tuple[str, ...]
    files: tuple[Path, ...] = ()
    table: str = ""


@dataclass(frozen=True)
class RunRecords(ABC, Generic[I]):
    """All rows and settings of a study on all of its items.

    Two calls side by side share the work: each takes groups of items that the other is not at.

    Args:
        study: as its file says.
        on_record: called with a line whenever a record was made.
    """

    study: VolumeStudy
    on_record: Callable[[str], None] = field(default=lambda line: None)

    command: ClassVar[str]
    """What messages call it."""
    format: ClassVar[int] = 1
    """Part of a record's key; a change of what the same study measures raises it."""

    @property
    @abstractmethod
    def items(self) -> Sequence[I]:
        """What is measured."""

    def groups(self) -> Iterator[Sequence[I]]:
        """Items that are taken together, setting by setting: each by itself."""
        return ([item] for item in self.items)

    @abstractmethod
    def opened(self, item: I) -> AbstractContextManager[Measure]:
        """Read an item, and give what makes a record of a row and a setting: what to note, and a few words on it.

        Raises:
            VaevqMedError: the item cannot be read; likewise of what is given, where a row cannot code it.
        """

    @abstractmethod
    def write_report(self, records: Sequence[Record]) -> tuple[Sequence[Path], str]:
        """Write tables and figures over the records that are there.

        Returns:
            The files, and the table as Markdown.
        """

    def depends_on(self) -> Mapping[str, Any]:
        """What a record depends on besides row, setting and item, as plain values."""
        asked = self.study.perceptual
        sees = None
        if asked is not None and self.network is not None:
            sees = {"network": asked.network, "weights": self.network.weights_sha256, "slices": asked.slices}
        return {"background": self.study.background, "slices": self.study.slices, "perceptual": sees}

    def find_rows(self) -> list[Candidate]:
        """What the study's file names, checked."""
        rows = candidates(self.study)
        if not rows:
            raise VaevqMedError("codecs and tokenizers are empty; expected at least one")
        return rows

    @cached_property
    def _conditions(self) -> Mapping[str, Any]:
        return self.depends_on()

    @cached_property
    def rows(self) -> list[Candidate]:
        """What is compared.

        Raises:
            VaevqMedError: one of them was trained on a patient of the study.
        """
        rows = self.find_rows()
        if self.study.split != "training":
            patients = {item.case.patient for item in self.items}
            for row in rows:
                refuse_seen(row.name, row.first_seen(patients))
        return rows

    @cached_property
    def network(self) -> FeatureNetwork | None:
        """Of the perceptual distance."""
        asked = self.study.perceptual
        return None if asked is None else feature_network(asked.network, asked.weights)

    def folder(self, item: I) -> OutputFolder:
        """The records of an item."""
        return OutputFolder(self.study.output, f"records/{item.name}", self.command, "records")

    def key(self, row: Candidate, setting: float, item: I) -> dict[str, Any]:
        """All that a record depends on."""
        own = {"format": self.format, "made_of": dict(row.made_of()), "setting": setting, "source": item.mark()}
        return {**own, **self._conditions}

    def work(self, item: I) -> Iterator[Point]:
        """Rows and settings of an item whose records are not there."""
        folder = self.folder(item)
        for row, setting in self.points():
            key, found = self.key(row, setting, item), folder.record(unit_name(row, setting))
            if found is None or found.get("key") != key:
                yield row, setting

    def points(self) -> list[Point]:
        """All rows with their settings."""
        points = []
        for row in self.rows:
            lossless = [row.lossless] if self.study.lossless and row.lossless is not None else []
            points += [(row, setting) for setting in dict.fromkeys([*row.settings, *lossless])]
        return points

    def dry_run(self) -> list[str]:
        """A line an item: how many records are there, of how many."""
        total = len(self.points())
        return [f"{item.name}: {total - len([*self.work(item)])} of {total} records" for item in self.items]

    def run(self) -> RecordsReport:
        """Make what is not there, then write tables and figures over what is.

        Raises:
            VaevqMedError: a field that cannot be.
            KeyboardInterrupt: on Ctrl-C or SIGTERM; the same call goes on.
        """
        os.environ.setdefault("SVT_LOG", "1")  # errors alone
        with _one_thread():
            problems, busy = self._make()
        records = self.records()
        expected = len(self.points()) * len(self.items)
        report = RecordsReport(self.study.output, expected, expected - len(records), tuple(problems), tuple(busy))
        if not records:
            return report
        files, table = self.write_report(records)
        return replace(report, files=tuple(files), table=table)

    def _make(self) -> tuple[list[tuple[str, str]], list[str]]:
        problems: list[tuple[str, str]] = []
        busy = []
        for group in self.groups():
            with ExitStack() as stack:
                own = []
                for item in group:
                    if next(self.work(item), None) is None:
                        continue
                    try:
                        stack.enter_context(self.folder(item).lock())
                    except BusyError:
                        busy.append(item.name)
                    else:
                        own.append(item)
                problems += self._measure(own, stack)
        return problems, busy

    def _measure(self, group: Sequence[I], stack: ExitStack) -> list[tuple[str, str]]:
        problems: list[tuple[str, str]] = []
        measures: list[tuple[I, dict[str, dict[str, Any]], Measure]] = []
        for item in group:
            todo = {unit_name(row, setting): self.key(row, setting, item) for row, setting in self.work(item)}
            if not todo:  # another call has made them meanwhile
                continue
            try:
                measures.append((item, todo, stack.enter_context(self.opened(item))))
            except VaevqMedError as error:
                problems.append((item.name, str(error)))
        for row, setting in self.points():
            unit = unit_name(row, setting)
            for item, todo, measure in measures:
                if unit not in todo:
                    continue
                try:
                    record, words = measure(row, setting)
                except VaevqMedError as error:
                    problems.append((f"{item.name} {unit}", str(error)))
                else:
                    whole = {"key": todo[unit], "row": row.name, "setting": setting, **record}
                    self._note(self.folder(item), unit, whole)
                    self.on_record(f"{item.name} {unit}: {words}")
        return problems

    @staticmethod
    def _note(folder: OutputFolder, unit: str, record: Record) -> None:
        with folder.writing():
            atomic_write_text(folder.records / f"{unit}.json", json.dumps(record, ensure_ascii=False) + "\n")

    def records(self) -> list[Record]:
        """Those that are there, of this study's rows, settings and items."""
        found: list[Record] = []
        for item in self.items:
            folder = self.folder(item)
            for row, setting in self.points():
                record = folder.record(unit_name(row, setting))
                if record is not None and record.get("key") == self.key(row, setting, item):
                    found.append(record)
        return found


def unit_name(row: Candidate, setting: float) -> str:
    """Name of a record; settings that differ have names that differ, and 32.0 has that of 32."""
    return f"{row.name}@{repr(float(setting)).removesuffix('.0')}"


@contextmanager
def _one_thread() -> Iterator[None]:
    """As for the codecs, so for the network."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
