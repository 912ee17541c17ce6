"""``vaevq-med audit-split``: does any patient stand in two splits of a data set?"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from vaevq_med.images.manifest import SPLITS, load_manifest, split_hash
from vaevq_med.prepare.volumes.find import patient_of


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    Attributes:
        patients: patients in each split.
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
    """Check a slice data set's datalist.

    Patients are compared as the datalist names them and as the case names tell, so that an edited datalist which calls
    two timepoints two patients is found out.

    Attributes:
        dataset: folder of ``dataset.json``.
    """

    dataset: Path

    def run(self) -> AuditReport:
        """Read the datalist and compare.

        Raises:
            DataError: there is no data set, or it is not valid.
        """
        manifest = load_manifest(self.dataset, required=("image", "patient", "case"))
        places: dict[tuple[str, str], set[str]] = defaultdict(set)
        patients: dict[str, set[str]] = {split: set() for split in SPLITS}
        for split in SPLITS:
            for entry in manifest.entries(split):
                patient, case = str(entry["patient"]), str(entry["case"])
                patients[split].add(patient)
                places["patient", patient].add(split)
                read = patient_of(case)
                if read != patient:
                    # The name of a case that says nothing of its patient may be another patient's.
                    places["case" if read == case else "patient", read].add(split)
                places["image", str(entry["image"])].add(split)
        leaks = [
            f"{kind} {name} stands in {' and '.join(s for s in SPLITS if s in found)}"
            for (kind, name), found in sorted(places.items(), key=lambda item: (item[0][0] != "patient", item[0]))
            if len(found) > 1
        ]
        notes = []
        if manifest.split_hash and manifest.split_hash != split_hash({s: manifest.entries(s) for s in SPLITS}):
            notes.append("the datalist was edited after it was written: its split hash does not match")
        return AuditReport(
            patients={split: len(names) for split, names in patients.items()},
            slices={split: len(manifest.entries(split)) for split in SPLITS},
            leaks=tuple(leaks),
            notes=tuple(notes),
        )
