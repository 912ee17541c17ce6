"""Raw files to a data set: what a source finds, written unit by unit, and described when all of them are done."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from vaevq_med.core.errors import DataError
from vaevq_med.core.files import atomic_write_text
from vaevq_med.core.folder import RECIPE, REPORT, OutputFolder, difference
from vaevq_med.core.jobs import check_workers, do_jobs
from vaevq_med.images.manifest import write_manifest
from vaevq_med.images.splits import SPLIT_FILE
from vaevq_med.prepare.recipes import AnyRecipe

GROUP = "vaevq_med.sources"


@dataclass(frozen=True)
class Unit:
    """What is read and written in one go; its name is that of its record."""

    name: str


@dataclass(frozen=True)
class Record:
    """What is known of a finished unit: hashes of what it depends on, and of what was written."""

    fingerprint: str
    digest: str

    @property
    def lost(self) -> Sequence[tuple[str, str]]:
        """What of the unit was left out, and why."""
        return ()

    @property
    def amount(self) -> int:
        """What it counts for in a :class:`Report`."""
        return 1


U = TypeVar("U", bound=Unit)
R = TypeVar("R", bound=Record)


@dataclass
class Search(Generic[U]):
    """What a source found: units in the order of the data set, names with what is wrong with them, and remarks."""

    units: list[U] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Estimate:
    """What the units that are left would give, what turned out to be of no use, and what else is known by then."""

    images: int
    bytes: int
    skipped: Sequence[tuple[str, str]] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSet:
    """What the finished units are together.

    Attributes:
        head: fields of ``dataset.json`` that are the source's own.
        entries: of each split; gone through once, after this is made.
        split_hash: of the entries, see :func:`split_hash`.
        size: how many entries there are.
        facts: what ``report.json`` says of them.
        notes: what a user should know besides.
        patients: who stands in which split, where that is known.
    """

    head: Mapping[str, Any]
    entries: Mapping[str, Iterable[Mapping[str, Any]]]
    split_hash: str
    size: int
    facts: Mapping[str, Any]
    notes: Sequence[str] = ()
    patients: Mapping[str, str] = field(default_factory=dict)


class Source(Protocol[U, R]):
    """Where a data set comes from; a dataclass that can be sent to another process.

    The command line makes one of an installed package of ``input`` and ``recipe`` alone; see :func:`published`.

    Attributes:
        recipes: class of its recipes.
        unit: what a unit is called, e.g. ``case``.
        item: what is skipped, in ``report.json``.
        nothing: message where nothing was left, with a place for the number of what was skipped.
        packages: whose versions decide what is written.
        input: what it reads.
        recipe: what is done.
    """

    recipes: ClassVar[type[AnyRecipe]]
    unit: ClassVar[str]
    item: ClassVar[str]
    nothing: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    input: Path
    recipe: AnyRecipe

    def __init__(self, input: Path, recipe: AnyRecipe) -> None: ...

    def folder(self, output: Path) -> OutputFolder:
        """The data set's folder."""

    def find(self, output: Path) -> Search[U]:
        """Find the units; only names are read. The output may lie inside of the input."""

    def fingerprint(self, unit: U) -> str:
        """What a finished unit depends on; a DataError where its files cannot be read."""

    def record(self, unit: U, folder: OutputFolder) -> R | None:
        """The record of a finished unit whose files are all there."""

    def write(self, unit: U, folder: OutputFolder) -> R:
        """Write a unit, with its record; a DataError, where it cannot be used, skips it."""

    def estimate(self, search: Search[U], todo: Sequence[U], folder: OutputFolder) -> Estimate:
        """Write some of the units that are to be done, to see what they take, into a folder that is not kept."""

    def describe(self, search: Search[U], records: Iterator[tuple[U, R]], folder: OutputFolder) -> DataSet:
        """Describe the units that are done."""


