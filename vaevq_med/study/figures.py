"""Pictures of a comparison: utilization bars, curves over K, reconstructions or generated images side by side."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from vaevq_med.core.components import trust
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.picks import evenly_spaced
from vaevq_med.evaluation.pictures import comparison_grid, save_figure
from vaevq_med.images.generated import LIST_NAME, find_samples
from vaevq_med.metrics import figures
from vaevq_med.study.generation import GenerationPlan
from vaevq_med.study.over_seeds import MethodResult
from vaevq_med.study.plan import Plan, Row
from vaevq_med.study.rows import RowResult
from vaevq_med.study.tables import Table

_SWEPT = (figures.UTILIZATION, figures.RFID, figures.PSNR)


def draw(plan: Plan, table: Table, results: Sequence[RowResult]) -> list[Path]:
    """Draw what a study's report shows beside its table; the files.

    Args:
        plan: what was compared.
        table: over the finished rows.
        results: these rows, at least one.
    """
    output, count = plan.study.output, plan.study.report.pictures
    first = {result.row.method.name: result.row for result in reversed(results)}
    rows = [first[method.name] for method in plan.methods if method.name in first]
    drawn = {}
    if isinstance(plan, GenerationPlan):
        if count:
            sample_grid(rows, [row.folder / "generated" for row in rows], count, output / "samples.png")
        drawn["samples.png"] = count > 0
    else:
        drawn["utilization.png"] = utilization_bars(table.methods, output / "utilization.png")
        drawn["sweep.png"] = sweep_curves(table.methods, output / "sweep.png")
        if count:
            reconstructions(rows, count, output / "reconstructions.png")
        drawn["reconstructions.png"] = count > 0
    return [output / name for name, there in drawn.items() if there]


def _spread(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def utilization_bars(methods: Sequence[MethodResult], path: Path) -> bool:
    """The paper's Figure 5: a bar a method, its height the utilization, a whisker the spread over seeds.

    Returns:
        Whether there was anything to draw.
    """
    shown = [m for m in methods if "utilization" in m.figures]
    if not shown:
        return False
    figure = Figure(figsize=(1.6 + 0.9 * len(shown), 3.6), layout="constrained")
    axis = figure.subplots()
    heights = [100 * m.figures["utilization"].mean for m in shown]
    spread = [100 * _spread(m.figures["utilization"].std) for m in shown]
    bars = axis.bar(range(len(shown)), heights, yerr=spread if any(spread) else None, capsize=3, color="#4c72b0")
    axis.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    axis.set_xticks(range(len(shown)), [m.method.title for m in shown], rotation=30, ha="right", fontsize=8)
    axis.set_ylabel("codebook utilization (%)")
    axis.set_ylim(0, 110)
    axis.grid(axis="y", alpha=0.3)
    save_figure(figure, path)
    return True


def sweep_curves(methods: Sequence[MethodResult], path: Path) -> bool:
    """The paper's Figure 7: utilization, rFID and PSNR over K, a line a method.

    Returns:
        Whether there was anything to draw.
    """
    points = [m for m in methods if m.method.num_embeddings is not None]
    shown = [column for column in _SWEPT if any(column.name in m.figures for m in points)]
    if not shown:
        return False
    figure = Figure(figsize=(4 * len(shown), 3.4), layout="constrained")
    for axis, column in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for family in dict.fromkeys(m.method.family for m in points):
            own = [m for m in points if m.method.family == family and column.name in m.figures]
            own.sort(key=lambda m: m.method.num_embeddings or 0)
            cells = [m.figures[column.name] for m in own]
            axis.errorbar(
                [m.method.num_embeddings for m in own],
                [column.scale * cell.mean for cell in cells],
                yerr=[column.scale * _spread(cell.std) for cell in cells],
                marker="o",
                capsize=3,
                label=own[0].method.title.rsplit(", K = ", 1)[0] if own else family,
            )
        axis.set_xscale("log", base=2)
        axis.set_xlabel("codewords K")
        axis.set_ylabel(column.title)
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    save_figure(figure, path)
    return True


def sample_grid(rows: Sequence[Row], generated: Sequence[Path], count: int, path: Path) -> None:
    """A row a method, a column a sample number: the same numbers, which are of the same labels, for all.

    Args:
        rows: a finished row of each method.
        generated: folder of each one's samples.
        count: samples of each.
        path: PNG file to write.
    """
    samples = [find_samples(folder)[:count] for folder in generated]
    columns = max(len(found) for found in samples)
    figure = Figure(figsize=(1.6 * columns + 1.4, 1.85 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, folder, found, line in zip(rows, generated, samples, axes, strict=True):
        with (folder / LIST_NAME).open(newline="", encoding="utf-8") as file:
            names = {entry["file"]: f"{entry['name']} {entry['number']}".strip() for entry in csv.DictReader(file)}
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])
        for axis, sample in zip(line, found, strict=False):
            with Image.open(folder / sample.name) as image:
                axis.imshow(np.asarray(image), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set_title(names.get(sample.name, sample.name), fontsize=7)
        line[0].set_ylabel(row.method.title.replace(", ", "\n"), fontsize=8)
    save_figure(figure, path)


def _of_shape(images: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Images of a tokenizer of other channels or another size as the first row's, to be seen beside them."""
    if images.shape[1] != shape[1]:
        images = images.mean(dim=1, keepdim=True).expand(-1, shape[1], *images.shape[2:])
    if images.shape[2:] != shape[2:]:
        images = torch.nn.functional.interpolate(images, size=shape[2:], mode="bilinear", antialias=True)
    return images


@torch.no_grad()
def reconstructions(rows: Sequence[Row], count: int, path: Path) -> None:
    """The paper's Figure 6: a row an image, a column a method, with error maps; evenly spaced images of the split.

    Args:
        rows: a finished row of each method.
        count: images.
        path: PNG file to write.
    """
    columns: dict[str, torch.Tensor] = {}
    images = torch.empty(0)
    labels: list[str] = []
    for row in rows:
        if not row.checkpoint.is_file():
            raise VaevqMedError(
                f"{row.checkpoint}: found no checkpoint to draw from; --pictures 0 leaves the figure out"
            )
        parser = row.parser("evaluating")
        trust(parser.get("trusted") or ())
        dataset = parser.get_parsed_content("dataset")
        items = [dataset[i] for i in evenly_spaced(len(dataset), count)]
        own = torch.stack([torch.as_tensor(item["image"]) for item in items])
        if not labels:
            images = own
            labels = [f"{item['modality']}\n{item['case'] or Path(item['path']).stem}" for item in items]
        network, device = parser.get_parsed_content("network"), parser.get_parsed_content("device")
        found = torch.cat([network(image[None].to(device)).float().cpu() for image in own])
        columns[row.method.name] = _of_shape(found, images.shape)
    titles = {row.method.name: row.method.title for row in rows}
    comparison_grid(images, columns, titles=titles, labels=labels, path=path)
