"""Images that stand in two splits of a data set, byte by byte or nearly, under whatever names."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice, product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaevq_med.core.errors import DataError
from vaevq_med.core.jobs import Problem, run_jobs
from vaevq_med.images.likeness import BITS, CLOSE, FILLED, Sketch, likeness, sketch
from vaevq_med.images.patients import person_of

_BATCH = 256
_PAIRS = 2**20
_TRIES = 3
_BLANK = 0.01


@dataclass(frozen=True)
class Twins:
    """Two cases, or images without one, in two splits that show the same.

    Attributes:
        first: name and split of the one.
        second: name and split of the other.
        images: an image of each.
        identical: how many images are identical byte by byte.
        likeness: of the images, at most 1.
        mirrored: whether the one is like the other with left and right exchanged.
    """

    first: tuple[str, str]
    second: tuple[str, str]
    images: tuple[str, str]
    identical: int
    likeness: float
    mirrored: bool = False


@dataclass(frozen=True)
class Comparison:
    """What a comparison of the splits' images found.

    Attributes:
        twins: what stands in two splits.
        blank: images with nothing in them, which were not compared.
        sparse: images that were compared byte by byte alone, since there is little in them.
        unreadable: images that cannot be read, with the reason.
    """

    twins: tuple[Twins, ...]
    blank: int
    sparse: int
    unreadable: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Images:
    """All images of a data set: path, split, case or path, person, and what is remembered of each."""

    paths: list[str]
    split: NDArray[np.str_]
    owner: list[str]
    person: list[str]
    digest: NDArray[np.void]
    bits: NDArray[np.uint8]
    mirrored: NDArray[np.uint8]
    filled: NDArray[np.float32]
    limit: list[float]

    def are_strangers(self, i: int, j: int) -> bool:
        """Whether nothing else says that they belong together."""
        return self.person[i] != self.person[j]

    def sides(self, i: int, j: int) -> tuple[tuple[str, str], tuple[str, str]]:
        return (self.owner[i], str(self.split[i])), (self.owner[j], str(self.split[j]))


def compare_splits(
    root: Path,
    splits: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    workers: int | None = None,
    on_start: Callable[[int], None] = lambda total: None,
    on_images: Callable[[int], None] = lambda count: None,
) -> Comparison:
    """Read every image once, and those again of which another split may have a copy.

    Images of one patient, by the names, are not compared: that they stand in two splits needs no look at them.

    Args:
        root: folder of the data set.
        splits: entries of each split, with ``image`` and, where they are known, ``patient`` and ``case``.
        workers: processes, or None for one a core.
        on_start: called once with the number of images.
        on_images: called with how many more were read.

    Raises:
        DataError: a worker was killed, or the images do not fit into memory.
    """
    entries = [(split, entry) for split, listed in splits.items() for entry in listed]
    sketches, unreadable = _read(root, [str(e["image"]) for _, e in entries], workers, on_start, on_images)
    known = [number for number in range(len(entries)) if number in sketches]
    filled = np.array([sketches[n].filled for n in known], np.float32)
    kept = [n for n, share in zip(known, filled, strict=True) if share >= _BLANK]
    blank, sparse = len(known) - len(kept), int(((filled >= _BLANK) & (filled < FILLED)).sum())
    if not kept:
        return Comparison((), blank, sparse, unreadable)
    images = _Images(
        paths=[str(entries[n][1]["image"]) for n in kept],
        split=np.array([entries[n][0] for n in kept]),
        owner=[str(entries[n][1].get("case", entries[n][1]["image"])) for n in kept],
        person=[person_of(str(entries[n][1].get("patient", entries[n][1]["image"]))) for n in kept],
        digest=np.frombuffer(b"".join(sketches[n].digest for n in kept), dtype="V16"),
        bits=np.stack([sketches[n].bits for n in kept]),
        mirrored=np.stack([sketches[n].mirrored for n in kept]),
        filled=filled[filled >= _BLANK],
        limit=[sketches[n].limit for n in kept],
    )
    identical = _identical(images)
    same = {(twins.first, twins.second) for twins in identical}
    try:
        alike = tuple(_alike(root, images, same))
    except OSError as error:
        raise DataError(
            f"{root}: found an image gone that was there ({error}), expected nobody to write there"
        ) from None
    return Comparison((*identical, *alike), blank, sparse, unreadable)


def _sketch_batch(root: Path, paths: Sequence[str]) -> list[Sketch | str]:
    """A job of the pool."""
    return sketch([root / path for path in paths])


def _read(
    root: Path,
    paths: Sequence[str],
    workers: int | None,
    on_start: Callable[[int], None],
    on_images: Callable[[int], None],
) -> tuple[dict[int, Sketch], tuple[tuple[str, str], ...]]:
    """Sketches by position, and what cannot be read."""
    starts = range(0, len(paths), _BATCH)
    jobs = {str(start): (root, paths[start : start + _BATCH]) for start in starts}
    sketches: dict[int, Sketch] = {}
    unreadable: list[tuple[int, str]] = []
    running = run_jobs(_sketch_batch, jobs, kind="batch", workers=workers, on_start=lambda total: on_start(len(paths)))
    with contextlib.closing(running) as outcomes:
        for name, outcome in outcomes:
            if isinstance(outcome, Problem):
                raise DataError(f"images from {paths[int(name)]} on: {outcome.reason}")
            for number, found in enumerate(outcome, int(name)):
                if isinstance(found, Sketch):
                    sketches[number] = found
                else:
                    unreadable.append((number, found))
            on_images(len(outcome))
    return sketches, tuple((paths[number], reason) for number, reason in sorted(unreadable))


def _identical(images: _Images) -> list[Twins]:
    """What has files of the same content."""
    _, group, sizes = np.unique(images.digest, return_inverse=True, return_counts=True)
    order = np.argsort(group, kind="stable")
    ends = np.cumsum(sizes)
    counts: dict[tuple[tuple[str, str], tuple[str, str]], list[tuple[int, int]]] = defaultdict(list)
    for number in np.flatnonzero(sizes > 1):
        members = order[ends[number] - sizes[number] : ends[number]].tolist()
        for i, j in islice(strangers(members, images.split, images.person), _BATCH):
            counts[images.sides(i, j)].append((i, j))
    return [
        Twins(*sides, (images.paths[pairs[0][0]], images.paths[pairs[0][1]]), len(pairs), 1.0)
        for sides, pairs in sorted(counts.items())
    ]


def strangers(
    members: Iterable[int], split: Sequence[str] | NDArray[np.str_], person: Sequence[str]
) -> Iterator[tuple[int, int]]:
    """Pairs of images of two splits and of two persons.

    The next pair takes no longer for the pairs of one split or of one person, of which there may be billions.

    Args:
        members: positions of images.
        split: the split of each image.
        person: whom each image shows.

    Yields:
        Two positions, a pair once.

    Examples:
        >>> list(strangers(range(4), ["training", "training", "test", "test"], ["anna", "bo", "anna", "anna"]))
        [(1, 2), (1, 3)]
    """
    groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number in members:
        groups[str(split[number])][person[number]].append(number)
    for one, other in combinations(groups.values(), 2):
        for first, second in product(one, other):
            if first != second:
                yield from ((i, j) for i in one[first] for j in other[second])


def _alike(root: Path, images: _Images, known: set[tuple[tuple[str, str], tuple[str, str]]]) -> Iterator[Twins]:
    """What looks alike, apart from what is known already."""
    candidates: dict[tuple[tuple[str, str], tuple[str, str]], list[tuple[int, bool, int, int]]] = defaultdict(list)
    rows = {split: _distinct(images, split) for split in dict.fromkeys(images.split.tolist())}
    for one, other in combinations(rows, 2):
        for mirrored, bits in ((False, images.bits), (True, images.mirrored)):
            for distance, i, j in _close(images.bits, bits, rows[one], rows[other]):
                if images.are_strangers(i, j) and (sides := images.sides(i, j)) not in known:
                    candidates[sides].append((distance, mirrored, i, j))
    for sides, found in sorted(candidates.items()):
        for _, mirrored, i, j in sorted(found)[:_TRIES]:
            value = likeness(root / images.paths[i], root / images.paths[j], mirrored=mirrored)
            if value >= max(images.limit[i], images.limit[j]):
                yield Twins(*sides, (images.paths[i], images.paths[j]), 0, value, mirrored)
                break


def _distinct(images: _Images, split: str) -> NDArray[np.int64]:
    """Rows of a split with enough in them to be compared, one of each content."""
    rows = np.flatnonzero((images.split == split) & (images.filled >= FILLED))
    _, first = np.unique(images.digest[rows], return_index=True)
    return rows[np.sort(first)]


def _close(
    bits: NDArray[np.uint8], others: NDArray[np.uint8], one: NDArray[np.int64], other: NDArray[np.int64]
) -> Iterator[tuple[int, int, int]]:
    """Pairs of rows whose sketches are close: those that share 16 bits somewhere are looked at.

    Args:
        bits: ``[N, BITS / 8]``.
        others: ``[N, BITS / 8]``, of the same images or of what they are mirrored.
        one: rows of ``bits``.
        other: rows of ``others``.

    Yields:
        Bits that differ, and the two rows; a pair once.
    """
    words, halves = bits.view(np.uint64), bits.view(np.uint16)
    their_words, their_halves = others.view(np.uint64), others.view(np.uint16)
    found: set[tuple[int, int, int]] = set()
    for table in range(BITS // 16):
        order = one[np.argsort(halves[one, table], kind="stable")]
        keys = halves[order, table]
        starts = np.searchsorted(keys, their_halves[other, table], "left")
        counts = np.searchsorted(keys, their_halves[other, table], "right") - starts
        # Blocks of rows that have about so many pairs together; a single row has no more than there are rows.
        blocks = np.flatnonzero(np.diff(np.cumsum(counts) // _PAIRS, prepend=0))
        for block in np.split(np.arange(len(other)), blocks):
            amounts = counts[block]
            second = np.repeat(other[block], amounts)
            offsets = np.arange(amounts.sum()) - np.repeat(np.cumsum(amounts) - amounts, amounts)
            first = order[np.repeat(starts[block], amounts) + offsets]
            distances = np.bitwise_count(words[first] ^ their_words[second]).sum(1, dtype=np.int64)
            near = distances <= CLOSE
            found.update(zip(distances[near].tolist(), first[near].tolist(), second[near].tolist(), strict=True))
    yield from found