def published(name: str) -> type[Source[Any, Any]]:
    """A source that an installed package publishes in the entry-point group ``vaevq_med.sources``.

    Args:
        name: of the entry point.

    Raises:
        DataError: there is none of this name, or it cannot be imported.
    """
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in found:
        known = ", ".join(sorted(found)) or "none is installed"
        raise DataError(f"source: found {name!r}, expected one that a package publishes in {GROUP} ({known})")
    try:
        source: type[Source[Any, Any]] = found[name].load()
    except Exception as error:
        raise DataError(f"source {name}: found {found[name].value}, which fails to import ({error})") from error
    return source


@dataclass(frozen=True)
class Plan:
    """What a run would do: units to write and those that are done, what is skipped, remarks, and what it takes."""

    units: int
    reused: int
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    estimate: Estimate
    free_bytes: int


@dataclass(frozen=True)
class Report:
    """What a run did: cases (or images) written now and before, what was skipped, remarks, and ``report.json``."""

    output: Path
    written: int
    reused: int
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Prepare(Generic[U, R]):
    """Write a data set.

    Attributes:
        source: where it comes from.
        output: folder of it.
        workers: processes, or None for one a core.
        overwrite: replace a data set that another recipe made.
    """

    source: Source[U, R]
    output: Path
    workers: int | None = None
    overwrite: bool = False

    def plan(self, *, on_skip: Callable[[str, str], None] = lambda name, reason: None) -> Plan:
        """Find out what :meth:`run` would do, and write something into a temporary folder to see what it takes.

        Args:
            on_skip: called with the name of what would be skipped, and the reason.

        Raises:
            DataError: input, output or an option is not what was expected.
        """
        search = self._find()
        self._check()
        todo = [unit for unit in search.units if not self._finished(unit)]
        with tempfile.TemporaryDirectory() as place:
            estimate = self.source.estimate(search, todo, replace(self.folder, path=Path(place)))
        skipped = (*search.problems, *estimate.skipped)
        for name, reason in skipped:
            on_skip(name, reason)
        if len(search.units) == len(estimate.skipped):
            raise self._nothing(len(skipped))
        left, reused = len(todo) - len(estimate.skipped), len(search.units) - len(todo)
        return Plan(left, reused, skipped, tuple(search.notes), estimate, self.folder.free_bytes())

    def run(
        self,
        *,
        on_start: Callable[[int], None] = lambda total: None,
        on_unit: Callable[[str], None] = lambda unit: None,
        on_skip: Callable[[str, str], None] = lambda name, reason: None,
    ) -> Report:
        """Write what is not written yet, then the datalist and the report.

        What cannot be read is skipped, the others go on. Interrupted, it leaves finished units only, and the next run
        does the rest.

        Args:
            on_start: called once with the number of units to write.
            on_unit: called with the name of each unit that is done with.
            on_skip: called with the name of what is skipped, and the reason.

        Raises:
            DataError: input, output or an option is not what was expected, nothing was left, or the disk is full.
            KeyboardInterrupt: interrupted; the units at hand are finished first.
        """
        search = self._find()
        for name, reason in search.problems:
            on_skip(name, reason)
        self._check()
        with self.folder.begun(self.source.recipe.image_hash):
            todo = {unit.name: unit for unit in search.units if not self._finished(unit)}
            skipped = do_jobs(
                _write,
                {name: (self.source, unit, self.folder) for name, unit in todo.items()},
                kind=self.source.unit,
                workers=self.workers,
                lost=lambda record: record.lost,
                on_start=on_start,
                on_unit=on_unit,
                on_skip=on_skip,
            )
            return self._finish(search, {**dict(search.problems), **skipped}, frozenset(todo))

    @property
    def folder(self) -> OutputFolder:
        """The data set's folder."""
        return self.source.folder(self.output)

    def _find(self) -> Search[U]:
        check_workers(self.workers)
        return self.source.find(self.output)

    def _check(self) -> None:
        self.folder.check()
        if self.folder.holds_other(self.source.recipe.image_hash) and not self.overwrite:
            raise DataError(
                f"output {self.output}: found {self.folder.kind} made by another recipe{self._otherwise()}, expected "
                f"those of {self.source.recipe.summary()}; choose another folder, or replace them with --overwrite"
            )

    def _otherwise(self) -> str:
        """What the recipe of the data set that is there has otherwise, in brackets; nothing where it is not known."""
        if not (self.output / self.folder.result).is_file():  # and the recipe may be of a run before the last
            return ""
        try:
            before = json.loads((self.output / RECIPE).read_text(encoding="utf-8"))
            found, expected = (
                {name: value for name, value in recipe.items() if name not in ("name", "description", "split")}
                for recipe in (before, self.source.recipe.to_dict())
            )
        except (OSError, ValueError, AttributeError):
            return ""
        words = difference(found, expected)
        return "" if words is None else f" ({words})"

    def _finished(self, unit: U) -> bool:
        try:
            mark = self.source.fingerprint(unit)
        except DataError:
            return False
        record = self.source.record(unit, self.folder)
        return record is not None and record.fingerprint == mark

    def _nothing(self, skipped: int) -> DataError:
        return DataError(f"input {self.source.input}: {self.source.nothing.format(skipped)}")

    def _finish(self, search: Search[U], problems: dict[str, str], new: frozenset[str]) -> Report:
        """Write datalist, recipe and report from the records."""
        source, recipe, folder = self.source, self.source.recipe, self.folder
        done = [unit for unit in search.units if unit.name not in problems]
        digest = hashlib.sha256(recipe.image_hash.encode())
        amounts = {True: 0, False: 0}

        def records() -> Iterator[tuple[U, R]]:
            for unit in done:
                record = known_record(source, unit, folder)
                digest.update(f"{unit.name} {record.digest}\n".encode())
                problems.update(record.lost)
                amounts[unit.name in new] += record.amount
                yield unit, record

        data = source.describe(search, records(), folder)
        if data.size == 0:
            raise self._nothing(len(problems))
        content = {
            "name": recipe.name,
            "description": recipe.description,
            "tensorImageSize": "2D",
            **data.head,
            "recipe": recipe.to_dict(),
            "versions": {name: version(name) for name in source.packages},
            "content_hash": f"sha256:{digest.hexdigest()}",
            "split_hash": data.split_hash,
            **data.entries,
        }
        skipped, notes = tuple(sorted(problems.items())), (*search.notes, *data.notes)
        told = {
            **data.facts,
            "skipped": [{source.item: name, "reason": reason} for name, reason in skipped],
            "notes": notes,
        }
        with folder.writing():
            atomic_write_text(self.output / RECIPE, json.dumps(recipe.to_dict(), indent=2) + "\n")
            atomic_write_text(self.output / REPORT, json.dumps(told, indent=2, ensure_ascii=False) + "\n")
            if data.patients:
                text = json.dumps(data.patients, indent=1, ensure_ascii=False)
                atomic_write_text(self.output / SPLIT_FILE, text + "\n")
            else:
                (self.output / SPLIT_FILE).unlink(missing_ok=True)
            write_manifest(self.output, content)
        return Report(self.output, amounts[True], amounts[False], skipped, notes, data.facts)


def _write(source: Source[U, R], unit: U, folder: OutputFolder) -> R:
    """A job of the pool."""
    return source.write(unit, folder)


def known_record(source: Source[U, R], unit: U, folder: OutputFolder) -> R:
    """The record of a unit that was finished a moment ago.

    Raises:
        DataError: it no longer is.
    """
    record = source.record(unit, folder)
    if record is None:
        raise DataError(
            f"{source.unit} {unit.name}: found its {folder.kind} changed while this ran, expected nobody else to write "
            "there"
        )
    return record
