"""``vaevq-med slice-extract``: a folder of cases to a data set of 2D slices."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vaevq_med.core.errors import DataError
from vaevq_med.core.files import atomic_write_text
from vaevq_med.core.folder import RECIPE, REPORT, OutputFolder
from vaevq_med.core.jobs import Problem, attempt, check_workers, run_jobs
from vaevq_med.images.manifest import SPLITS, split_hash, write_manifest
from vaevq_med.images.splits import SPLIT_FILE, count_patients, remembered_splits, split_by_file, split_by_rule
from vaevq_med.prepare.recipes import Recipe, load_recipe
from vaevq_med.prepare.volumes.find import Case, CaseSearch, find_cases, read_cases
from vaevq_med.prepare.volumes.labels import BRATS2024, label_map
from vaevq_med.prepare.volumes.slices import STATE, CaseRecord, extract_case, fingerprint, read_record

_VERSIONS = ("vaevq_med", "monai", "torch", "numpy", "nibabel", "SimpleITK", "pillow")


@dataclass(frozen=True)
class SliceReport:
    """What a run did.

    Attributes:
        output: the data set's folder.
        written: cases sliced now.
        reused: cases that an earlier run had finished.
        skipped: case and what is wrong with it.
        notes: what a user should know besides.
        slices: images in each split.
        patients: patients in each split.
        modalities: images of each contrast.
    """

    output: Path
    written: int
    reused: int
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    slices: dict[str, int]
    patients: dict[str, int]
    modalities: dict[str, int]


@dataclass(frozen=True)
class SlicePlan:
    """What a run would do.

    Attributes:
        cases: cases to slice.
        reused: cases that an earlier run has finished.
        skipped: case and what is wrong with it, as far as names tell.
        notes: what a user should know besides.
        patients: patients in each split.
        measured_on: the case that the estimates come from, or None where there is nothing to do.
        images: estimated images to write.
        bytes: estimated space that they take.
        free_bytes: space that there is.
    """

    cases: int
    reused: int
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    patients: dict[str, int]
    measured_on: str | None
    images: int
    bytes: int
    free_bytes: int


@dataclass(frozen=True)
class SliceExtract:
    """Slice every case below a folder.

    Attributes:
        input: folder of cases, searched under any nesting.
        output: folder of the data set.
        recipe: what is done to each case.
        workers: processes, or None for one a core.
        split_file: patients' splits, instead of the recipe's rule.
        cases: CSV of paths, for a layout that the search does not know.
        label_map: what the segmentations' values mean, where the file names tell it wrongly.
        overwrite: replace a data set that another recipe made.
    """

    input: Path
    output: Path
    recipe: Recipe = field(default_factory=lambda: load_recipe("brats24/axial_256"))
    workers: int | None = None
    split_file: Path | None = None
    cases: Path | None = None
    label_map: str | None = None
    overwrite: bool = False

    def plan(self) -> SlicePlan:
        """Find out what :meth:`run` would do, and slice one case into a temporary folder to see what it takes.

        Raises:
            DataError: input, output or an option is not what was expected.
        """
        search = self._search()
        splits = self._splits(search.cases)
        target = self._target_map(search.cases)
        self._check_output()
        todo = [case for case in search.cases if not self._finished(case, target)]
        skipped = list(search.problems)
        measured, images, size = None, 0, 0
        for case in todo:
            with tempfile.TemporaryDirectory() as name:
                folder = replace(self._folder, path=Path(name))
                outcome = attempt(extract_case, "case", case, self.recipe, folder, target)
            if isinstance(outcome, CaseRecord):
                measured, images, size = case.name, len(outcome.entries), outcome.bytes
                break
            if outcome.fatal:
                raise DataError(f"case {case.name}: {outcome.reason}")
            skipped.append((case.name, outcome.reason))
        remaining = len(todo) - (len(skipped) - len(search.problems))
        if len(search.cases) - len(todo) + remaining == 0:
            raise self._nothing(skipped)
        return SlicePlan(
            cases=remaining,
            reused=len(search.cases) - len(todo),
            skipped=tuple(skipped),
            notes=tuple(search.notes),
            patients=count_patients(splits),
            measured_on=measured,
            images=images * remaining,
            bytes=size * remaining,
            free_bytes=self._folder.free_bytes(),
        )

    def run(
        self,
        *,
        on_start: Callable[[int], None] = lambda total: None,
        on_case: Callable[[str], None] = lambda case: None,
        on_skip: Callable[[str, str], None] = lambda case, reason: None,
    ) -> SliceReport:
        """Slice the cases, then write the datalist and the report.

        A case that cannot be read is skipped, the others go on. Interrupted, it leaves finished cases only, and the
        next run does the rest.

        Args:
            on_start: called once with the number of cases to slice.
            on_case: called with the name of each case that is done.
            on_skip: called with the name of each case that is skipped, and the reason.

        Raises:
            DataError: input, output or an option is not what was expected, every case was skipped, or the disk is
                full.
            KeyboardInterrupt: interrupted; the cases being sliced are finished first.
        """
        search = self._search()
        for name, reason in search.problems:
            on_skip(name, reason)
        splits = self._splits(search.cases)
        target = self._target_map(search.cases)
        self._check_output()
        with self._folder.lock():
            self._folder.begin(self.recipe.image_hash)
            todo = [case for case in search.cases if not self._finished(case, target)]
            problems = dict(search.problems)
            jobs = {case.name: (case, self.recipe, self._folder, target) for case in todo}
            running = run_jobs(extract_case, jobs, kind="case", workers=self.workers, on_start=on_start)
            with contextlib.closing(running) as outcomes:
                for name, outcome in outcomes:
                    if isinstance(outcome, Problem):
                        problems[name] = outcome.reason
                        on_skip(name, outcome.reason)
                    else:
                        on_case(name)
            done = [case for case in search.cases if case.name not in problems]
            if not done:
                raise self._nothing(list(problems.items()))
            return self._finish(
                search, done, problems, splits, target, written=len({c.name for c in todo} - set(problems))
            )

    def _search(self) -> CaseSearch:
        if self.label_map is not None:
            label_map(self.label_map)
        check_workers(self.workers)
        if self.cases is not None:
            return read_cases(self.cases, self.input, self.recipe.modalities, label_map=self.label_map)
        return find_cases(self.input, self.recipe.modalities, label_map=self.label_map, exclude=self.output)

    def _splits(self, cases: Sequence[Case]) -> dict[str, str]:
        patients = sorted({case.patient for case in cases})
        if self.split_file is not None:
            return split_by_file(patients, self.split_file)
        return split_by_rule(patients, self.recipe.split, remembered_splits(self.output, self.recipe.split))

    @staticmethod
    def _target_map(cases: Sequence[Case]) -> str:
        """The label map that every segmentation is written in: their own if they share one, or BraTS 2024's."""
        names = {case.label_map for case in cases if case.segmentation is not None}
        return names.pop() if len(names) == 1 else BRATS2024.name

    def _finished(self, case: Case, target: str) -> bool:
        try:
            mark = fingerprint(case, self.recipe, target)
        except DataError:
            return False
        record = read_record(self._folder, case.name)
        return record is not None and record.fingerprint == mark

    @property
    def _folder(self) -> OutputFolder:
        return OutputFolder(self.output, STATE, "slice-extract", "slices")

    def _check_output(self) -> None:
        self._folder.check()
        if self._folder.is_of_another(self.recipe.image_hash) and not self.overwrite:
            made_by = f"{self.recipe.name} at {self.recipe.size} pixels as {self.recipe.format}"
            raise DataError(
                f"output {self.output}: found slices made by another recipe, expected those of {made_by}; choose "
                "another folder, or replace them with --overwrite"
            )

    def _nothing(self, problems: Sequence[tuple[str, str]]) -> DataError:
        return DataError(
            f"input {self.input}: found no case that could be sliced ({len(problems)} skipped), expected at least one"
        )

    def _finish(
        self,
        search: CaseSearch,
        done: Sequence[Case],
        problems: dict[str, str],
        splits: dict[str, str],
        target: str,
        written: int,
    ) -> SliceReport:
        """Write datalist, recipe and report from the records."""
        digest = hashlib.sha256(self.recipe.image_hash.encode())
        slices = dict.fromkeys(SPLITS, 0)
        modalities = dict.fromkeys(self.recipe.modalities, 0)
        digests: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
        for case in done:
            record = self._record(case)
            digest.update(f"{case.name} {record.digest}\n".encode())
            split = splits[case.patient]
            slices[split] += len(record.entries)
            for entry in record.entries:
                modalities[entry["modality"]] += 1
                digests[split].append({"image": entry["image"]})
        labels = label_map(target)
        content: dict[str, Any] = {
            "name": self.recipe.name,
            "description": self.recipe.description,
            "tensorImageSize": "2D",
            "modality": {str(number): name for number, name in enumerate(self.recipe.modalities)},
            "channels_per_image": 1,
            "label_map": {region: list(values) for region, values in labels.regions.items()},
            "segmentation_labels": {str(value): name for value, name in labels.labels.items()},
            "image_size": self.recipe.size,
            "format": self.recipe.format,
            "recipe": self.recipe.to_dict(),
            "versions": {name: version(name) for name in _VERSIONS},
            "content_hash": f"sha256:{digest.hexdigest()}",
            "split_hash": split_hash(digests),
        }
        for split in SPLITS:
            cases = [case for case in done if splits[case.patient] == split]
            content[split] = (entry for case in cases for entry in self._record(case).entries)
        patients = count_patients({case.patient: splits[case.patient] for case in done})
        notes = list(search.notes)
        empty = [split for split in SPLITS if not patients[split]]
        if empty:
            notes.append(f"no patient fell into {' or '.join(empty)}; --split-file names the patients of each split")
        others = sorted(self._folders() - {case.name for case in done})
        if others:
            notes.append(f"folders of cases that are not part of this data set were left: {len(others)} ({others[0]})")
        report = SliceReport(
            output=self.output,
            written=written,
            reused=len(done) - written,
            skipped=tuple(sorted(problems.items())),
            notes=tuple(notes),
            slices=slices,
            patients=patients,
            modalities=modalities,
        )
        with self._folder.writing():
            atomic_write_text(self.output / RECIPE, json.dumps(self.recipe.to_dict(), indent=2) + "\n")
            atomic_write_text(self.output / REPORT, _report_text(report, len(done)))
            standing = {patient: splits[patient] for patient in sorted({case.patient for case in done})}
            atomic_write_text(self.output / SPLIT_FILE, json.dumps(standing, indent=1, ensure_ascii=False) + "\n")
            write_manifest(self.output, content)
        return report

    def _record(self, case: Case) -> CaseRecord:
        record = read_record(self._folder, case.name)
        if record is None:
            raise DataError(
                f"case {case.name}: found its slices changed while this ran, expected nobody else to write there"
            )
        return record

    def _folders(self) -> set[str]:
        images = self.output / "images"
        return {path.name for path in images.iterdir()} if images.is_dir() else set()


def _report_text(report: SliceReport, cases: int) -> str:
    """The report as JSON; nothing of it depends on which run sliced which case."""
    content = {
        "cases": cases,
        "patients": report.patients,
        "slices": report.slices,
        "modalities": report.modalities,
        "skipped": [{"case": name, "reason": reason} for name, reason in report.skipped],
        "notes": list(report.notes),
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
