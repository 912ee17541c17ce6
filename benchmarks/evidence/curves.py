"""Curves of ``fine_tuning.yaml`` and ``kmeans_start.yaml``: quality over shares of patients, and over the first steps.

    python benchmarks/evidence/curves.py shares outputs/fine_tuning fine_tuning.png
    python benchmarks/evidence/curves.py steps sqlite:///kmeans_start.db kmeans_start.png

A line is a mean over seeds, a dot a seed. What is drawn is printed too, a row as a line of a table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from vaevq_med.evaluation.pictures import save_figure

Points = Mapping[tuple[str, float], list[float]]
"""The values of all seeds, by line and place along x."""
TITLES = {"psnr": "PSNR (dB)", "ssim": "SSIM", "utilization": "utilization"}


def of_shares(study: Path) -> Iterator[tuple[str, str, float, float]]:
    """Figure, start, share of the patients in percent and value of each row, whose name is ``START_PERCENT``."""
    for row in json.loads((study / "results.json").read_text())["rows"]:
        start, _, percent = row["method"].rpartition("_")
        for figure in ("psnr", "ssim"):
            yield figure, start, float(percent), float(row["metrics"][figure]["value"])


def of_steps(uri: str) -> Iterator[tuple[str, str, float, float]]:
    """Figure, method and start, step and value of each validation of each run."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id]):
            if "codebook_init" not in run.data.params:
                continue  # the run of a study, above those of its rows
            kind = run.data.params["network_def.quantizer._target_"].rpartition(".")[2]
            for figure in ("psnr", "utilization"):
                for point in client.get_metric_history(run.info.run_id, f"val/{figure}"):
                    yield figure, f"{kind}, {run.data.params['codebook_init']}", float(point.step), point.value


def draw(panels: Mapping[str, Points], along: str, path: Path) -> None:
    canvas = Figure(figsize=(5.2 * len(panels), 4.4), layout="constrained")
    for axis, (name, points) in zip(canvas.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for number, line in enumerate(dict.fromkeys(line for line, _ in points)):
            own = sorted((x, values) for (other, x), values in points.items() if other == line)
            style = "--" if line.endswith("random") else "-"
            axis.plot([x for x, _ in own], [np.mean(v) for _, v in own], style, color=f"C{number}", label=line)
            for x, values in own:
                axis.plot([x] * len(values), values, ".", color=f"C{number}", markersize=3)
        axis.set_xlabel(along)
        axis.set_ylabel(TITLES[name])
        axis.grid(alpha=0.3)
        handles, labels = axis.get_legend_handles_labels()  # the lines of all panels are the same
    canvas.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    save_figure(canvas, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("along", choices=["shares", "steps"])
    parser.add_argument("source", help="output folder of the study, or its MLflow store")
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    rows = of_shares(Path(arguments.source)) if arguments.along == "shares" else of_steps(arguments.source)
    panels: dict[str, dict[tuple[str, float], list[float]]] = {}
    for figure, line, x, value in rows:
        panels.setdefault(figure, {}).setdefault((line, x), []).append(value)
    words = "training patients (%)" if arguments.along == "shares" else "steps"
    print(f"| {words} | row | {' | '.join(TITLES[name] for name in panels)} | seeds |")
    print("| --- " * (3 + len(panels)) + "|")
    for line, x in sorted(next(iter(panels.values()))):
        values = [points[line, x] for points in panels.values()]
        print(f"| {x:g} | {line} | {' | '.join(f'{np.mean(one):.4g}' for one in values)} | {len(values[0])} |")
    draw(panels, words, arguments.picture)


if __name__ == "__main__":
    main()
