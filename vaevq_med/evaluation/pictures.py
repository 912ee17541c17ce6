"""Pictures of reconstructions and of codebook usage, by matplotlib without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from vaevq_med.core.files import atomic_binary_writer
from vaevq_med.metrics.reconstruction import psnr_per_image, to_unit

_ERROR_LIMIT = 0.25


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_binary_writer(path) as file:
        figure.savefig(file, dpi=100, format="png")


def reconstruction_grid(
    images: Tensor, quantized: Tensor, continuous: Tensor | None = None, *, labels: Sequence[str], path: Path
) -> None:
    """A grid with a row an image: original, continuous path, quantized path, error of the quantized path.

    Args:
        images: originals, ``[N, C, H, W]`` in [-1, 1].
        quantized: reconstructions through the codebook, of the same shape.
        continuous: reconstructions without it, or None, which leaves out the column.
        labels: a label a row.
        path: PNG file to write, atomically.
    """
    original, through = to_unit(images), to_unit(quantized)
    columns: list[tuple[str, Tensor, Tensor | None]] = [("original", original, None)]
    if continuous is not None:
        around = to_unit(continuous)
        columns.append(("continuous path", around, psnr_per_image(around, original)))
    columns.append(("quantized path", through, psnr_per_image(through, original)))
    count = images.shape[0]
    figure = Figure(figsize=(2.1 * (len(columns) + 1) + 1.6, 2.2 * count + 0.4), layout="constrained")
    axes = figure.subplots(count, len(columns) + 1, squeeze=False)
    shown = None
    for row in range(count):
        for column, (title, batch, psnr) in enumerate(columns):
            axis = axes[row, column]
            axis.imshow(_picture(batch[row]), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(title if psnr is None else f"{title}\n{float(psnr[row]):.1f} dB", fontsize=8)
        axes[row, 0].set_ylabel(labels[row], fontsize=7)
        error = (through[row] - original[row]).mean(dim=0).numpy()
        axis = axes[row, -1]
        shown = axis.imshow(error, cmap="RdBu_r", vmin=-_ERROR_LIMIT, vmax=_ERROR_LIMIT, interpolation="nearest")
        axis.set_title("error (quantized - original)", fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    if shown is not None:
        figure.colorbar(shown, ax=axes[:, -1].tolist(), shrink=0.8, label="share of the intensity range")
    save_figure(figure, path)


def comparison_grid(
    images: Tensor,
    reconstructions: Mapping[str, Tensor],
    *,
    titles: Mapping[str, str],
    labels: Sequence[str],
    path: Path,
) -> None:
    """A grid with a row an image and a column a method; below each row, the methods' error maps.

    Args:
        images: originals, ``[N, C, H, W]`` in [-1, 1].
        reconstructions: name of a method to its reconstructions, of the same shape.
        titles: what each method is called.
        labels: a label a row.
        path: PNG file to write, atomically.
    """
    original = to_unit(images)
    columns = {name: to_unit(batch) for name, batch in reconstructions.items()}
    count = images.shape[0]
    figure = Figure(figsize=(1.9 * (len(columns) + 1) + 1.3, 3.9 * count + 0.4), layout="constrained")
    axes = figure.subplots(2 * count, len(columns) + 1, squeeze=False)
    shown = None
    for row in range(count):
        above, below = axes[2 * row], axes[2 * row + 1]
        above[0].imshow(_picture(original[row]), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        above[0].set_title("original", fontsize=8)
        above[0].set_ylabel(labels[row], fontsize=7)
        below[0].set_frame_on(False)
        for column, (name, batch) in enumerate(columns.items(), start=1):
            psnr = float(psnr_per_image(batch[row : row + 1], original[row : row + 1]))
            above[column].imshow(_picture(batch[row]), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            above[column].set_title(f"{titles[name]}\n{psnr:.1f} dB", fontsize=8)
            error = (batch[row] - original[row]).mean(dim=0).numpy()
            shown = below[column].imshow(
                error, cmap="RdBu_r", vmin=-_ERROR_LIMIT, vmax=_ERROR_LIMIT, interpolation="nearest"
            )
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    if shown is not None:
        figure.colorbar(shown, ax=axes[:, -1].tolist(), shrink=0.5, label="error, share of the intensity range")
    save_figure(figure, path)


def neighbor_grid(columns: Mapping[str, Tensor], *, titles: Sequence[Sequence[str]], path: Path) -> None:
    """A grid with a row a generated image: the image, and beside it its nearest training images.

    Args:
        columns: heading to images ``[N, C, H, W]`` in [0, 1], the generated ones first.
        titles: of each row, a line over each of its images.
        path: PNG file to write, atomically.
    """
    count = len(titles)
    figure = Figure(figsize=(2.4 * len(columns), 2.9 * count))
    axes = figure.subplots(count, len(columns), squeeze=False)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=1 - 0.17 / count, wspace=0.04, hspace=0.25)
    for row, lines in enumerate(titles):
        for column, (heading, images) in enumerate(columns.items()):
            axis = axes[row, column]
            axis.imshow(_picture(images[row]), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(f"{heading}\n{lines[column]}", fontsize=7)
            axis.set_axis_off()
    save_figure(figure, path)


def _picture(image: Tensor) -> np.ndarray:
    array = image.cpu().numpy()
    return array.transpose(1, 2, 0) if array.shape[0] == 3 else array[0]


def usage_histogram(counts: Tensor, path: Path) -> None:
    """Codewords sorted by how often they were used, on a logarithmic scale.

    Args:
        counts: int64 ``[G, K]``.
        path: PNG file to write, atomically.
    """
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axis = figure.subplots()
    for codebook, row in enumerate(counts.cpu().numpy()):
        ordered = np.sort(row)[::-1]
        used = int((ordered > 0).sum())
        label = f"{used} of {len(ordered)} used ({100 * used / len(ordered):.1f} %)"
        prefix = f"codebook {codebook}: " if counts.shape[0] > 1 else ""
        axis.plot(np.arange(1, len(ordered) + 1), np.maximum(ordered, 0.5), label=prefix + label, linewidth=1.5)
    axis.set_yscale("log")
    axis.set_xlim(1, max(2, counts.shape[1]))
    axis.set_xlabel("codeword, by rank")
    axis.set_ylabel("times used (unused: 0.5)")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    save_figure(figure, path)
