"""What a study of downstream tasks found: one table, detectability, rank correlations, the figures, and all records."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vaevq_med.core.files import atomic_write_text
from vaevq_med.metrics.figures import Figure
from vaevq_med.metrics.preservation import SIZES
from vaevq_med.study.rates.candidates import Candidate
from vaevq_med.study.rates.curves import Spread
from vaevq_med.study.rates.picture import draw_curves
from vaevq_med.study.rates.report import machine
from vaevq_med.study.statistics import RankCorrelation, rank_correlation
from vaevq_med.study.tasks.figures import BYTES, CHEAP, EXPENSIVE, FIGURES, SHORT
from vaevq_med.study.tasks.file import TasksStudy
from vaevq_med.study.tasks.points import RELIABLE, Point, of_case
from vaevq_med.study.tasks.rows import ORIGINAL
from vaevq_med.tasks.detectability import DETECTED
from vaevq_med.tasks.radiomics import Reproducibility

Records = Sequence[Mapping[str, Any]]


def write_report(
    study: TasksStudy,
    rows: Sequence[Candidate],
    records: Records,
    *,
    asked: Sequence[str] = (),
    remarks: Sequence[str] = (),
    edges: tuple[float, float] | None = None,
) -> tuple[list[Path], str]:
    """Write ``table.md``, ``records.csv``, ``results.json``, ``dice.png`` and ``detectability.png``.

    Args:
        study: as its file says.
        rows: what was compared, the originals first.
        records: those that are there.
        asked: names of all cases of the study.
        remarks: what else a reader has to know.
        edges: where small lesions end and large ones begin, in ml.

    Returns:
        The files, and the tables as Markdown.
    """
    report = Report(study, rows, records, asked=asked, remarks=remarks, edges=edges)
    table = report.markdown()
    texts = {
        "table.md": table,
        "records.csv": report.csv(),
        "results.json": json.dumps(report.to_json(), indent=1) + "\n",
    }
    files = []
    for name, text in texts.items():
        atomic_write_text(study.output / name, text)
        files.append(study.output / name)
    return [*files, *report.draw()], table


class Report:
    """The records of a study, by row and setting.

    Args:
        study: as its file says.
        rows: what was compared, the originals first.
        records: those that are there.
        asked: names of all cases of the study.
        remarks: what else a reader has to know.
        edges: where small lesions end and large ones begin, in ml.
    """

    def __init__(
        self,
        study: TasksStudy,
        rows: Sequence[Candidate],
        records: Records,
        *,
        asked: Sequence[str] = (),
        remarks: Sequence[str] = (),
        edges: tuple[float, float] | None = None,
    ) -> None:
        self.study, self.records, self.remarks, self.edges = study, records, remarks, edges
        self.cases = sorted({record["case"] for record in records})
        self.absent = sorted({*asked} - {*self.cases})
        originals = {record["case"]: record for record in records if record["row"] == ORIGINAL}
        self.points: list[Point] = []
        for row in rows:
            settings = sorted({record["setting"] for record in records if record["row"] == row.name})
            for setting in settings:
                own = {r["case"]: r for r in records if r["row"] == row.name and r["setting"] == setting}
                title = row.title if len(settings) == 1 else f"{row.title} @ {setting:g}"
                self.points.append(Point(row, setting, title, own, originals, edges))
        self.figures = [f for f in FIGURES if any(point.spread(f.name).n for point in self.points)]

    def has(self, figure: str) -> bool:
        """Whether some point has a figure."""
        return any(figure == known.name for known in self.figures)

    def whole(self, point: Point) -> bool:
        """Whether a point is of all cases, so that it compares with the others."""
        return len(point.records) == len(self.cases)

    def ranks(self) -> dict[str, dict[str, RankCorrelation]]:
        """By cheap and expensive figure, how far they rank the coded points alike.

        Both are turned so that more is better. The originals, which are best by definition, are left out, and so are
        points that lack a case.
        """
        coded = [point for point in self.points if point.row.name != ORIGINAL and self.whole(point)]

        def values(figure: Figure) -> list[float]:
            return [point.spread(figure.name).mean * (-1 if figure.higher_is_better is False else 1) for point in coded]

        judged = [figure for figure in EXPENSIVE if figure.higher_is_better is not None and self.has(figure.name)]
        return {
            cheap.name: {figure.name: rank_correlation(values(cheap), values(figure)) for figure in judged}
            for cheap in (BYTES, *CHEAP)
            if self.has(cheap.name) and judged
        }

    def markdown(self) -> str:
        """The tables, and what has to be known to read them."""
        patients = {record["patient"] for record in self.records}
        lines = [
            f"# What is left for a diagnosis: {self.study.label}",
            "",
            f"{len(self.cases)} cases of {len(patients)} patients of the split {self.study.split}, contrasts "
            f"{', '.join(self.study.contrasts)}. In [ ] stands the 95 % interval over patients (bootstrap), in ( ) the "
            "number of cases where it is not all of them.",
            "",
            *self._table(),
            *self._detectability(),
            *self._ranks(),
            *(f"- {note}" for note in self._notes()),
        ]
        return "\n".join(lines) + "\n"

    def _table(self) -> list[str]:
        arrows = {True: " ↑", False: " ↓", None: ""}
        titles = [f"{figure.title}{arrows[figure.higher_is_better]}" for figure in self.figures]
        lines = [f"| row | {' | '.join(titles)} |", f"| --- |{' ---: |' * len(titles)}"]
        for point in self.points:
            lines.append(f"| {point.title} | {' | '.join(self._cell(point, figure) for figure in self.figures)} |")
        return [*lines, ""]

    def _cell(self, point: Point, figure: Figure) -> str:
        found = point.spread(figure.name)
        if not found.n:
            return "–"
        text = figure.show(found.mean)
        if not math.isnan(found.low):
            text += f" [{figure.show(found.low)}, {figure.show(found.high)}]"
        if figure.name == "icc_shape_share":
            text += ", {} of {} regions".format(*point.pairs)
        return text if found.n == len(self.cases) else f"{text} ({found.n})"

    def _detectability(self) -> list[str]:
        asked = self.study.detectability
        if asked is None or not any(point.detections for point in self.points):
            return []
        diameters = sorted(asked.diameters)
        sizes = ", ".join(f"{diameter:g}" for diameter in diameters)
        lines = [
            f"## Synthetic lesions in {asked.contrast}",
            "",
            f"Area under the ROC curve for diameters of {sizes} mm; then the smallest diameter from which on it is "
            f"{DETECTED:g} or more. A strength is what is added, as a share of the window.",
            "",
        ]
        strengths = sorted(asked.strengths)
        titles = [title for s in strengths for title in (f"strength {s:g}", "smallest (mm)")]
        lines += [f"| row | {' | '.join(titles)} |", f"| --- |{' ---: |' * len(titles)}"]
        for point in self.points:
            if not point.detections:
                continue
            cells = []
            for strength in strengths:
                areas = [point.detections.get((strength, diameter)) for diameter in diameters]
                cells.append(" / ".join("–" if found is None else f"{found.auc:.2f}" for found in areas))
                smallest = point.smallest(strength)
                cells.append("none" if smallest is None else f"{smallest:g}")
            lines.append(f"| {point.title} | {' | '.join(cells)} |")
        return [*lines, ""]

    def _ranks(self) -> list[str]:
        ranks = self.ranks()
        known = {figure.name: figure.title for figure in FIGURES}
        if not any(found.n >= 3 for row in ranks.values() for found in row.values()):
            return []
        columns = list(next(iter(ranks.values())))
        lines = [
            "## Which cheap figure predicts the expensive one?",
            "",
            "Spearman's rank correlation over rows and settings, both turned so that more is better; in ( ) the "
            "p-value over permutations. Settings of one row are not independent, so that it is too small.",
            "",
            f"| figure | {' | '.join(known[name] for name in columns)} |",
            f"| --- |{' ---: |' * len(columns)}",
        ]
        for name, row in ranks.items():
            cells = ["–" if math.isnan(f.rho) else f"{f.rho:+.2f} ({f.p_value:.2g})" for f in row.values()]
            lines.append(f"| {known[name]} | {' | '.join(cells)} |")
        count = max(found.n for row in ranks.values() for found in row.values())
        return [*lines, "", f"Of {count} points.", ""]

    def _notes(self) -> list[str]:
        regions = {record["case"]: record["regions"] for record in self.records}
        without = [case for case, own in regions.items() if own is None]
        notes = []
        if self.absent:
            notes.append(
                f"{len(self.absent)} of {len(self.absent) + len(self.cases)} cases have no record, as they could not "
                f"be read or coded: {', '.join(self.absent)}. They are in no figure."
            )
        if without:
            notes.append(
                f"{len(without)} of {len(regions)} cases have no segmentation: {', '.join(without)}. They are in no "
                "figure of regions and of lesions."
            )
        for region, short in SHORT.items():
            empty = [case for case, own in regions.items() if own is not None and not own[region]]
            if empty:
                notes.append(
                    f"{short} is empty in {len(empty)} of {len(regions)} cases ({', '.join(empty)}), which have no "
                    "radiomics of it; Dice is 1 where "
                    "none is found and 0 otherwise."
                )
        if self.study.segmenter is None:
            notes.append("No segmentation network was given: there are no figures of segmentation.")
        notes += [
            f"{point.title}: of {len(point.records)} of {len(self.cases)} cases; it is left out of figures and ranks."
            for point in self.points
            if not self.whole(point)
        ]
        counted = next((point for point in self.points if point.row.name == ORIGINAL and point.lesions), None)
        if self.edges is not None and counted is not None:
            numbers = ", ".join(f"{there} {size}" for size, (_, there) in zip(SIZES, counted.lesions, strict=True))
            notes.append(
                f"Lesions by size: small to {self.edges[0]:.3g} ml, large above {self.edges[1]:.3g} ml; {numbers}."
            )
        first = next((point for point in self.points if point.features.correlations), None)
        if first is not None:
            found = first.features
            notes.append(
                f"Radiomics: {len(found.correlations)} features, {len(found.constant)} without a spread and "
                f"{len(found.rare)} of fewer than three cases left out ({first.title})."
            )
        notes += self._seen_notes()
        notes += [
            f"{row.title}: a decoder needs {row.shipped / 1e6:.1f} MB of weights besides, once."
            for row in {point.row.name: point.row for point in self.points}.values()
            if row.shipped
        ]
        notes += [f"{figure.title}: {figure.convention}." for figure in self.figures if figure.convention]
        return [*notes, *self.remarks, *self.study.notes]

    def _seen_notes(self) -> list[str]:
        """How many slices the network of the perceptual distance saw, and where that is not known."""
        asked, notes = self.study.perceptual, []
        if asked is None:
            return []
        seen = next((point.seen for point in self.points if self.whole(point) and point.seen.slices), None)
        if seen is not None:
            notes.append(
                f"rFID: {seen.slices:,} slices of the originals and as many of each row, which {asked.network} gives "
                f"{seen.num_features:,} features each."
            )
        without = [point.title for point in self.points if not point.seen.slices]
        if without:
            notes.append(
                f"rFID is left out of {', '.join(without)}: records that an earlier version made, or beside which the "
                "features are gone, have none. A record that is removed is made again with them."
            )
        return notes

    def draw(self) -> list[Path]:
        """Draw bytes against Dice, and detectability; what there is of them."""
        return [*self._draw_dice(), *self._draw_detectability()]

    def _draw_dice(self) -> list[Path]:
        panels = [figure for figure in EXPENSIVE if figure.name.startswith("dice_") and self.has(figure.name)]
        if not panels:
            return []
        lines: dict[str, tuple[str, list[dict[str, Any]]]] = {}
        levels = []
        for point in self.points:
            figures = {panel.name: point.spread(panel.name) for panel in panels}
            if point.row.name == ORIGINAL:
                levels.append((point.title, figures))
            elif self.whole(point):
                shown = {"rate": point.spread("bytes"), "figures": figures}
                lines.setdefault(point.row.name, (point.row.title, []))[1].append(shown)
        for _, points in lines.values():
            points.sort(key=lambda shown: shown["rate"].mean)
        path = self.study.output / "dice.png"
        draw_curves(list(lines.values()), panels, path, along="bytes a volume", levels=levels)
        return [path]

    def _draw_detectability(self) -> list[Path]:
        points = [point for point in self.points if point.detections and self.whole(point)]
        strengths = sorted({strength for point in points for strength, _ in point.detections})
        if not points:
            return []
        panels = [Figure(f"strength_{n}", f"AUC at a strength of {s:g}", 2) for n, s in enumerate(strengths)]
        lines = []
        for point in points:
            sizes: dict[float, dict[str, Spread]] = {}
            for (strength, diameter), found in point.detections.items():
                spread = Spread(found.auc, found.low, found.high, found.n)
                sizes.setdefault(diameter, {})[panels[strengths.index(strength)].name] = spread
            curve = [
                {"rate": Spread(diameter, math.nan, math.nan, 1), "figures": figures}
                for diameter, figures in sorted(sizes.items())
            ]
            lines.append((point.title, curve))
        path = self.study.output / "detectability.png"
        draw_curves(lines, panels, path, along="diameter (mm)", scale="linear")
        return [path]

    def csv(self) -> str:
        """The figures of all records, a line each."""
        rows = [of_case(record) for record in self.records]
        names = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["row", "setting", "patient", "case", *names])
        for record, row in zip(self.records, rows, strict=True):
            plain = [record[name] for name in ("row", "setting", "patient", "case")]
            writer.writerow([*plain, *(f"{row[name]:.6g}" if name in row else "" for name in names)])
        return text.getvalue()

    def to_json(self) -> dict[str, Any]:
        """Everything, for another program."""
        return {
            "study": self.study.model_dump(mode="json", exclude_defaults=True),
            "command": f"vaevq-med tasks {self.study.label}.yaml",
            "cases": self.cases,
            "patients": sorted({record["patient"] for record in self.records}),
            "conventions": {figure.name: figure.convention for figure in self.figures},
            "notes": self._notes(),
            **machine(),
            "points": [self._point(point) for point in self.points],
            "ranks": {
                cheap: {name: plain(vars(found)) for name, found in row.items()} for cheap, row in self.ranks().items()
            },
        }

    def _point(self, point: Point) -> dict[str, Any]:
        return {
            "row": point.row.name,
            "title": point.title,
            "setting": point.setting,
            "made_of": dict(point.row.made_of()),
            "cases": len(point.records),
            "figures": {figure.name: point.spread(figure.name).to_json() for figure in self.figures},
            "radiomics": _reproduced(point.features),
            "shapes": {**_reproduced(point.shapes), "regions": list(point.pairs)},
            "lesions_by_size": [list(counts) for counts in point.lesions],
            "detectability": [
                plain({"strength": strength, "diameter_mm": diameter, **vars(found)})
                for (strength, diameter), found in point.detections.items()
            ],
        }


def _reproduced(found: Reproducibility) -> dict[str, Any]:
    shares = {f"share_{kind}": found.share(RELIABLE, kind=kind) for kind in ("agreement", "consistency")}
    left_out = {"constant": len(found.constant), "rare": len(found.rare)}
    features = {"features": len(found.correlations) + len(found.lost), "lost": len(found.lost)}
    return plain({**features, **shares, **left_out})


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """With None for what is NaN.

    Example:
        >>> plain({"a": float("nan"), "b": 1})
        {'a': None, 'b': 1}
    """
    return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in values.items()}
