"""What a study of rate against distortion found: a table of rates, delta rates and times, curves, and all records."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vaevq_med.core.files import atomic_write_text
from vaevq_med.evaluation.volumes import FIGURES
from vaevq_med.metrics.figures import Figure
from vaevq_med.study.rates.candidates import Candidate
from vaevq_med.study.rates.curves import Curve, Spread, curves_of, delta_rate
from vaevq_med.study.rates.file import RateDistortionStudy

_COMPARED = ("psnr_brain", "ssim_brain", "perceptual")
"""What delta rates and the picture are of."""
_KNOWN = {figure.name: figure for figure in FIGURES}
Records = Sequence[Mapping[str, Any]]


def write_report(study: RateDistortionStudy, rows: Sequence[Candidate], records: Records) -> tuple[list[Path], str]:
    """Write ``table.md``, ``records.csv``, ``results.json`` and ``curves.png``.

    Args:
        study: as its file says.
        rows: what was compared.
        records: those that are there.

    Returns:
        The files, and the table as Markdown.
    """
    report = Report(study, rows, records)
    output, table = study.output, report.markdown()
    texts = {
        "table.md": table,
        "records.csv": report.csv(),
        "results.json": json.dumps(report.to_json(), indent=1) + "\n",
    }
    for name, text in texts.items():
        atomic_write_text(output / name, text)
    from vaevq_med.study.rates.picture import draw_curves

    lines = [(report.titles[name], points) for name, points in report.points().items()]
    draw_curves(lines, [_KNOWN[name] for name in _COMPARED if report.has(name)], output / "curves.png")
    return [*(output / name for name in texts), output / "curves.png"], table


class Report:
    """The records of a study, by row.

    Args:
        study: as its file says.
        rows: what was compared.
        records: those that are there.
    """

    def __init__(self, study: RateDistortionStudy, rows: Sequence[Candidate], records: Records) -> None:
        self.study, self.records = study, records
        own = {row.name: [record for record in records if record["row"] == row.name] for row in rows}
        self.rows = [row for row in rows if own[row.name]]
        self.own = {row.name: own[row.name] for row in self.rows}
        self.lossless = {
            row.name: [r for r in own[row.name] if row.lossless is not None and r["setting"] == row.lossless]
            for row in self.rows
        }
        lossy = {name: [r for r in found if r not in self.lossless[name]] for name, found in self.own.items()}
        self.curves: dict[str, list[Curve]] = {name: curves_of(found) for name, found in lossy.items() if found}
        self.contrasts = [c for c in study.contrasts if any(record["contrast"] == c for record in records)]
        self.titles = {row.name: row.title for row in rows}

    def has(self, figure: str) -> bool:
        """Whether some record has a figure."""
        return any(figure in record["figures"] for record in self.records)

    def volumes(self, name: str, figure: str) -> int:
        """How many of a row's volumes have a figure."""
        return sum(figure in curve.figures for curve in self.curves[name])

    def at(self, name: str, rate: float, figure: str, contrast: str | None = None) -> Spread:
        """A row's figure at a rate, of one contrast or of all."""
        curves = [c for c in self.curves.get(name, []) if contrast in (None, c.contrast)]
        return Spread.of([curve.at(rate, figure) for curve in curves], [curve.patient for curve in curves])

    def delta(self, name: str, anchor: str, figure: Figure) -> Spread:
        """A row's delta rate against another, in percent."""
        others = {(c.case, c.contrast): c for c in self.curves.get(anchor, [])}
        pairs = [(others.get((c.case, c.contrast)), c) for c in self.curves.get(name, [])]
        up = figure.higher_is_better is not False
        values = [math.nan if a is None else delta_rate(a, c, figure.name, higher_is_better=up) for a, c in pairs]
        return Spread.of(values, [c.patient for _, c in pairs])

    def points(self) -> dict[str, list[dict[str, Any]]]:
        """By name of a row its settings with a lossy result: mean rate and the spread of each figure over volumes."""
        found: dict[str, list[dict[str, Any]]] = {}
        for name in self.curves:
            by_setting: dict[float, list[Mapping[str, Any]]] = {}
            for record in self.own[name]:
                if record not in self.lossless[name]:
                    by_setting.setdefault(record["setting"], []).append(record)
            most = max(map(len, by_setting.values()))
            points = []
            for setting, own in by_setting.items():
                if len(own) < most:  # of fewer volumes, which a line must not join to the others
                    continue
                patients = [record["patient"] for record in own]
                rate = Spread.of([8 * r["bytes"] / r["voxels"] for r in own], patients)
                figures = {
                    f.name: Spread.of([r["figures"].get(f.name, math.nan) for r in own], patients)
                    for f in FIGURES
                    if self.has(f.name)
                }
                points.append({"setting": setting, "rate": rate, "figures": figures})
            found[name] = sorted(points, key=lambda point: point["rate"].mean)
        return found

    def speed(self, name: str) -> tuple[float, float]:
        """Million voxels a second of encoding and of decoding, over all lossy records."""
        own = [record for record in self.own[name] if record not in self.lossless[name]] or self.own[name]
        voxels = sum(record["voxels"] for record in own) / 1e6
        times = [sum(record[f"{way}_seconds"] for record in own) for way in ("encode", "decode")]
        return voxels / max(times[0], 1e-9), voxels / max(times[1], 1e-9)

    def markdown(self) -> str:
        """The tables, and what has to be known to read them."""
        patients = len({record["patient"] for record in self.records})
        lines = [f"# Rate against distortion: {self.study.label}", ""]
        lines += [
            f"{patients} patients of the split {self.study.split}, contrasts {', '.join(self.contrasts)}, "
            f"{len(self.records)} records. Rates are bits a voxel of the whole grid; figures are read off each "
            "volume's curve by a monotone cubic over the logarithm of the rate and then averaged. In [ ] stands the "
            "95 % interval over patients (bootstrap), in ( ) the number of volumes where it is not all of them; a dash "
            "is a rate that the settings reached on half of them or fewer, or a BD-rate that no more of them have.",
            "",
        ]
        for figure in FIGURES:
            if self.has(figure.name):
                lines += self._by_rate(figure)
        lines += self._deltas() + self._times()
        lines += [f"- {note}" for note in self._notes()]
        return "\n".join(lines) + "\n"

    def _by_rate(self, figure: Figure) -> list[str]:
        arrow = {True: " ↑", False: " ↓", None: ""}[figure.higher_is_better]
        head = [f"## {figure.title}{arrow}", "", f"{figure.convention[:1].upper()}{figure.convention[1:]}.", ""]
        split = self.contrasts if figure.name == "psnr_brain" and len(self.contrasts) > 1 else []
        columns = ["row", *(f"{rate:g}" for rate in self.study.rates)]
        if split:
            head += [f"In each cell {' / '.join(split)}, then the interval over patients of both.", ""]
        lines = [*head, f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * len(self.study.rates)}"]
        for name in self.curves:
            cells = [self._cell(name, rate, figure, split) for rate in self.study.rates]
            lines.append(f"| {self.titles[name]} | {' | '.join(cells)} |")
        return [*lines, ""]

    def _cell(self, name: str, rate: float, figure: Figure, split: Sequence[str]) -> str:
        whole = self.at(name, rate, figure.name)
        total = self.volumes(name, figure.name)
        if whole.n <= total / 2:  # a mean over the few that are cheap, or dear, would mislead
            return "–"
        parts = [self.at(name, rate, figure.name, contrast) for contrast in split] or [whole]
        text = " / ".join("–" if not part.n else figure.show(part.mean) for part in parts)
        if not math.isnan(whole.low):
            text += f" [{figure.show(whole.low)}, {figure.show(whole.high)}]"
        return text if whole.n == total else f"{text} ({whole.n} of {total})"

    def _deltas(self) -> list[str]:
        lines: list[str] = []
        figures = [_KNOWN[name] for name in _COMPARED if self.has(name)]
        for anchor in self.study.anchors:
            if anchor not in self.curves:
                continue
            lines += [
                f"## BD-rate against {self.titles[anchor]}",
                "",
                "Percent more (+) or fewer (−) bytes for the same figure, over the range that both reach, of the "
                "volumes where that is at least a quarter of the anchor's; a dash where those are half or fewer.",
                "",
                f"| row | {' | '.join(f.title for f in figures)} |",
                f"| --- |{' ---: |' * len(figures)}",
            ]
            for name in self.curves:
                if name != anchor:
                    found = [(self.delta(name, anchor, f), self.volumes(name, f.name)) for f in figures]
                    cells = [_percent(spread, total) for spread, total in found]
                    lines.append(f"| {self.titles[name]} | {' | '.join(cells)} |")
            lines.append("")
        return lines

    def _times(self) -> list[str]:
        lines = [
            "## Time and loss-free size",
            "",
            "Of one core, in processor time, over all lossy settings; what a program needs to start is counted.",
            "",
            "| row | encoding, million voxels/s | decoding, million voxels/s | lossless, bits a voxel |",
            "| --- | ---: | ---: | ---: |",
        ]
        for name in self.own:
            own = self.lossless[name]
            size = Spread.of([8 * r["bytes"] / r["voxels"] for r in own], [r["patient"] for r in own])
            encode, decode = self.speed(name)
            shown = f"{size.mean:.3f}" if size.n else "–"
            lines.append(f"| {self.titles[name]} | {encode:.1f} | {decode:.1f} | {shown} |")
        return [*lines, ""]

    def _notes(self) -> list[str]:
        background = {
            "decoded": "The background is judged as it comes back. Files of tokenizers have the exact mask of the "
            "background in their bytes; classical codecs are charged for none.",
            "masked": "The background of every row is set to 0 by the mask, whose bytes are counted in every row.",
        }[self.study.background]
        shown = self.study.perceptual
        sees = [] if shown is None else [f"LPIPS-style: {shown.network}, {shown.slices} slices of each volume."]
        if self.study.slices is not None:
            sees.append(f"SSIM: {self.study.slices} slices of each volume.")
        sees += [
            f"{row.title}: a decoder needs {row.shipped / 1e6:.1f} MB of weights besides, once; they are in no rate."
            for row in self.rows
            if row.shipped
        ]
        blank = "Slices that hold nothing cost one bit each; sizes are those of the bare streams or files together."
        return [background, blank, *sees, *self.study.notes]

    def csv(self) -> str:
        """All records, a line each."""
        names = [figure.name for figure in FIGURES if self.has(figure.name)]
        plain = ["row", "setting", "patient", "case", "contrast", "voxels", "brain_voxels", "bytes"]
        times = ["encode_seconds", "decode_seconds"]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*plain, "bits_per_voxel", *times, *names])
        for record in self.records:
            figures = [f"{record['figures'][name]:.6g}" if name in record["figures"] else "" for name in names]
            rate = f"{8 * record['bytes'] / record['voxels']:.6f}"
            writer.writerow([*(record[n] for n in plain), rate, *(record[n] for n in times), *figures])
        return text.getvalue()

    def to_json(self) -> dict[str, Any]:
        """Everything, for another program."""
        figures = [figure for figure in FIGURES if self.has(figure.name)]
        rows = {}
        for row in self.rows:
            encode, decode = self.speed(row.name)
            rows[row.name] = {
                "title": row.title,
                "slices_alone": row.slices_alone,
                "made_of": dict(row.made_of()),
                "shipped_once_bytes": row.shipped,
                "records": len(self.own[row.name]),
                "million_voxels_per_second": {"encode": round(encode, 2), "decode": round(decode, 2)},
                "at": {
                    figure.name: {
                        f"{rate:g}": {
                            contrast or "all": self.at(row.name, rate, figure.name, contrast or None).to_json()
                            for contrast in ["", *self.contrasts]
                        }
                        for rate in self.study.rates
                    }
                    for figure in figures
                },
                "bd_rate": {
                    anchor: {
                        figure.name: self.delta(row.name, anchor, figure).to_json()
                        for figure in figures
                        if figure.name in _COMPARED
                    }
                    for anchor in self.study.anchors
                    if anchor != row.name and anchor in self.curves
                },
            }
        return {
            "study": self.study.model_dump(mode="json", exclude_defaults=True),
            "command": f"vaevq-med rate-distortion {self.study.label}.yaml",
            "patients": sorted({record["patient"] for record in self.records}),
            "conventions": {figure.name: figure.convention for figure in figures},
            "notes": self._notes(),
            **machine(),
            "rows": rows,
        }


def _percent(found: Spread, total: int) -> str:
    if found.n <= total / 2:
        return "–"
    text = f"{found.mean:+.0f}"
    if not math.isnan(found.low):
        text += f" [{found.low:+.0f}, {found.high:+.0f}]"
    return text if found.n == total else f"{text} ({found.n} of {total})"


def machine() -> dict[str, Any]:
    """What figures and times were made on, for a record."""
    return {
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("torch", "numpy")},
    }


def _processor() -> str:
    """The name of the processor, where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
