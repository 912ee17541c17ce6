"""Runs a study of downstream tasks: one record a row, setting and case; what is there is not made again."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.evaluation.volumes import Judgment, VolumeJudge
from vaevq_med.metrics.preservation import lesions_found
from vaevq_med.metrics.segmentation import region_scores
from vaevq_med.study.rates.candidates import Candidate, Coded, as_judged, mask_bytes
from vaevq_med.study.rates.recording import Measure, Record, RunRecords, refuse_seen, unit_name
from vaevq_med.study.tasks.cases import (
    CaseContent,
    CaseFile,
    Lesioned,
    find_case_files,
    lesioned_cases,
    through_window,
)
from vaevq_med.study.tasks.features import KeptFeatures
from vaevq_med.study.tasks.file import TasksStudy
from vaevq_med.study.tasks.report import write_report
from vaevq_med.study.tasks.rows import ORIGINAL, Original
from vaevq_med.study.tasks.sizes import LESIONS_OF, training_edges
from vaevq_med.tasks.detectability import response
from vaevq_med.tasks.radiomics import LEVELS, region_features, shape_features
from vaevq_med.tasks.segmentation import Segmenter, load_segmenter, to_masks
from vaevq_med.trained.patients import first_seen

Units = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class RunTasks(RunRecords[CaseFile]):
    """All rows of a study, and the originals, on all of its cases."""

    command: ClassVar[str] = "tasks"
    format: ClassVar[int] = 3

    study: TasksStudy

    def find_rows(self) -> list[Candidate]:
        """The originals, and what is compared with them, checked."""
        rows = super().find_rows()
        if any(row.name == ORIGINAL for row in rows):
            raise VaevqMedError(f"tokenizers has {ORIGINAL}, which is the row of the originals; expected another name")
        return [Original(), *rows]

    @cached_property
    def items(self) -> list[CaseFile]:
        """Each case by itself."""
        return find_case_files(self.study)

    @cached_property
    def segmenter(self) -> Segmenter | None:
        """The segmentation network, on one core as the codecs.

        Raises:
            VaevqMedError: it cannot be read, needs slices or a contrast that the study does not have, or was trained on
                a patient of the study.
        """
        if self.study.segmenter is None:
            return None
        found = load_segmenter(self.study.segmenter, "cpu")
        missing = [contrast for contrast in found.contrasts if contrast not in self.study.contrasts]
        if missing:
            raise VaevqMedError(
                f"contrasts are {', '.join(self.study.contrasts)}; expected {', '.join(missing)} too, for the segmenter"
            )
        recipe = self.items[0].recipe
        if recipe.axis != "axial":
            raise VaevqMedError(
                f"recipe {recipe.name} cuts {recipe.axis} slices; expected axial ones for the segmenter"
            )
        found.stored.check_window(recipe.to_dict())
        if self.study.split != "training":
            patients = {item.case.patient for item in self.items}
            refuse_seen("segmenter", first_seen(found.stored.data, str(self.study.segmenter), patients))
        return found

    @property
    def remarks(self) -> list[str]:
        """What a reader has to know of the segmentation network."""
        return [] if self.segmenter is None else self.segmenter.stored.check_window(self.items[0].recipe.to_dict())

    def size_edges(self) -> tuple[float, float] | None:
        """Where small lesions end and large ones begin, in ml; None where nothing says it.

        Raises:
            DataError: the segmentations of the split file's training patients, which would say it, do not.
        """
        study = self.study
        if study.segmenter is None:
            return None
        if study.lesion_sizes is not None:
            return study.lesion_sizes[0], study.lesion_sizes[1]
        if study.split_file is None:
            return None
        return training_edges(study, LESIONS_OF)

    def depends_on(self) -> Mapping[str, Any]:
        """The instruments."""
        asked, study = self.study.detectability, self.study
        return {
            **super().depends_on(),
            "contrasts": study.contrasts,
            "segmenter": None if self.segmenter is None else self.segmenter.content_hash,
            "radiomics": LEVELS if study.radiomics else None,
            "detectability": None if asked is None else asked.model_dump(mode="json"),
        }

    @contextmanager
    def opened(self, item: CaseFile) -> Iterator[Measure]:
        """Read a case, and code and judge it."""
        content, study = item.read(), self.study
        seen = None if study.perceptual is None else study.perceptual.slices
        judges = {
            name: VolumeJudge(scan.unit, scan.brain, scan.tumor, network=self.network, slices=study.slices, seen=seen)
            for name, scan in content.scans.items()
        }
        regions = None
        if content.regions is not None:
            regions = {name: int(mask.sum()) for name, mask in content.regions.items()}
        masked = study.background == "masked"
        masks = {name: mask_bytes(scan.brain) if masked else None for name, scan in content.scans.items()}
        with tempfile.TemporaryDirectory(prefix="lesions-") as folder:
            asked = study.detectability
            copies = [] if asked is None else lesioned_cases(item, content, asked, Path(folder))

            def measure(row: Candidate, setting: float) -> tuple[Record, str]:
                coded = {
                    scan.contrast: as_judged(
                        row.code(scan, content.scans[scan.contrast], setting),
                        row,
                        content.scans[scan.contrast].brain,
                        masks[scan.contrast],
                    )
                    for scan in item.scans
                }
                units = {name: one.unit for name, one in coded.items()}
                judged = {name: judges[name].judge(unit) for name, unit in units.items()}
                record: dict[str, Any] = {
                    "patient": item.case.patient,
                    "case": item.name,
                    "regions": regions,
                    "bytes": sum(one.size for one in coded.values()) / len(coded),
                    "contrasts": {name: _of_contrast(one, judged[name]) for name, one in coded.items()},
                    "features": self._kept(item, row, setting, judged.values()),
                    **self._segmented(content, units),
                    "radiomics": radiomics(content, units) if study.radiomics else None,
                    "lesions": self._lesions(content, copies, units, row, setting),
                }
                psnr = np.mean([one["figures"]["psnr_brain"] for one in record["contrasts"].values()])
                return record, f"{record['bytes']:,.0f} bytes a volume, {psnr:.2f} dB in the brain"

            yield measure

    def _kept(
        self, item: CaseFile, row: Candidate, setting: float, judged: Iterable[Judgment]
    ) -> dict[str, str] | None:
        """Keep what the network of the perceptual distance saw, and what the record notes of it."""
        pooled = [one.pooled for one in judged if one.pooled is not None]
        if not pooled:
            return None
        folder = self.folder(item)
        with folder.writing():
            return KeptFeatures.write(folder.records / f"{unit_name(row, setting)}.npz", torch.cat(pooled))

    def records(self) -> list[Record]:
        """With where the features of each are, in place of what it notes of them."""
        folders = {item.name: self.folder(item).records for item in self.items}
        return [
            {**record, "features": KeptFeatures.of(folders[record["case"]], record.get("features"))}
            for record in super().records()
        ]

    def _segmented(self, content: CaseContent, units: Units) -> dict[str, Any]:
        """Scores against the experts' segmentation, and the shape of what was found, by region."""
        segmenter = self.segmenter
        if segmenter is None:
            return {"segmentation": None, "shapes": None, "sizes": None}
        volume = torch.from_numpy(np.stack([units[contrast] for contrast in segmenter.contrasts]))
        found = to_masks(segmenter.segment(volume)).numpy()
        spacing = next(iter(content.scans.values())).spacing
        masks = dict(zip(segmenter.regions, found, strict=True))
        scores = sizes = None
        if content.regions is not None:
            scores = {name: region_scores(mask, content.regions[name], spacing) for name, mask in masks.items()}
            if LESIONS_OF in masks:
                sizes = lesions_found(masks[LESIONS_OF], content.regions[LESIONS_OF], spacing)
        shapes = {name: shape_features(mask, spacing) for name, mask in masks.items()}
        return {"segmentation": scores, "shapes": flat(shapes), "sizes": sizes}

    def _lesions(
        self, content: CaseContent, copies: Sequence[Lesioned], units: Units, row: Candidate, setting: float
    ) -> list[list[float]] | None:
        """Diameter, strength, and the observer's responses with and without, of each lesion."""
        asked = self.study.detectability
        if asked is None or not copies:
            return None
        original = content.scans[asked.contrast]
        found = []
        for copy in copies:
            coded = row.code(copy.scan, copy.content, setting)
            volume = through_window(coded.unit, copy.content, original)
            for lesion in copy.lesions:
                seen = [
                    response(where, lesion, original.spacing, original.brain)
                    for where in (volume, units[asked.contrast])
                ]
                found.append([lesion.diameter, lesion.contrast, *seen])
        return found

    def write_report(self, records: Sequence[Record]) -> tuple[list[Path], str]:
        """The table, the detectability, the rank correlations, and the figures."""
        asked = [item.name for item in self.items]
        edges, remarks = None, [*self.remarks]
        try:
            edges = self.size_edges()
        except VaevqMedError as error:  # what was measured is shown all the same
            remarks.append(
                f"Lesions by size are left out ({error}). With lesion_sizes in the study's file, the same call adds "
                "them without measuring anything again."
            )
        return write_report(self.study, self.rows, records, asked=asked, remarks=remarks, edges=edges)


def _of_contrast(coded: Coded, judged: Judgment) -> dict[str, Any]:
    times = {"encode_seconds": round(coded.encode_seconds, 3), "decode_seconds": round(coded.decode_seconds, 3)}
    return {"bytes": coded.size, **times, "figures": judged.figures}


def radiomics(content: CaseContent, units: Units) -> dict[str, float] | None:
    """Features of each contrast and region as ``CONTRAST/REGION/NAME``; without those of empty regions.

    Args:
        content: the case, whose own segmentation says where the regions are.
        units: what is measured in them, ``[Z, Y, X]`` in [0, 1], by contrast.

    Returns:
        None without a segmentation.
    """
    if content.regions is None:
        return None
    return flat(
        {
            f"{contrast}/{region}": region_features(unit, mask)
            for contrast, unit in units.items()
            for region, mask in content.regions.items()
        }
    )


def flat(groups: Mapping[str, Mapping[str, float] | None]) -> dict[str, float]:
    """Values of groups as ``GROUP/NAME``; a group that is None has none.

    Example:
        >>> flat({"a": {"x": 1.0}, "b": None})
        {'a/x': 1.0}
    """
    return {f"{group}/{name}": value for group, own in groups.items() for name, value in (own or {}).items()}
