"""The curves of a study of rate against distortion, drawn: a panel a figure, a line a row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib import colormaps
from matplotlib.figure import Figure as Canvas

from vaevq_med.evaluation.pictures import save_figure
from vaevq_med.metrics.figures import Figure
from vaevq_med.study.rates.curves import Spread

_MARKERS = "osD^v<>pPXh*"


def draw_curves(
    rows: Sequence[tuple[str, Sequence[Mapping[str, Any]]]],
    figures: Sequence[Figure],
    path: Path,
    *,
    along: str = "bits a voxel",
    scale: Literal["log", "linear"] = "log",
    levels: Sequence[tuple[str, Mapping[str, Spread]]] = (),
) -> None:
    """Draw means over volumes, with intervals over patients.

    Args:
        rows: a title and points, each with ``rate`` and ``figures`` as spreads.
        figures: a panel each.
        path: PNG file to write, atomically.
        along: what ``rate`` is, at the foot of a panel.
        scale: of ``rate``.
        levels: a title and figures of what has no rate, a line across each panel with its interval as a band.
    """
    columns = min(4, 2 * len(figures))  # of the legend, as many as the width of the panels holds
    lines = math.ceil((len(rows) + len(levels)) / columns)
    canvas = Canvas(figsize=(5.2 * len(figures), 4.8 + 0.2 * lines), layout="constrained")
    panels = canvas.subplots(1, len(figures), squeeze=False)[0]
    colors = colormaps["tab20"].colors  # type: ignore[attr-defined]
    for panel, figure in zip(panels, figures, strict=True):
        for number, (title, points) in enumerate(rows):
            own = [(p["rate"].mean, p["figures"][figure.name]) for p in points if figure.name in p["figures"]]
            below = [spread.mean - min(spread.low, spread.mean) if spread.low == spread.low else 0 for _, spread in own]
            above = [
                max(spread.high, spread.mean) - spread.mean if spread.high == spread.high else 0 for _, spread in own
            ]
            panel.errorbar(
                [rate for rate, _ in own],
                [spread.mean for _, spread in own],
                yerr=[below, above],
                marker=_MARKERS[number % len(_MARKERS)],
                color=colors[number % len(colors)],
                markersize=4,
                linewidth=1.3,
                elinewidth=0.6,
                capsize=2,
                label=title,
            )
        for title, values in levels:
            spread = values.get(figure.name)
            if spread is not None and spread.n:
                panel.axhline(spread.mean, color="black", linestyle="--", linewidth=1, label=title)
                if not math.isnan(spread.low):
                    panel.axhspan(spread.low, spread.high, color="black", alpha=0.08, linewidth=0)
        panel.set_xscale(scale)
        panel.set_xlabel(along)
        panel.set_ylabel(figure.title)
        panel.grid(alpha=0.3, which="both")
    handles, labels = panels[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)
    save_figure(canvas, path)
