"""The record of an evaluation: summary, rows an image, provenance; as JSON and CSV."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from vaevq_med.core.files import atomic_write_text, atomic_writer

Summary = dict[str, dict[str, float]]


@dataclass(frozen=True)
class EvaluationReport:
    """What an evaluation found.

    Attributes:
        summary: ``overall`` (name to ``value``, ``std``, ``n``), ``modality`` and ``region`` (name to such a table).
        per_image: one row an image, in the data set's order.
        usage_counts: int64 ``[G, K]``, how often each codeword was used.
        provenance: checkpoint, split, feature networks and their weights.
        conventions: how each figure is defined, in words.
        figures: of the metrics of single images, what a table has to know (``metrics.figures.Figure``).
    """

    summary: Mapping[str, Any]
    per_image: Sequence[Mapping[str, Any]]
    usage_counts: Tensor
    provenance: Mapping[str, Any] = field(default_factory=dict)
    conventions: Mapping[str, str] = field(default_factory=dict)
    figures: Sequence[Mapping[str, Any]] = ()

    def overall(self) -> dict[str, float]:
        """Flat figures for logging: ``psnr``, ``utilization``, ``psnr_t1n``, ``ssim_whole_tumor``, ..."""
        flat = {name: entry["value"] for name, entry in self.summary["overall"].items()}
        for scope in ("modality", "region"):
            for group, table in self.summary.get(scope, {}).items():
                flat |= {f"{name}_{group}": entry["value"] for name, entry in table.items()}
        return {name: value for name, value in flat.items() if value == value}

    def save(self, directory: Path, *, beside: Sequence[str] = ()) -> None:
        """Write ``metrics.json``, ``metrics.csv`` (a line a figure) and ``per_image.csv`` in place of earlier ones.

        All three are written before anything is replaced, and ``metrics.json`` takes its place last, so that it never
        stands beside rows of another evaluation.

        Args:
            directory: where they go.
            beside: names of files that belong to an earlier record and are removed with it.
        """
        partial = directory / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            self._write(partial)
            for name in ("metrics.json", *beside):
                (directory / name).unlink(missing_ok=True)
            for name in ("per_image.csv", "metrics.csv", "metrics.json"):
                os.replace(partial / name, directory / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _write(self, directory: Path) -> None:
        record = {
            "summary": self.summary,
            "provenance": dict(self.provenance),
            "conventions": dict(self.conventions),
            "figures": list(self.figures),
        }
        atomic_write_text(directory / "metrics.json", json.dumps(_clean(record), indent=2) + "\n")
        with atomic_writer(directory / "metrics.csv") as file:
            self._write_metrics(file)
        with atomic_writer(directory / "per_image.csv") as file:
            self._write_rows(file)

    def _write_metrics(self, file: TextIO) -> None:
        writer = csv.writer(file)
        writer.writerow(
            [
                *("scope", "group", "metric", "value", "std", "n"),
                *("feature_network", "weights_sha256", "split_hash", "checkpoint_sha256"),
            ]
        )
        roles = {"lpips": "lpips", "rfid": "fid"}
        tables = [("overall", "all", self.summary["overall"])]
        for scope in ("modality", "region"):
            tables += [(scope, group, table) for group, table in self.summary.get(scope, {}).items()]
        for scope, group, table in tables:
            for name, entry in table.items():
                role = roles.get(name, "none")
                fields = (f"{role}_network", f"{role}_weights_sha256", "split_hash", "checkpoint_sha256")
                shared = [self.provenance.get(field, "") for field in fields]
                writer.writerow([scope, group, name, entry["value"], entry.get("std", ""), entry["n"], *shared])

    def _write_rows(self, file: TextIO) -> None:
        names = list(dict.fromkeys(name for row in self.per_image for name in row))
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(self.per_image)


def _clean(value: Any) -> Any:
    """NaN has no place in JSON: None instead."""
    if isinstance(value, Mapping):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return None if isinstance(value, float) and value != value else value
