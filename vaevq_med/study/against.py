"""One method, the reference, minus each of its rivals: pair by pair of group and seed, and every seed by itself.

A group is a patient, or an image where the images name no patients. Averages over seeds hide how far one training
differs from the next; pairs of group and seed keep it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vaevq_med.core.intervals import LEVEL
from vaevq_med.metrics.figures import Figure
from vaevq_med.study.methods import Method
from vaevq_med.study.over_seeds import MethodResult
from vaevq_med.study.rows import RowResult
from vaevq_med.study.statistics import (
    Array,
    Images,
    check_same_images,
    over_seeds,
    sign_test,
    smallest_p_value,
    wilcoxon,
)


@dataclass(frozen=True)
class Paired:
    """A figure of the reference minus that of a rival, over pairs.

    Attributes:
        difference: mean over the pairs.
        better: pairs in which the reference is better.
        ties: pairs of equal values.
        n: pairs.
        p_value: two-sided.
    """

    difference: float
    better: int
    ties: int
    n: int
    p_value: float


@dataclass(frozen=True)
class Rival:
    """What the reference is set against.

    Attributes:
        method: which.
        seeds: that both have finished.
        pairs: by figure, over pairs of group and seed, with the p-value of the sign test.
        by_seed: by figure and seed, over the images of that seed, with Wilcoxon's; empty where there are patients.
        differences: of figures of a whole split, by figure and seed.
    """

    method: Method
    seeds: tuple[int, ...]
    pairs: Mapping[str, Paired]
    by_seed: Mapping[str, Mapping[int, Paired]]
    differences: Mapping[str, Mapping[int, float]]

    def record(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return {
            "name": self.method.name,
            "title": self.method.title,
            "seeds": list(self.seeds),
            "figures": {name: asdict(found) for name, found in self.pairs.items()},
            "by_seed": {
                name: {str(seed): asdict(found) for seed, found in seeds.items()}
                for name, seeds in self.by_seed.items()
            },
            "differences": {
                name: {str(seed): value for seed, value in seeds.items()} for name, seeds in self.differences.items()
            },
        }


@dataclass(frozen=True)
class Section:
    """A table under the table.

    Attributes:
        title: its heading.
        head: of the columns; the first ``num_names`` name a row.
        rows: cells.
        notes: sentences under it.
        num_names: columns of words.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    num_names: int = 2


