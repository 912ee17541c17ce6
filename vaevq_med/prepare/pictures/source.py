"""``vaevq-med imagenet-prepare``: ImageNet, or a folder of images, to a data set with a datalist."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from vaevq_med.core.errors import DataError
from vaevq_med.core.files import atomic_write_text
from vaevq_med.core.folder import RECIPE, REPORT, OutputFolder
from vaevq_med.core.jobs import Problem, attempt, check_workers, run_jobs
from vaevq_med.images.manifest import SPLITS, split_hash, write_manifest
from vaevq_med.images.splits import split_by_hash
from vaevq_med.prepare.image_recipes import ImageRecipe, load_image_recipe
from vaevq_med.prepare.pictures.batches import Batch
from vaevq_med.prepare.pictures.classes import check_ilsvrc, deal
from vaevq_med.prepare.pictures.find import ImageSearch, find_images
from vaevq_med.prepare.pictures.store import (
    ODDITIES,
    STATE,
    BatchRecord,
    batch_fingerprint,
    read_batch_record,
    write_batch,
)

_VERSIONS = ("vaevq_med", "numpy", "pillow")
_MEASURED = 64
_NAMED = 20


@dataclass(frozen=True)
class ImageReport:
    """What a run did.

    Attributes:
        output: the data set's folder.
        written: images written now.
        reused: images that an earlier run had written.
        skipped: file and what is wrong with it.
        notes: what a user should know besides.
        images: images in each split.
        classes: how many classes there are.
        odd: unusual images by kind, see :data:`vaevq_med.prepare.pictures.store.ODDITIES`.
    """

    output: Path
    written: int
    reused: int
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    images: dict[str, int]
    classes: int
    odd: dict[str, int]


@dataclass(frozen=True)
class ImagePlan:
    """What a run would do.

    Attributes:
        batches: batches of images to read.
        reused: batches that an earlier run has finished.
        skipped: file and what is wrong with it, as far as names tell.
        notes: what a user should know besides.
        classes: how many classes there are.
        images: estimated images to write.
        bytes: estimated size of them.
        linked: whether the images would be links to the input's files, which take no space.
        free_bytes: space that there is.
    """

    batches: int
    reused: int
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    classes: int
    images: int
    bytes: int
    linked: bool
    free_bytes: int


@dataclass(frozen=True)
class ImagenetPrepare:
    """Check every image below a folder or in the ILSVRC2012 archives, and write a data set of them.

    Attributes:
        input: folder of the images or archives.
        output: folder of the data set.
        recipe: what is done to each image.
        workers: processes, or None for one a core.
        classes: keep these only: a number, or a file or list of names.
        val_labels: classes of validation images that lie flat, where they are not found beside them.
        use_classes: whether subfolders of a folder without splits are classes.
        overwrite: replace a data set that another recipe made.
    """

    input: Path
    output: Path
    recipe: ImageRecipe = field(default_factory=lambda: load_image_recipe("imagenet/original"))
    workers: int | None = None
    classes: str | None = None
    val_labels: Path | None = None
    use_classes: bool = True
    overwrite: bool = False

    def plan(self) -> ImagePlan:
        """Find out what :meth:`run` would do, and prepare some images in a temporary folder to see what they take.

        Raises:
            DataError: input, output or an option is not what was expected.
        """
        search = self._search()
        self._check_output()
        todo = [batch for batch in search.batches if not self._finished(batch)]
        total = sum(map(_input_bytes, todo))
        read, images, size = 0, 0, 0
        with tempfile.TemporaryDirectory() as name:
            folder = replace(self._folder, path=Path(name))
            for batch in todo[:: max(1, len(todo) // _MEASURED)]:
                limit = max(1, _MEASURED // len(todo))
                outcome = attempt(write_batch, "batch", batch, self.recipe, folder, limit)
                if not isinstance(outcome, Problem):
                    read += _input_bytes(batch, len(outcome.images) + len(outcome.skipped))
                    images += len(outcome.images)
                    size += sum(outcome.images.values())
        share = total / max(1, read)
        return ImagePlan(
            batches=len(todo),
            reused=len(search.batches) - len(todo),
            skipped=search.problems,
            notes=search.notes,
            classes=len(search.classes),
            images=round(images * share),
            bytes=round(size * share),
            linked=self.recipe.resize is None and not any(batch.is_archive for batch in todo),
            free_bytes=self._folder.free_bytes(),
        )

    def run(
        self,
        *,
        on_start: Callable[[int], None] = lambda total: None,
        on_batch: Callable[[str], None] = lambda batch: None,
        on_skip: Callable[[str, str], None] = lambda file, reason: None,
    ) -> ImageReport:
        """Write the images, then the datalist and the report.

        An image that cannot be read is skipped, the others go on. Interrupted, the next run does the rest.

        Args:
            on_start: called once with the number of batches to read.
            on_batch: called with the name of each batch that is done.
            on_skip: called with the name of each file that is skipped, and the reason.

        Raises:
            DataError: input, output or an option is not what was expected, no image was left, or the disk is full.
            KeyboardInterrupt: interrupted; the batches being read are finished first.
        """
        search = self._search()
        for name, reason in search.problems:
            on_skip(name, reason)
        self._check_output()
        with self._folder.lock():
            self._folder.begin(self.recipe.image_hash)
            todo = {batch.name: batch for batch in search.batches if not self._finished(batch)}
            jobs = {name: (batch, self.recipe, self._folder) for name, batch in todo.items()}
            problems = dict(search.problems)
            running = run_jobs(write_batch, jobs, kind="batch", workers=self.workers, on_start=on_start)
            with contextlib.closing(running) as outcomes:
                for name, outcome in outcomes:
                    skipped = [(name, outcome.reason)] if isinstance(outcome, Problem) else outcome.skipped
                    for file, reason in skipped:
                        problems[file] = reason
                        on_skip(file, reason)
                    on_batch(name)
            done = [batch for batch in search.batches if batch.name not in problems]
            return self._finish(search, done, problems, frozenset(todo))

    @property
    def _folder(self) -> OutputFolder:
        return OutputFolder(self.output, STATE, "imagenet-prepare", "images")

    def _check_output(self) -> None:
        self._folder.check()
        if self._folder.is_of_another(self.recipe.image_hash) and not self.overwrite:
            size = "as they are" if self.recipe.resize is None else f"at {self.recipe.resize} pixels"
            raise DataError(
                f"output {self.output}: found images made by another recipe, expected those of {self.recipe.name} "
                f"{size}; choose another folder, or replace them with --overwrite"
            )

    def _search(self) -> ImageSearch:
        check_workers(self.workers)
        search = find_images(
            self.input,
            self.output,
            val_labels=self.val_labels,
            classes=self.classes,
            use_classes=self.use_classes,
            seed=self.recipe.split.seed,
        )
        given = {batch.split for batch in search.batches}
        if self.recipe.holdout and "training" not in given:
            raise DataError(
                f"holdout: found {self.recipe.holdout} but no training images of their own in {self.input}, expected a "
                "folder or archive 'train'; images without one are dealt by the recipe's split"
            )
        if self.recipe.holdout and {"validation", "test"} <= given:
            raise DataError("holdout: found folders of validation and of test images, expected one of them at most")
        return search

    def _finished(self, batch: Batch) -> bool:
        try:
            mark = batch_fingerprint(batch, self.recipe)
        except DataError:
            return False
        record = read_batch_record(self._folder, batch.name)
        return record is not None and record.fingerprint == mark

    def _record(self, batch: Batch) -> BatchRecord:
        record = read_batch_record(self._folder, batch.name)
        if record is None:
            raise DataError(
                f"batch {batch.name}: found its images changed while this ran, expected nobody else to write there"
            )
        return record

    def _split(self, batch: Batch, path: str, has_validation: bool) -> str:
        # Without the suffix, which a resized copy may change: every copy has the same splits.
        name = PurePosixPath(path).relative_to("images").with_suffix("").as_posix()
        if batch.split is None:
            return split_by_hash([name], self.recipe.split)[name]
        return deal(name, batch.split, self.recipe.holdout, self.recipe.split.seed, has_validation)

    def _finish(
        self, search: ImageSearch, done: Sequence[Batch], problems: dict[str, str], new: frozenset[str]
    ) -> ImageReport:
        """Write datalist, recipe and report from the records."""
        digest = hashlib.sha256(self.recipe.image_hash.encode())
        has_validation = any(batch.split == "validation" for batch in done)
        labels = {name: number for number, name in enumerate(search.classes)}
        entries: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        given = dict.fromkeys(SPLITS, 0)
        odd: dict[str, list[str]] = defaultdict(list)
        written = 0
        classes_of: dict[str, set[str]] = {split: set() for split in SPLITS}
        for batch in done:
            record = self._record(batch)
            digest.update(f"{batch.name} {record.digest}\n".encode())
            problems |= dict(record.skipped)
            written += len(record.images) if batch.name in new else 0
            for kind, paths in record.odd.items():
                odd[kind] += paths
            for path, source in zip(record.images, record.sources, strict=True):
                split = self._split(batch, path, has_validation)
                given[batch.split or split] += 1
                entry: dict[str, Any] = {"image": path}
                class_name = search.class_of(batch, source)
                if class_name is not None:
                    entry["label"] = labels[class_name]
                    classes_of[split].add(class_name)
                entries[split].append(entry)
        total = sum(map(len, entries.values()))
        if total == 0:
            raise DataError(
                f"input {self.input}: found no image that could be read ({len(problems)} skipped), expected some"
            )
        notes = [*search.notes, *self._more_notes(entries, classes_of, given, search.classes, search.batches)]
        report = ImageReport(
            output=self.output,
            written=written,
            reused=total - written,
            skipped=tuple(sorted(problems.items())),
            notes=tuple(notes),
            images={split: len(entries[split]) for split in SPLITS},
            classes=len(search.classes),
            odd={kind: len(odd[kind]) for kind in ODDITIES if odd[kind]},
        )
        content: dict[str, Any] = {
            "name": self.recipe.name,
            "description": self.recipe.description,
            "tensorImageSize": "2D",
            "channels_per_image": 3,
            "labels": {str(number): name for name, number in labels.items()},
            "image_size": self.recipe.resize,
            "recipe": self.recipe.to_dict(),
            "versions": {name: version(name) for name in _VERSIONS},
            "content_hash": f"sha256:{digest.hexdigest()}",
            "split_hash": split_hash(entries),
            **entries,
        }
        with self._folder.writing():
            atomic_write_text(self.output / RECIPE, json.dumps(self.recipe.to_dict(), indent=2) + "\n")
            atomic_write_text(self.output / REPORT, _report_text(report, odd))
            write_manifest(self.output, content)
        return report

    def _more_notes(
        self,
        entries: dict[str, list[dict[str, Any]]],
        classes_of: dict[str, set[str]],
        given: dict[str, int],
        classes: Sequence[str],
        batches: Sequence[Batch],
    ) -> Iterator[str]:
        if self.classes is None and (note := check_ilsvrc(given, classes)) is not None:
            yield note
        strange = classes_of["validation"] - classes_of["training"]
        if strange and classes_of["training"]:
            yield f"{len(strange)} classes of the validation images have no training images ({min(strange)})"
        if entries["validation"] and not entries["test"]:
            yield "the test split is empty: the bundle evaluates on the validation images, as papers do"
        known = {batch.name for batch in batches}
        left = sorted(self._folder.units() - known)
        if left:
            yield f"batches of images that are not part of this data set were left: {len(left)} ({left[0]})"
        empty = [split for split in ("training", "validation") if not entries[split]]
        if empty:
            yield f"no image fell into {' or '.join(empty)}"


def _input_bytes(batch: Batch, first: int | None = None) -> int:
    """Size of a batch's files, of all or of the first ones."""
    if batch.inner is not None:
        return batch.inner[1] if first is None else sum(len(c) for _, c in _take(batch, first) if isinstance(c, bytes))
    if batch.members:
        return sum(size for _, _, size in batch.members[:first])
    return sum((batch.source / name).stat().st_size for name in batch.files[:first])


def _take(batch: Batch, count: int) -> Iterator[tuple[str, Path | bytes]]:
    for item, _ in zip(batch.contents(), range(count), strict=False):
        yield item


def _report_text(report: ImageReport, odd: dict[str, list[str]]) -> str:
    """The report as JSON; nothing of it depends on which run wrote which image."""
    content = {
        "images": report.images,
        "classes": report.classes,
        "unusual": {
            kind: {"about": ODDITIES[kind], "count": count, "examples": sorted(odd[kind])[:_NAMED]}
            for kind, count in report.odd.items()
        },
        "skipped": [{"file": name, "reason": reason} for name, reason in report.skipped],
        "notes": list(report.notes),
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
