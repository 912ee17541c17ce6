"""What ``vaevq-med prefixes`` tells: a table, a figure and lines for a reader."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vaevq_med.metrics.figures import Figure
from vaevq_med.metrics.reconstruction import PSNR, SSIM
from vaevq_med.study.rates.curves import Spread
from vaevq_med.study.rates.picture import draw_curves

METRICS = (PSNR(), SSIM())
"""What is judged, each image by itself."""
REGION = "brain"
"""The region that is judged by itself, where the images have it."""


def figures_of(rows: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """The figures of whole images, and after each that of the region where every tokenizer has it."""
    found = []
    for figure in (metric.figure for metric in METRICS):
        found.append(figure)
        name = f"{figure.name}_{REGION}"
        if all(name in point["figures"] for row in rows for point in row["points"]):
            found.append(
                Figure(name, f"{figure.title}, {REGION}", figure.digits, higher_is_better=figure.higher_is_better)
            )
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each tokenizer and number of parts."""
    text = io.StringIO()
    figures = [figure.name for figure in figures_of(rows)]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["tokenizer", "parts", "of", "bits", "bits_per_pixel", *figures])
    for row in rows:
        for point in row["points"]:
            means = [point["figures"][name]["mean"] for name in figures]
            writer.writerow(
                [row["name"], point["parts"], row["num_prefixes"], point["bits"], point["bits_per_pixel"], *means]
            )
    return text.getvalue()


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The figures over bits a pixel, or over the share of the code where one of the tokenizers has no bits."""
    counted = all(point["bits_per_pixel"] is not None for row in rows for point in row["points"])

    def at(row: Mapping[str, Any], point: Mapping[str, Any]) -> Spread:
        rate = point["bits_per_pixel"] if counted else point["parts"] / row["num_prefixes"]
        return Spread(rate, math.nan, math.nan, 1)

    def spread(values: Mapping[str, Any]) -> Spread:
        mean, low, high = (math.nan if values[name] is None else values[name] for name in ("mean", "low", "high"))
        return Spread(mean, low, high, values["n"])

    lines = [
        (
            row["name"],
            [
                {"rate": at(row, point), "figures": {name: spread(one) for name, one in point["figures"].items()}}
                for point in row["points"]
            ],
        )
        for row in rows
    ]
    along = "bits a pixel" if counted else "share of the code"
    draw_curves(lines, figures_of(rows), path, along=along, scale="log" if counted else "linear")


def lines(record: Mapping[str, Any]) -> Iterator[str]:
    """A line for each tokenizer and number of parts, for a reader."""
    figures = [Figure.of(one) for one in record["figures"]]
    for row in record["tokenizers"]:
        yield f"{row['name']}: {row['quantizer']}, a code of {_parts(row['num_prefixes'])}, {row['images']} images"
        for point in row["points"]:
            rate = "" if point["bits"] is None else f", {point['bits']:,.0f} bits a picture"
            shown = ", ".join(f"{f.title} {_shown(f, point['figures'][f.name]['mean'])}" for f in figures)
            yield f"  {point['parts']}{rate}: {shown}"


def _shown(figure: Figure, value: float | None) -> str:
    return "–" if value is None else figure.show(value)


def _parts(count: int) -> str:
    return "1 part" if count == 1 else f"{count} parts"
