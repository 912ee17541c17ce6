"""Runs a study of rate against distortion: one record a row, setting and volume; what is there is not made again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import ClassVar

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.evaluation.volumes import VolumeJudge
from vaevq_med.study.rates.candidates import Candidate, as_judged, mask_bytes
from vaevq_med.study.rates.curves import check_delta_rates
from vaevq_med.study.rates.file import RateDistortionStudy
from vaevq_med.study.rates.recording import Measure, Record, RunRecords
from vaevq_med.study.rates.report import write_report
from vaevq_med.study.rates.scans import ScanFile, find_scans


@dataclass(frozen=True)
class RunRates(RunRecords[ScanFile]):
    """All rows of a study on all of its volumes."""

    command: ClassVar[str] = "rate-distortion"

    study: RateDistortionStudy

    def find_rows(self) -> list[Candidate]:
        """What is compared, checked."""
        rows = super().find_rows()
        names = [row.name for row in rows]
        wrong = next((name for name in self.study.anchors if name not in names), None)
        if wrong is not None:
            raise VaevqMedError(f"anchors has {wrong}; expected some of {', '.join(names)}")
        if self.study.anchors:
            check_delta_rates()  # or hours of coding would end without a table
        return rows

    @cached_property
    def scans(self) -> list[ScanFile]:
        """What is coded."""
        return find_scans(self.study)

    @property
    def items(self) -> list[ScanFile]:
        """Each volume by itself."""
        return self.scans

    def groups(self) -> Iterator[list[ScanFile]]:
        """The contrasts of a case, as a tokenizer codes them together."""
        return ([*scans] for _, scans in groupby(self.scans, key=lambda scan: scan.case.name))

    @contextmanager
    def opened(self, item: ScanFile) -> Iterator[Measure]:
        """Read a volume, and code and judge it."""
        content = item.read()
        seen = None if self.study.perceptual is None else self.study.perceptual.slices
        judge = VolumeJudge(
            content.unit, content.brain, content.tumor, network=self.network, slices=self.study.slices, seen=seen
        )
        mask = mask_bytes(content.brain) if self.study.background == "masked" else None

        def measure(row: Candidate, setting: float) -> tuple[Record, str]:
            coded = as_judged(row.code(item, content, setting), row, content.brain, mask)
            figures = judge.figures(coded.unit)
            record = {
                "patient": item.case.patient,
                "case": item.case.name,
                "contrast": item.contrast,
                "voxels": content.unit.size,
                "brain_voxels": int(content.brain.sum()),
                "bytes": coded.size,
                "parts": dict(coded.parts),
                "encode_seconds": round(coded.encode_seconds, 3),
                "decode_seconds": round(coded.decode_seconds, 3),
                "figures": figures,
            }
            rate = 8 * coded.size / content.unit.size
            return record, f"{rate:.4f} bits a voxel, {figures['psnr_brain']:.2f} dB in the brain"

        yield measure

    def write_report(self, records: Sequence[Record]) -> tuple[list[Path], str]:
        """Tables of rates, delta rates and times, and the curves."""
        return write_report(self.study, self.rows, records)
