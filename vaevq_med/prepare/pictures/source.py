"""``vaevq-med imagenet-prepare``: ImageNet, or a folder of images, to a data set with a datalist."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from vaevq_med.core.errors import DataError
from vaevq_med.core.folder import OutputFolder
from vaevq_med.core.jobs import Problem, attempt
from vaevq_med.images.manifest import SPLITS, split_hash
from vaevq_med.images.patients import one_name_each
from vaevq_med.images.reading import Reading
from vaevq_med.images.splits import count_patients, remembered_splits, split_by_hash, split_by_rule
from vaevq_med.prepare.job import DataSet, Estimate, Search, Source
from vaevq_med.prepare.pictures.batches import Batch
from vaevq_med.prepare.pictures.classes import check_ilsvrc, deal
from vaevq_med.prepare.pictures.find import ImageSearch, find_images
from vaevq_med.prepare.pictures.patients import by_pattern, by_table
from vaevq_med.prepare.pictures.store import ODDITIES, BatchRecord, batch_fingerprint, read_batch_record, write_batch
from vaevq_med.prepare.recipes import AnyRecipe, ImageRecipe

_MEASURED = 64
_NAMED = 20


@dataclass(frozen=True)
class PictureSource(Source[Batch, BatchRecord]):
    """Every image below a folder or in the ILSVRC2012 archives, checked.

    Attributes:
        input: folder of the images or archives.
        recipe: what is done to each image.
        classes: keep these only: a number, or a file or list of names.
        val_labels: classes of validation images that lie flat, where they are not found beside them.
        use_classes: whether subfolders of a folder without splits are classes.
        patients: CSV of whom the images show, in place of the recipe's pattern.
    """

    recipes: ClassVar[type[AnyRecipe]] = ImageRecipe
    unit: ClassVar[str] = "batch"
    item: ClassVar[str] = "file"
    nothing: ClassVar[str] = "found no image that could be read ({} skipped), expected some"
    packages: ClassVar[tuple[str, ...]] = ("vaevq_med", "numpy", "pillow")

    input: Path
    recipe: ImageRecipe = field(default_factory=lambda: ImageRecipe.load("imagenet/original"))
    classes: str | None = None
    val_labels: Path | None = None
    use_classes: bool = True
    patients: Path | None = None

    def folder(self, output: Path) -> OutputFolder:
        """Where images are written."""
        return OutputFolder(output, ".images", "imagenet-prepare", "images")

    def find(self, output: Path) -> ImageSearch:
        """See :func:`find_images`."""
        search = find_images(
            self.input,
            output,
            val_labels=self.val_labels,
            classes=self.classes,
            use_classes=self.use_classes,
            seed=self.recipe.split.seed,
        )
        given = {batch.split for batch in search.units}
        if self.recipe.holdout and "training" not in given:
            raise DataError(
                f"holdout: found {self.recipe.holdout} but no training images of their own in {self.input}, expected a "
                "folder or archive 'train'; images without one are dealt by the recipe's split"
            )
        if self.recipe.holdout and {"validation", "test"} <= given:
            raise DataError("holdout: found folders of validation and of test images, expected one of them at most")
        self._name_patients(search)
        return search

    def _name_patients(self, search: ImageSearch) -> None:
        """Note whom the images show, as the table or the recipe says it."""
        if self.patients is None and self.recipe.patient is None:
            search.notes.append("no patients are named: images are taken as independent")
            return
        splits = {batch.path_of(name): batch.split for batch in search.units for name in batch.names()}
        if self.patients is not None:
            search.people = by_table(splits, self.patients, self.input if self.classes is None else None)
        else:
            search.people = by_pattern(splits, self.recipe.patient or "")
        one = one_name_each(patient for patient, _ in search.people.values())
        search.people = {name: (one[patient], case) for name, (patient, case) in search.people.items()}
        places: dict[str, str | None] = {}
        for name, (patient, _) in search.people.items():
            if places.setdefault(patient, splits[name]) != splits[name]:
                raise DataError(
                    f"input {self.input}: found patient {patient} in the folders of {places[patient]} and "
                    f"{splits[name]}, expected one of them"
                )

    def fingerprint(self, unit: Batch) -> str:
        """See :func:`batch_fingerprint`."""
        return batch_fingerprint(unit, self.recipe)

    def record(self, unit: Batch, folder: OutputFolder) -> BatchRecord | None:
        """See :func:`read_batch_record`."""
        return read_batch_record(folder, unit.name)

    def write(self, unit: Batch, folder: OutputFolder) -> BatchRecord:
        """See :func:`write_batch`."""
        return write_batch(unit, self.recipe, folder)

    def estimate(self, search: Search[Batch], todo: Sequence[Batch], folder: OutputFolder) -> Estimate:
        """Write some images of some batches; what is left takes as much for the size of its files."""
        assert isinstance(search, ImageSearch)
        read, images, size = 0, 0, 0
        skipped: list[tuple[str, str]] = []
        for batch in todo[:: max(1, len(todo) // _MEASURED)]:
            outcome = attempt(write_batch, "batch", batch, self.recipe, folder, max(1, _MEASURED // len(todo)))
            if isinstance(outcome, Problem):
                skipped.append((batch.name, outcome.reason))
            else:
                skipped += outcome.skipped
                read += _input_bytes(batch, len(outcome.images) + len(outcome.skipped))
                images += len(outcome.images)
                size += sum(outcome.images.values())
        share = sum(map(_input_bytes, todo)) / max(1, read)
        linked = self.recipe.resize is None and not any(batch.is_archive for batch in todo)
        facts = {"classes": len(search.classes), "linked": linked}
        return Estimate(round(images * share), round(size * share), skipped, facts)

    def _split(self, batch: Batch, name: str, dealt: Mapping[str, str], has_validation: bool) -> str:
        """The split of a patient, or of an image where none are known."""
        if batch.split is None:
            return dealt[name] if dealt else split_by_hash([name], self.recipe.split)[name]
        return deal(name, batch.split, self.recipe.holdout, self.recipe.split.seed, has_validation)

    def describe(
        self, search: Search[Batch], records: Iterator[tuple[Batch, BatchRecord]], folder: OutputFolder
    ) -> DataSet:
        """Images by split, with the numbers of their classes."""
        assert isinstance(search, ImageSearch)
        has_validation = any(batch.split == "validation" for batch in search.units)
        labels = {name: number for number, name in enumerate(search.classes)}
        entries: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        given = dict.fromkeys(SPLITS, 0)
        odd: dict[str, list[str]] = defaultdict(list)
        classes_of: dict[str, set[str]] = {split: set() for split in SPLITS}
        rule, patients = self.recipe.split, {patient for patient, _ in search.people.values()}
        dealt = split_by_rule(patients, rule, remembered_splits(folder.path, rule))
        for batch, record in records:
            for kind, paths in record.odd.items():
                odd[kind] += paths
            for path, source in zip(record.images, record.sources, strict=True):
                entry: dict[str, Any] = {"image": path}
                # Without the suffix, which a resized copy may change: every copy has the same splits.
                name = PurePosixPath(path).relative_to("images").with_suffix("").as_posix()
                if search.people:
                    name, entry["case"] = search.people[batch.path_of(source)]
                    entry["patient"] = name
                split = self._split(batch, name, dealt, has_validation)
                given[batch.split or split] += 1
                class_name = search.class_of(batch, source)
                if class_name is not None:
                    entry["label"] = labels[class_name]
                    classes_of[split].add(class_name)
                entries[split].append(entry)
        standing = {e["patient"]: split for split in SPLITS for e in entries[split] if "patient" in e}
        left = sorted(folder.units() - {batch.name for batch in search.units})
        return DataSet(
            head={
                "channels_per_image": 3,
                "reading": Reading(shape="center_crop", channels=3).to_dict(),
                "labels": {str(number): name for name, number in labels.items()},
                "image_size": self.recipe.resize,
            },
            entries=entries,
            split_hash=split_hash(entries),
            size=sum(map(len, entries.values())),
            facts={
                "images": {split: len(entries[split]) for split in SPLITS},
                "patients": count_patients(standing) if standing else {},
                "classes": len(search.classes),
                "unusual": {
                    kind: {"about": about, "count": len(odd[kind]), "examples": sorted(odd[kind])[:_NAMED]}
                    for kind, about in ODDITIES.items()
                    if odd[kind]
                },
            },
            notes=[*self._notes(entries, classes_of, given, search.classes, left)],
            patients=dict(sorted(standing.items())),
        )

    def _notes(
        self,
        entries: dict[str, list[dict[str, Any]]],
        classes_of: dict[str, set[str]],
        given: dict[str, int],
        classes: Sequence[str],
        left: Sequence[str],
    ) -> Iterator[str]:
        if self.classes is None and (note := check_ilsvrc(given, classes)) is not None:
            yield note
        strange = classes_of["validation"] - classes_of["training"]
        if strange and classes_of["training"]:
            yield f"{len(strange)} classes of the validation images have no training images ({min(strange)})"
        if entries["validation"] and not entries["test"]:
            yield "the test split is empty: the bundle evaluates on the validation images, as papers do"
        if left:
            yield f"batches of images that are not part of this data set were left: {len(left)} ({left[0]})"
        empty = [split for split in ("training", "validation") if not entries[split]]
        if empty:
            yield f"no image fell into {' or '.join(empty)}"


def _input_bytes(batch: Batch, first: int | None = None) -> int:
    """Size of a batch's files, of all or of the first ones."""
    if batch.inner is not None:
        return (
            batch.inner[1]
            if first is None
            else sum(len(c) for _, c in islice(batch.contents(), first) if isinstance(c, bytes))
        )
    if batch.members:
        return sum(size for _, _, size in batch.members[:first])
    return sum((batch.source / name).stat().st_size for name in batch.files[:first])
