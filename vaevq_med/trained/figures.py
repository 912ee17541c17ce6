"""The figures of an evaluation that a packed bundle tells of, with intervals where those of each image are at hand."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.intervals import LEVEL, bootstrap_interval, independent_units


@dataclass(frozen=True)
class Measured:
    """One figure.

    Attributes:
        name: as the record has it.
        title: for readers.
        value: over the split.
        n: images.
        low: lower end of the 95 % interval; NaN where there is none.
        high: upper end.
        unit: what was drawn for it, ``patients`` or ``images``.
    """

    name: str
    title: str
    value: float
    n: int
    low: float = math.nan
    high: float = math.nan
    unit: str = ""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation recorded.

    Attributes:
        figures: of the whole split.
        provenance: of which weights, data and feature networks.
        conventions: how each figure is computed, in words.
    """

    figures: Sequence[Measured]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    conventions: Mapping[str, str] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """What intervals are over; empty where there are none."""
        return next((figure.unit for figure in self.figures if figure.unit), "")

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """From a ``metrics.json``, and from ``per_image.csv`` beside it where that is there.

        Raises:
            VaevqMedError: it is no record of an evaluation.
        """
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            overall = record["summary"]["overall"]
            values = {
                str(name): (float(entry["value"]), int(entry["n"]))
                for name, entry in overall.items()
                if entry["value"] is not None
            }
            told = {str(one["name"]): str(one["title"]) for one in record.get("figures", ())}
            provenance, conventions = dict(record.get("provenance", {})), dict(record.get("conventions", {}))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise VaevqMedError(
                f"metrics {path}: found no evaluation's record ({error}), expected a metrics.json"
            ) from None
        rows = _rows(path.with_name("per_image.csv"))
        figures = [
            Measured(name, told.get(name, name), value, n, *_interval(rows, name, value))
            for name, (value, n) in values.items()
        ]
        return cls(figures, provenance, conventions)

    def check_of(self, sha256: str, weights: str, where: Path) -> None:
        """Refuse figures of other weights.

        Args:
            sha256: of the checkpoint.
            weights: ``ema`` or ``network``.
            where: the record, for the message.

        Raises:
            VaevqMedError: the record is of another checkpoint, or of its other weights.
        """
        for name, expected in (("checkpoint_sha256", sha256), ("weights", weights)):
            found = self.provenance.get(name)
            if found is not None and found != expected:
                raise VaevqMedError(
                    f"metrics {where}: found figures of the {name} {str(found)[:16]}, expected {expected[:16]}, which "
                    "is packed; evaluate this checkpoint"
                )


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error):
        return []


def _interval(rows: Sequence[Mapping[str, str]], name: str, value: float) -> tuple[float, float, str]:
    """The interval of a figure that is the mean of the rows' own; NaN of another."""
    try:
        found = np.array([float(row[name] or "nan") for row in rows])
    except (KeyError, ValueError, TypeError):
        return math.nan, math.nan, ""
    kept = np.isfinite(found)
    if not kept.any() or not math.isclose(float(found[kept].mean()), value, rel_tol=1e-4, abs_tol=1e-9):
        return math.nan, math.nan, ""
    patients = [row.get("patient") or "" for row, keep in zip(rows, kept, strict=True) if keep]
    unit, units = independent_units(patients)
    low, high = bootstrap_interval(found[kept], units, level=LEVEL)
    return low, high, unit if low == low else ""