@dataclass(frozen=True)
class Against:
    """The reference and its rivals.

    Attributes:
        reference: which method.
        unit: what a group is, ``patient`` or ``image``.
        num_groups: how many there are.
        rivals: every other method whose codes are discrete.
        figures: of which each image has one, and whose better way is known.
        whole: figures of a whole split.
        results: every row that finished, for the table in which the seeds stand apart.
        columns: of that table.
    """

    reference: Method
    unit: str
    num_groups: int
    rivals: tuple[Rival, ...]
    figures: tuple[Figure, ...]
    whole: tuple[Figure, ...]
    results: tuple[RowResult, ...]
    columns: tuple[Figure, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader has to know of the pairs."""
        return tuple(self._notes())

    def _notes(self) -> Iterator[str]:
        yield (
            f"Mean difference over the pairs of {self.unit} and seed that both have; in how many of them "
            f"{self.reference.title} is better; p of the two-sided sign test over them, equal pairs left out, "
            "corrected for nothing."
        )
        seeds = {seed for rival in self.rivals for seed in rival.seeds}
        yield from (f"{figure.title}: a difference a seed." for figure in self.whole if self._has(figure) and seeds)
        if not self.rivals:
            yield f"{self.reference.title}, the reference, has no rival whose codes are discrete."
            return
        single = [rival.method.title for rival in self.rivals if len(rival.seeds) == 1]
        if len(single) == len(self.rivals):
            yield "One seed: nothing is said of another training."
        elif single:
            yield f"Of one seed, so that nothing is said of another training: {', '.join(single)}."
        several = any(len(rival.seeds) > 1 for rival in self.rivals)
        if several and self.unit == "patient":
            yield (
                "Pairs of one patient are not independent, as its images are the same under every seed: p is too small."
            )
        elif several:
            yield (
                "Pairs of one image are not independent, nor are the images of one seed, which share one training: "
                "p is too small."
            )
        if self.unit == "patient" and self.num_groups == 1:
            yield "All images are of one patient: nothing is said of other patients."
        fewest = min((found.n - found.ties for rival in self.rivals for found in rival.pairs.values()), default=0)
        if fewest and smallest_p_value(fewest) >= LEVEL:
            pairs, least = f"{fewest} pair{'s' if fewest > 1 else ''}", smallest_p_value(fewest)
            yield f"{pairs}: too few for any p-value below {LEVEL}: the smallest possible is {least:.3g}."

    def _has(self, figure: Figure) -> bool:
        return any(figure.name in {**rival.pairs, **rival.differences} for rival in self.rivals)

    def sections(self) -> Iterator[Section]:
        """The tables, for a reader."""
        if self.rivals:
            yield self._minus_rivals()
        if any(rival.by_seed for rival in self.rivals):
            yield self._over_images()
        if len({result.row.seed for result in self.results}) > 1:
            yield self._seeds_apart()

    def _shown(self) -> list[Figure]:
        return [figure for figure in self.figures if self._has(figure)]

    def _minus_rivals(self) -> Section:
        shown, whole = self._shown(), [figure for figure in self.whole if self._has(figure)]
        return Section(
            f"{self.reference.title} minus each rival",
            ["Rival", "Seeds", *map(titled, (*shown, *whole))],
            [
                [
                    rival.method.title,
                    ", ".join(map(str, rival.seeds)) or "none in common",
                    *(_pairs(figure, rival.pairs.get(figure.name)) for figure in shown),
                    *(_each_seed(figure, rival) for figure in whole),
                ]
                for rival in self.rivals
            ],
            self.notes,
        )

    def _over_images(self) -> Section:
        shown = self._shown()
        return Section(
            f"{self.reference.title} minus each rival, over the images of each seed",
            ["Rival", "Seed", *map(titled, shown)],
            [
                [
                    rival.method.title,
                    str(seed),
                    *(_pairs(f, rival.by_seed.get(f.name, {}).get(seed)) for f in shown),
                ]
                for rival in self.rivals
                for seed in rival.seeds
            ],
            [
                "p of Wilcoxon's signed-rank test. Images of one seed share one training: "
                "p says nothing of the next one."
            ],
        )

    def _seeds_apart(self) -> Section:
        return Section(
            "Seeds apart",
            ["Method", "Seed", *map(titled, self.columns)],
            [
                [
                    result.row.method.title,
                    "–" if result.row.method.given else str(result.row.seed),
                    *(_shown(figure, result.value(figure.name)) for figure in self.columns),
                ]
                for result in self.results
            ],
        )

    def record(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return {
            "name": self.reference.name,
            "unit": f"{self.unit}s",
            "groups": self.num_groups,
            "rivals": [rival.record() for rival in self.rivals],
            "notes": list(self.notes),
        }


def titled(figure: Figure) -> str:
    """A figure's title with an arrow to where it is better."""
    return figure.title + {True: " ↑", False: " ↓", None: ""}[figure.higher_is_better]


def set_against(
    name: str,
    methods: Sequence[MethodResult],
    results: Sequence[RowResult],
    columns: Sequence[Figure],
    per_image: Sequence[Figure],
    whole: Sequence[Figure],
) -> Against | None:
    """Set one method against every other.

    Args:
        name: of the reference.
        methods: that have finished rows, in the table's order.
        results: these rows.
        columns: of the table, which alone are looked at.
        per_image: figures of which each image has one.
        whole: figures of a whole split, told seed by seed.

    Returns:
        None where the reference has no finished row, or its codes are not discrete.

    Raises:
        VaevqMedError: rows of one seed were not evaluated on the same images.
    """
    rows = {m.method.name: {r.row.seed: r for r in results if r.row.method.name == m.method.name} for m in methods}
    discrete = {method.method.name: method.method for method in methods if method.is_discrete}
    if name not in discrete:
        return None
    figures = tuple(f for f in per_image if f in columns and f.higher_is_better is not None)
    images = {
        (method, seed): over_seeds([row.images], [figure.name for figure in figures])
        for method in discrete
        for seed, row in rows[method].items()
    }
    shared = tuple(f for f in whole if f in columns)
    rivals = []
    for rival, method in discrete.items():
        if rival == name:
            continue
        seeds = tuple(seed for seed in rows[name] if seed in rows[rival])
        both = {seed: (images[name, seed], images[rival, seed]) for seed in seeds}
        for first, other in both.values():
            check_same_images({name: first, rival: other})
        told = {f.name: _differences(f.name, rows[name], rows[rival]) for f in shared}
        differences = {figure: of_seeds for figure, of_seeds in told.items() if of_seeds}
        rivals.append(Rival(method, seeds, *_over_pairs(figures, both), differences))
    unit, groups = next(found for (method, _), found in images.items() if method == name).groups()
    ordered = tuple(row for m in methods for row in rows[m.method.name].values())
    return Against(
        discrete[name],
        unit,
        len(set(groups.tolist())),
        tuple(rivals),
        figures,
        shared,
        ordered,
        tuple(f for f in columns if f.varies and any(row.value(f.name) is not None for row in ordered)),
    )


def _differences(name: str, first: Mapping[int, RowResult], other: Mapping[int, RowResult]) -> dict[int, float]:
    """A figure of one method minus that of another, by each seed in which both have it."""
    found = {seed: (row.value(name), other[seed].value(name)) for seed, row in first.items() if seed in other}
    return {seed: one - two for seed, (one, two) in found.items() if one is not None and two is not None}


def _over_pairs(
    figures: Sequence[Figure], both: Mapping[int, tuple[Images, Images]]
) -> tuple[dict[str, Paired], dict[str, dict[int, Paired]]]:
    """By figure, what is found over pairs of group and seed; and over images seed by seed where they are the groups."""
    pairs: dict[str, Paired] = {}
    by_seed: dict[str, dict[int, Paired]] = {}
    for figure in figures:
        name, of_seeds = figure.name, []
        for seed, (first, other) in both.items():
            if name not in first.values or name not in other.values:
                continue
            unit, groups = first.groups()
            # Of images that both have a value for: one without leaves its patient's others in.
            gains = np.asarray(first.values[name]) - np.asarray(other.values[name])
            known = np.isfinite(gains)
            counts = np.bincount(groups[known], minlength=int(groups.max(initial=-1)) + 1)
            sums = np.bincount(groups[known], weights=gains[known], minlength=len(counts))
            of_seeds.append(differences := sums[counts > 0] / counts[counts > 0])
            if unit == "image" and len(differences):
                found = _paired(figure, differences, wilcoxon(differences))
                by_seed.setdefault(name, {})[seed] = found
        differences = np.concatenate(of_seeds) if of_seeds else np.empty(0)
        if len(differences):
            better, ties = _counts(figure, differences)
            pairs[name] = _paired(figure, differences, sign_test(better, len(differences) - better - ties))
    return pairs, by_seed


def _counts(figure: Figure, differences: Array) -> tuple[int, int]:
    """Pairs in which the reference is better, and equal ones."""
    gains = differences if figure.higher_is_better else -differences
    return int((gains > 0).sum()), int((gains == 0).sum())


def _paired(figure: Figure, differences: Array, p_value: float) -> Paired:
    better, ties = _counts(figure, differences)
    return Paired(float(differences.mean()), better, ties, len(differences), p_value)


def _signed(figure: Figure, value: float) -> str:
    return f"{value * figure.scale:+,.{figure.digits}f}"


def _each_seed(figure: Figure, rival: Rival) -> str:
    """Differences in the order of the seeds; empty where there is none at all."""
    found = rival.differences.get(figure.name)
    if not found:
        return ""
    return ", ".join(_signed(figure, found[seed]) if seed in found else "–" for seed in rival.seeds)


def _shown(figure: Figure, value: float | None) -> str:
    return "" if value is None else figure.show(value)


def _pairs(figure: Figure, found: Paired | None) -> str:
    if found is None:
        return ""
    equal = f" ({found.ties} equal)" if found.ties else ""
    return f"{_signed(figure, found.difference)}, {found.better} of {found.n}{equal}, p = {found.p_value:.2g}"
