"""A method's figures over its seeds: means, spreads and intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vaevq_med.core.intervals import bootstrap_interval
from vaevq_med.metrics.figures import Figure
from vaevq_med.study.methods import Method
from vaevq_med.study.rows import RowResult
from vaevq_med.study.statistics import Images, mean_and_spread, over_seeds


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        mean: over the seeds.
        std: sample standard deviation over the seeds, NaN for one seed.
        low: lower end of the bootstrap interval, NaN where the figure is no mean over images.
        high: upper end.
    """

    mean: float
    std: float = math.nan
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class MethodResult:
    """A row of the table.

    Attributes:
        method: which.
        seeds: seeds that finished.
        figures: by name.
        images: its per-image figures, averaged over the seeds.
        is_discrete: whether what was decoded is given by indices; otherwise it is shown, but never the best.
    """

    method: Method
    seeds: tuple[int, ...]
    figures: Mapping[str, Cell]
    images: Images
    is_discrete: bool = True


def summarize(results: Sequence[RowResult], columns: Sequence[Figure], per_image: Sequence[Figure]) -> MethodResult:
    """Put the seeds of one method together.

    Args:
        results: its finished rows, at least one.
        columns: figures to look for.
        per_image: those of which each image has one.
    """
    images = over_seeds([result.images for result in results], [figure.name for figure in per_image])
    unit_of = images.units()[1]
    figures = {}
    for column in columns:
        values = [value for result in results if (value := result.value(column.name)) is not None]
        if not values:
            continue
        low, high = math.nan, math.nan
        if column.name in images.values:
            low, high = bootstrap_interval(images.values[column.name], unit_of)
        mean, std = mean_and_spread(values)
        figures[column.name] = Cell(mean, std if column.varies else math.nan, low, high)
    seeds = tuple(result.row.seed for result in results)
    return MethodResult(results[0].row.method, seeds, figures, images, results[0].is_discrete)
