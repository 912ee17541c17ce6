"""Runs a study of rate against distortion: one record a row, setting and volume; what is there is not made again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.files import atomic_write_text
from vaevq_med.core.folder import BusyError, OutputFolder
from vaevq_med.evaluation.volumes import VolumeJudge
from vaevq_med.networks.features import FeatureNetwork, feature_network
from vaevq_med.study.rates.candidates import Candidate
from vaevq_med.study.rates.curves import check_delta_rates
from vaevq_med.study.rates.file import RateDistortionStudy
from vaevq_med.study.rates.report import write_report
from vaevq_med.study.rates.rows import candidates
from vaevq_med.study.rates.scans import Scan, ScanFile, find_scans

_FORMAT = 1
"""Part of a record's key; a change of what the same study measures raises it."""


@dataclass(frozen=True)
class RatesReport:
    """What a study ends with.

    Attributes:
        output: folder of everything that was written.
        expected: records that the study has.
        missing: of them, those that are not there.
        problems: volume, row and setting, and what went wrong there.
        busy: volumes that another call was at work on.
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
class _Volume:
    """A volume that is being measured: where it is and what is in it, what is to be made of it, with the keys."""

    scan: ScanFile
    content: Scan
    judge: VolumeJudge
    mask_bytes: int
    todo: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class RunRates:
    """All rows of a study on all of its volumes.

    Two calls side by side share the work: each takes cases that the other is not at.

    Args:
        study: as its file says.
        on_record: called with a line whenever a record was made.
    """

    study: RateDistortionStudy
    on_record: Callable[[str], None] = field(default=lambda line: None)

    @cached_property
    def rows(self) -> list[Candidate]:
        """What is compared, checked."""
        rows = candidates(self.study)
        names = [row.name for row in rows]
        wrong = next((name for name in self.study.anchors if name not in names), None)
        if not rows or wrong is not None:
            raise VaevqMedError(
                "codecs and tokenizers are empty; expected at least one"
                if not rows
                else f"anchors has {wrong}; expected some of {', '.join(names)}"
            )
        if self.study.anchors:
            check_delta_rates()  # or hours of coding would end without a table
        return rows

    @cached_property
    def scans(self) -> list[ScanFile]:
        """What is coded."""
        return find_scans(self.study)

    @cached_property
    def network(self) -> FeatureNetwork | None:
        """Of the perceptual distance."""
        asked = self.study.perceptual
        return None if asked is None else feature_network(asked.network, asked.weights)

    def folder(self, scan: ScanFile) -> OutputFolder:
        """The records of a volume."""
        return OutputFolder(self.study.output, f"records/{scan.name}", "rate-distortion", "records")

    def key(self, row: Candidate, setting: float, scan: ScanFile) -> dict[str, Any]:
        """All that a record depends on."""
        asked = self.study.perceptual
        sees = None
        if asked is not None and self.network is not None:
            sees = {"network": asked.network, "weights": self.network.weights_sha256, "slices": asked.slices}
        return {
            "format": _FORMAT,
            "made_of": dict(row.made_of()),
            "setting": setting,
            "source": scan.mark(),
            "background": self.study.background,
            "slices": self.study.slices,
            "perceptual": sees,
        }

    def work(self, scan: ScanFile) -> Iterator[tuple[Candidate, float, dict[str, Any]]]:
        """Rows and settings of a volume whose records are not there, and their keys."""
        folder = self.folder(scan)
        for row, setting in self._points():
            key = self.key(row, setting, scan)
            found = folder.record(_unit(row, setting))
            if found is None or found.get("key") != key:
                yield row, setting, key

    def _points(self) -> list[tuple[Candidate, float]]:
        points = []
        for row in self.rows:
            lossless = [row.lossless] if self.study.lossless and row.lossless is not None else []
            points += [(row, setting) for setting in dict.fromkeys([*row.settings, *lossless])]
        return points

    def dry_run(self) -> list[str]:
        """A line a volume: how many records are there, of how many."""
        total = len(self._points())
        return [f"{scan.name}: {total - len([*self.work(scan)])} of {total} records" for scan in self.scans]

    def run(self) -> RatesReport:
        """Make what is not there, then write tables and figures over what is.

        Raises:
            VaevqMedError: a field that cannot be.
            KeyboardInterrupt: on Ctrl-C or SIGTERM; the same call goes on.
        """
        os.environ.setdefault("SVT_LOG", "1")  # errors alone
        with _one_thread():
            problems, busy = self._make()
        records = self.records()
        expected = len(self._points()) * len(self.scans)
        report = RatesReport(self.study.output, expected, expected - len(records), tuple(problems), tuple(busy))
        if not records:
            return report
        files, table = write_report(self.study, self.rows, records)
        return RatesReport(**{**vars(report), "files": tuple(files), "table": table})

    def _make(self) -> tuple[list[tuple[str, str]], list[str]]:
        problems: list[tuple[str, str]] = []
        busy = []
        for _, scans in groupby(self.scans, key=lambda scan: scan.case.name):
            with ExitStack() as locks:
                own = []
                for scan in scans:
                    if next(self.work(scan), None) is None:
                        continue
                    try:
                        locks.enter_context(self.folder(scan).lock())
                    except BusyError:
                        busy.append(scan.name)
                    else:
                        own.append(scan)
                problems += self._measure(own)
        return problems, busy

    def _measure(self, scans: Sequence[ScanFile]) -> list[tuple[str, str]]:
        """Setting by setting on all contrasts of a case, as a tokenizer codes them together."""
        problems: list[tuple[str, str]] = []
        volumes = []
        for scan in scans:
            todo = {_unit(row, setting): key for row, setting, key in self.work(scan)}
            if not todo:  # another call has made them meanwhile
                continue
            try:
                volumes.append(self._read(scan, todo))
            except VaevqMedError as error:
                problems.append((scan.name, str(error)))
        for row, setting in self._points():
            for volume in volumes:
                unit = _unit(row, setting)
                if unit in volume.todo:
                    try:
                        self._record(volume, row, setting, unit)
                    except VaevqMedError as error:
                        problems.append((f"{volume.scan.name} {unit}", str(error)))
        return problems

    def _read(self, scan: ScanFile, todo: Mapping[str, Mapping[str, Any]]) -> _Volume:
        from vaevq_med.codec.coders.mask import encode_mask

        content = scan.read()
        judge = VolumeJudge(
            content.unit,
            content.brain,
            content.tumor,
            network=self.network,
            slices=self.study.slices,
            seen=None if self.study.perceptual is None else self.study.perceptual.slices,
        )
        mask_bytes = len(encode_mask(content.brain)) if self.study.background == "masked" else 0
        return _Volume(scan, content, judge, mask_bytes, todo)

    def _record(self, volume: _Volume, row: Candidate, setting: float, unit: str) -> None:
        """Code a volume by a row at a setting, and note what came of it."""
        scan, content = volume.scan, volume.content
        masked = self.study.background == "masked"
        coded = row.code(scan, content, setting)
        size = coded.size + (0 if row.has_mask else volume.mask_bytes)
        record = {
            "key": volume.todo[unit],
            "row": row.name,
            "setting": setting,
            "patient": scan.case.patient,
            "case": scan.case.name,
            "contrast": scan.contrast,
            "voxels": content.unit.size,
            "brain_voxels": int(content.brain.sum()),
            "bytes": size,
            "parts": {**coded.parts, **({"mask": volume.mask_bytes} if masked and not row.has_mask else {})},
            "encode_seconds": round(coded.encode_seconds, 3),
            "decode_seconds": round(coded.decode_seconds, 3),
            "figures": volume.judge.figures(coded.unit * content.brain if masked else coded.unit),
        }
        folder = self.folder(scan)
        with folder.writing():
            atomic_write_text(folder.records / f"{unit}.json", json.dumps(record, ensure_ascii=False) + "\n")
        rate, psnr = 8 * size / content.unit.size, record["figures"]["psnr_brain"]  # type: ignore[index]
        self.on_record(f"{scan.name} {unit}: {rate:.4f} bits a voxel, {psnr:.2f} dB in the brain")

    def records(self) -> list[Mapping[str, Any]]:
        """Those that are there, of this study's rows, settings and volumes."""
        found: list[Mapping[str, Any]] = []
        for scan in self.scans:
            folder = self.folder(scan)
            for row, setting in self._points():
                record = folder.record(_unit(row, setting))
                if record is not None and record.get("key") == self.key(row, setting, scan):
                    found.append(record)
        return found


def _unit(row: Candidate, setting: float) -> str:
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
