"""``vaevq-med slice-extract``: a folder of cases to a data set of 2D slices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from vaevq_med.core.errors import DataError, HaltError
from vaevq_med.core.folder import OutputFolder
from vaevq_med.core.jobs import Problem, attempt
from vaevq_med.images.manifest import SPLITS, split_hash
from vaevq_med.images.nifti import check_orientation
from vaevq_med.images.patients import one_name_each, patient_of, sharing_releases
from vaevq_med.images.reading import Reading
from vaevq_med.images.splits import (
    count_patients,
    dealt_before,
    remembered_patients,
    remembered_splits,
    split_by_file,
    split_by_rule,
)
from vaevq_med.prepare.job import DataSet, Estimate, Search, Source, known_record
from vaevq_med.prepare.recipes import AnyRecipe, Recipe
from vaevq_med.prepare.volumes.case import Case
from vaevq_med.prepare.volumes.discarded import Discarded, check_accepted, gathered, summary
from vaevq_med.prepare.volumes.find import find_cases
from vaevq_med.prepare.volumes.labels import BRATS2024, LabelCensus, UnknownLabelError, fitting_maps, label_map
from vaevq_med.prepare.volumes.slices import CaseRecord, extract_case, fingerprint, read_record
from vaevq_med.prepare.volumes.table import read_cases, read_patients


@dataclass
class _Patients(Search[Case]):
    """The cases, and the split of each patient."""

    splits: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class VolumeSource(Source[Case, CaseRecord]):
    """Every case below a folder, sliced.

    Attributes:
        input: folder of cases, searched under any nesting.
        recipe: what is done to each case.
        split_file: patients' splits, instead of the recipe's rule.
        cases: CSV of paths, for a layout that the search does not know.
        label_map: what the segmentations' values mean, where the file names tell it wrongly.
        patients: CSV of whose cases are, where their names do not tell it.
        orientation: where the axes of volumes point to whose headers do not say it, e.g. ``RAS``.
        accept: which of :data:`vaevq_med.prepare.volumes.discarded.LIMITS` may be exceeded.
    """

    recipes: ClassVar[type[AnyRecipe]] = Recipe
    unit: ClassVar[str] = "case"
    item: ClassVar[str] = "case"
    nothing: ClassVar[str] = "found no case that could be sliced ({} skipped), expected at least one"
    packages: ClassVar[tuple[str, ...]] = ("vaevq_med", "monai", "torch", "numpy", "nibabel", "SimpleITK", "pillow")

    input: Path
    recipe: Recipe = field(default_factory=lambda: Recipe.load("brats24/axial_256"))
    split_file: Path | None = None
    cases: Path | None = None
    label_map: str | None = None
    patients: Path | None = None
    orientation: str | None = None
    accept: tuple[str, ...] = ()

    def folder(self, output: Path) -> OutputFolder:
        """Where slices are written."""
        return OutputFolder(output, ".slices", "slice-extract", "slices")

    def find(self, output: Path) -> _Patients:
        """Find the cases, deal their patients, and choose the label map that every segmentation is written in.

        That is their own if they share one, or BraTS 2024's.
        """
        if self.label_map is not None:
            label_map(self.label_map)
        if self.orientation is not None:
            check_orientation(self.orientation)
        check_accepted(self.accept)
        if self.cases is not None:
            found = read_cases(self.cases, self.input, self.recipe.modalities, label_map=self.label_map)
        else:
            found = find_cases(self.input, self.recipe.modalities, label_map=self.label_map, exclude=output)
        units, notes = found.units, list(found.notes)
        called = {case.name: {case.patient} for case in units}
        if self.patients is not None:
            given = read_patients(self.patients)
            if units and not any(case.name in given for case in units):
                raise DataError(
                    f"patients {self.patients}: found none of the cases, expected some, e.g. {units[0].name}"
                )
            units = [replace(case, patient=given.get(case.name, case.patient)) for case in units]
        maps = {case.label_map for case in units if case.segmentation is not None}
        target = maps.pop() if len(maps) == 1 else BRATS2024.name
        dealt = {} if self.split_file is not None else remembered_splits(output, self.recipe.split)
        if dealt and (self.patients is not None or not all(case.patient in dealt for case in units)):
            # A table, or an earlier version, may have called them otherwise.
            for name, patient in remembered_patients(output).items():
                called.get(name, set()).add(patient)
        names = one_name_each((case.patient for case in units), dealt)
        earlier: dict[str, set[str]] = defaultdict(set)
        for case in units:
            earlier[names[case.patient]] |= {case.patient, *called[case.name]}
        stood = dealt_before(earlier, dealt)
        if self.split_file is not None:
            splits = split_by_file(set(names.values()), self.split_file)
        else:
            before = {name: min(places.values(), key=SPLITS.index) for name, places in stood.items() if places}
            splits = split_by_rule(names.values(), self.recipe.split, before)
        notes += _patient_notes(units, splits, stood)
        cases = [replace(case, patient=names[case.patient], target_map=target) for case in units]
        return _Patients(cases, found.problems, notes, splits)

    def fingerprint(self, unit: Case) -> str:
        """See :func:`fingerprint`."""
        return fingerprint(unit, self.recipe, self.orientation)

    def record(self, unit: Case, folder: OutputFolder) -> CaseRecord | None:
        """See :func:`read_record`; None, too, where more was lost of the case than this run accepts."""
        record = read_record(folder, unit.name)
        if record is not None:
            found = (Discarded(**values) for values in record.discarded.values())
            if any(name not in self.accept for each in found for name, _ in each.excesses(self.recipe)):
                return None
        return record

    def write(self, unit: Case, folder: OutputFolder) -> CaseRecord:
        """See :func:`extract_case`; values that another map has than that of the file's name halt the run."""
        try:
            return extract_case(unit, self.recipe, folder, orientation=self.orientation, accept=self.accept)
        except UnknownLabelError as error:
            fitting = fitting_maps(unit.label_map, [error.values])
            if unit.map_is_stated or not fitting:
                raise
            raise HaltError(f"{error}: {' or '.join(fitting)} would fit") from None

    def estimate(self, search: Search[Case], todo: Sequence[Case], folder: OutputFolder) -> Estimate:
        """Slice the first case that can be; the others take what it takes."""
        assert isinstance(search, _Patients)
        facts: dict[str, Any] = {"patients": count_patients(search.splits), "measured_on": None}
        skipped: list[tuple[str, str]] = []
        for case in todo:
            outcome = attempt(self.write, self.unit, case, folder)
            if not isinstance(outcome, Problem):
                left = len(todo) - len(skipped)
                facts["measured_on"] = case.name
                facts["discarded"] = summary({case.name: outcome.discarded})
                facts["notes"] = gathered(outcome.notes)
                return Estimate(len(outcome.entries) * left, outcome.bytes * left, skipped, facts)
            if outcome.fatal:
                raise DataError(f"case {case.name}: {outcome.reason}")
            skipped.append((case.name, outcome.reason))
        return Estimate(0, 0, skipped, facts)

    def describe(
        self, search: Search[Case], records: Iterator[tuple[Case, CaseRecord]], folder: OutputFolder
    ) -> DataSet:
        """Slices by split; their entries are read again when they are written, as there may be a million."""
        assert isinstance(search, _Patients)
        cases: dict[str, list[Case]] = {split: [] for split in SPLITS}
        images: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
        modalities = dict.fromkeys(self.recipe.modalities, 0)
        discarded: dict[str, Any] = {}
        noted: list[Sequence[str]] = []
        census = LabelCensus()
        for case, record in records:
            discarded[case.name] = record.discarded
            noted += record.notes
            census.add(case.label_map, case.map_is_stated, None if record.labels is None else set(record.labels))
            split = search.splits[case.patient]
            cases[split].append(case)
            for entry in record.entries:
                modalities[entry["modality"]] += 1
                images[split].append({"image": entry["image"]})
        done = {case.name: case for split in SPLITS for case in cases[split]}
        standing = {patient: search.splits[patient] for patient in sorted({case.patient for case in done.values()})}
        patients = count_patients(standing)
        slices = {split: len(images[split]) for split in SPLITS}
        labels = label_map(next((case.target_map for case in done.values()), BRATS2024.name))
        notes = [*census.judge(f"input {self.input}"), *gathered(noted)]
        empty = [split for split in SPLITS if not patients[split]]
        if empty:
            notes.append(f"no patient fell into {' or '.join(empty)}; --split-file names the patients of each split")
        place = folder.path / "images"
        others = sorted({path.name for path in place.iterdir()} - set(done)) if place.is_dir() else []
        if others:
            notes.append(f"folders of cases that are not part of this data set were left: {len(others)} ({others[0]})")
        return DataSet(
            head={
                "modality": {str(number): name for number, name in enumerate(self.recipe.modalities)},
                "channels_per_image": 1,
                "reading": Reading(shape="square", channels=1).to_dict(),
                "label_map": {region: list(values) for region, values in labels.regions.items()},
                "segmentation_labels": {str(value): name for value, name in labels.labels.items()},
                "image_size": self.recipe.size,
                "format": self.recipe.format,
            },
            entries={
                split: (entry for case in cases[split] for entry in known_record(self, case, folder).entries)
                for split in SPLITS
            },
            split_hash=split_hash(images),
            size=sum(slices.values()),
            facts={
                "cases": len(done),
                "patients": patients,
                "slices": slices,
                "modalities": modalities,
                "discarded": summary(discarded),
                "segmentations": census.facts(),
            },
            notes=notes,
            patients=standing,
        )


def _patient_notes(
    cases: Sequence[Case], splits: Mapping[str, str], stood: Mapping[str, Mapping[str, str]]
) -> Iterator[str]:
    """Remarks on patients who stood in several splits under several names, or whom several releases have."""
    for patient, places in sorted(stood.items()):
        if any(split != splits[patient] for split in places.values()):
            others = ", ".join(sorted({patient, *places}))
            yield f"{others} are one patient, who stood in two splits; all images stand in {splits[patient]} now"
    releases = sharing_releases(case.name for case in cases if case.patient == patient_of(case.name))
    if releases:
        found = " and ".join(f"{release} ({patient})" for release, patient in releases)
        yield (
            f"cases of {found} together: the releases share patients under different names, and a split cannot know "
            "them; give the patients with --patients, and look for the same images with audit-split"
        )
