"""``vaevq-med audit-split``: does any patient, or any image under another name, stand in two splits of a data set?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vaevq_med.core.jobs import check_workers
from vaevq_med.images.manifest import SPLITS, load_manifest, split_hash
from vaevq_med.images.patients import patient_of, person_of
from vaevq_med.prepare.twins import Comparison, Twins, compare_splits


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    Attributes:
        patients: patients in each split; empty where none are named.
        slices: images in each split.
        leaks: one line for each patient, case or image that stands in two splits; empty if all is well.
        notes: what a user should know besides.
    """

    patients: dict[str, int]
    slices: dict[str, int]
    leaks: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class AuditSplit:
    """Check the datalist of a data set of slices or photographs, and their files.

    Patients are compared as the datalist names them and as the case names tell, so that an edited datalist which calls
    two timepoints two patients is found out; images are compared by what they show, so that a patient who came in under
    two names is found out too.

    Attributes:
        dataset: folder of ``dataset.json``.
        workers: processes, or None for one a core.
    """

    dataset: Path
    workers: int | None = None

    def run(
        self,
        *,
        on_start: Callable[[int], None] = lambda total: None,
        on_images: Callable[[int], None] = lambda count: None,
    ) -> AuditReport:
        """Read the datalist and the images, and compare.

        Args:
            on_start: called once with the number of images.
            on_images: called with how many more were read.

        Raises:
            DataError: there is no data set, or it is not valid.
        """
        check_workers(self.workers)
        manifest = load_manifest(self.dataset)
        if any("patient" in entry for split in SPLITS for entry in manifest.entries(split)):
            manifest = load_manifest(self.dataset, required=("image", "patient", "case"))
        entries = {split: manifest.entries(split) for split in SPLITS}
        compared = compare_splits(self.dataset, entries, workers=self.workers, on_start=on_start, on_images=on_images)
        notes = []
        if manifest.split_hash and manifest.split_hash != split_hash(entries):
            notes.append("the datalist was edited after it was written: its split hash does not match")
        named = {split: {str(e["patient"]) for e in listed if "patient" in e} for split, listed in entries.items()}
        return AuditReport(
            patients={split: len(names) for split, names in named.items()} if any(named.values()) else {},
            slices={split: len(listed) for split, listed in entries.items()},
            leaks=(*_by_name(entries), *map(_words, compared.twins)),
            notes=(*notes, *_remarks(compared)),
        )


def _by_name(entries: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[str]:
    """Patients, cases and images that stand in two splits by their names."""
    places: dict[tuple[str, str], set[str]] = defaultdict(set)
    names: dict[str, set[str]] = defaultdict(set)
    for split, listed in entries.items():
        for entry in listed:
            places["image", str(entry["image"])].add(split)
            if "patient" not in entry:
                continue
            patient, case = str(entry["patient"]), str(entry["case"])
            read = patient_of(case)
            for name in {patient, read} if read != case else {patient}:
                names[person_of(name)].add(name)
                places["patient", person_of(name)].add(split)
            if read == case != patient:
                # The name of a case that says nothing of its patient may be another patient's.
                places["case", case].add(split)
    for (kind, name), found in sorted(places.items(), key=lambda item: (item[0][0] != "patient", item[0])):
        if len(found) > 1:
            called = " or ".join(sorted(names[name])) if kind == "patient" else name
            yield f"{kind} {called} stands in {' and '.join(split for split in SPLITS if split in found)}"


def _words(twins: Twins) -> str:
    (first, one), (second, other) = twins.first, twins.second
    how = f"{twins.identical} identical" if twins.identical else f"near-identical (likeness {twins.likeness:.3f})"
    how = f"mirrored, {how}" if twins.mirrored else how
    images = "" if twins.images == (first, second) else f", as {twins.images[0]} and {twins.images[1]}"
    return f"{first} in {one} and {second} in {other} have {how} images{images}"


def _remarks(compared: Comparison) -> Iterator[str]:
    if compared.unreadable:
        path, reason = compared.unreadable[0]
        yield f"{len(compared.unreadable)} images cannot be read and were not compared (first: {path}: {reason})"
    if compared.blank:
        yield f"{compared.blank} images are blank and were not compared"
    if compared.sparse:
        yield f"{compared.sparse} images with little in them were compared byte by byte alone"
