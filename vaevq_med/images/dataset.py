"""Slices as training and evaluation items, and a batch order that can be taken up anywhere.

A data set's index carries the epoch: item ``k`` is element ``k % len`` as epoch ``k // len`` draws it. Random
transforms are seeded by that index alone, so what a step sees depends on its number, and neither on the
number of workers nor on where a run was interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import Dataset
from monai.transforms import Compose, Randomizable, Transform
from torch.utils.data import Sampler

from vaevq_med.core.errors import DataError, as_item_error
from vaevq_med.core.names import listed
from vaevq_med.core.options import expect, is_number
from vaevq_med.core.picks import evenly_spaced
from vaevq_med.images.manifest import SPLITS, Manifest, load_manifest
from vaevq_med.images.reading import shape_of
from vaevq_med.images.splits import patient_position


def mix_seeds(*values: int) -> int:
    """A 32-bit seed from several integers, by numpy's seed sequence."""
    return int(np.random.SeedSequence(values).generate_state(1)[0])


def stack_entries(entries: Sequence[Mapping[str, Any]], modalities: Sequence[str]) -> list[dict[str, Any]]:
    """One entry for each slice of which every contrast is there, whose ``image`` lists their paths.

    Args:
        entries: of a datalist, with ``case``, ``slice`` and ``modality``; their contrasts share one grid.
        modalities: contrasts, in the order of the channels.

    Returns:
        Entries in the order of the first contrast's; ``modality`` joins the names with ``+``.

    Examples:
        >>> pair = [{"image": f"{m}.png", "case": "a", "slice": 3, "modality": m} for m in ("t1n", "t2w")]
        >>> stack_entries(pair, ["t2w", "t1n"])[0]["image"]
        ['t2w.png', 't1n.png']
    """
    found: dict[tuple[str, int], dict[str, Mapping[str, Any]]] = {}
    for entry in entries:
        place = (str(entry.get("case", "")), int(entry.get("slice", -1)))
        found.setdefault(place, {})[str(entry.get("modality", ""))] = entry
    left_out = ("label", "intensity_window", "foreground")
    return [
        {
            **{key: value for key, value in group[modalities[0]].items() if key not in left_out},
            "image": [str(group[name]["image"]) for name in modalities],
            "modality": "+".join(modalities),
        }
        for group in found.values()
        if all(name in group for name in modalities)
    ]


class SliceDataset(Dataset):
    """One split of a data set written by ``vaevq-med slice-extract`` or ``vaevq-med imagenet-prepare``.

    Args:
        dataset_dir: folder of ``dataset.json``; an entry needs ``image`` only.
        split: ``training``, ``validation`` or ``test``.
        transform: from an entry to an item, usually :func:`vaevq_med.images.reading.reader`.
        modalities: keep these contrasts only, e.g. ``["t1n", "t2f"]`` or ``t1n``; None keeps all.
        stack_modalities: make one item of all kept contrasts of a slice, in the order of ``modalities`` or of the
            datalist, instead of one an image; a slice that lacks one is left out.
        max_items: keep at most this many items, evenly spaced over the split.
        shard: ``(rank, world size)``: keep this rank's share of the items.
        seed: seed of the random transforms.
        depth: make one item of so many adjacent slices of a case, ``image`` ``[C, depth, S, S]``, instead of one a
            slice, see :func:`runs_of`; random transforms do the same to all of them.
        random_start: let each epoch draw where in its run an item begins.
        centered: with ``depth``, make one item of each slice, which is the middle one of its ``depth``; at the ends of
            a run the last slice is repeated.
        patient_share: keep so large a share of the split's patients, at least one, in (0, 1]; ``seed`` draws them, and
            a larger share of one seed holds a smaller one.

    Attributes:
        patients: names of those that are kept, sorted; empty where the images have no patients.
        channels: names of the contrasts that are the channels of an item, where they are stacked; otherwise None.

    Raises:
        DataError: there is no data set, the split is empty, or a contrast is unknown.
    """

    def __init__(
        self,
        *,
        dataset_dir: str | Path,
        split: str,
        transform: Compose | Transform | None = None,
        modalities: Sequence[str] | None = None,
        stack_modalities: bool = False,
        max_items: int | None = None,
        shard: tuple[int, int] = (0, 1),
        seed: int = 0,
        depth: int | None = None,
        random_start: bool = False,
        centered: bool = False,
        patient_share: float = 1.0,
    ) -> None:
        manifest = load_manifest(dataset_dir)
        entries = _of_patients(_select(manifest, split, modalities, stack_modalities), patient_share, seed, manifest)
        self.patients = sorted({str(entry["patient"]) for entry in entries if "patient" in entry})
        entries = self.chosen(entries, manifest)
        self.depth = depth
        self.random_start = random_start
        if depth is not None:
            entries = _blocks(entries, depth, manifest, centered)
        entries = [entries[i] for i in evenly_spaced(len(entries), max_items)]
        rank, world_size = shard
        root = Path(dataset_dir)
        data = []
        for index, entry in list(enumerate(entries))[rank::world_size]:
            item = {**_rooted(entry, root), "index": index}
            if depth is not None:
                item["run"] = [_rooted(one, root) for one in entry["run"]]
            data.append(item)
        super().__init__(data=data, transform=transform)
        self.seed = seed
        self.split = split
        self.manifest = manifest
        self.num_items = len(entries)
        self.channels = chosen_modalities(manifest, split, modalities, stacked=True) if stack_modalities else None

    def chosen(self, entries: Sequence[Mapping[str, Any]], manifest: Manifest) -> Sequence[Mapping[str, Any]]:
        """Which entries of the split become items, before they are put into runs; all of them.

        Args:
            entries: of the chosen contrasts.
            manifest: whose they are.
        """
        return entries

    @property
    def shape(self) -> str | None:
        """How images are brought to squares (:data:`vaevq_med.images.reading.SHAPES`); None where that is unknown."""
        return shape_of(type(one).__name__ for one in getattr(self.transform, "transforms", (self.transform,)))

    def __getitem__(self, index: int) -> Any:  # type: ignore[override]
        """Item ``index % len(self)`` as epoch ``index // len(self)`` draws it.

        Raises:
            ItemError: a file of it is missing or damaged; a ``DataLoader`` with workers raises it alike.
        """
        if index < 0:
            raise IndexError(index)
        if self.depth is not None:
            return self._block(index)
        transform = self.transform
        if isinstance(transform, (Compose, Randomizable)):
            transform.set_random_state(seed=mix_seeds(self.seed, index))
        with as_item_error():
            return super().__getitem__(index % len(self.data))

    def _block(self, index: int) -> dict[str, Any]:
        """The slices of an item, one behind another; ``slice`` is their numbers, -1 where the last one is repeated."""
        assert self.depth is not None
        entry = self.data[index % len(self.data)]
        run, start, seed = entry["run"], entry["start"], mix_seeds(self.seed, index)
        if self.random_start:
            start = seed % (max(0, len(run) - self.depth) + 1)
        chosen = run[start : start + self.depth]
        items = []
        for one in chosen:
            item = {**one, "index": entry["index"]}
            if isinstance(self.transform, (Compose, Randomizable)):
                self.transform.set_random_state(seed=seed)
            # Not ``if self.transform``: the length of MONAI's chain is that of a new one, which seeds its parts anew.
            with as_item_error():
                items.append(item if self.transform is None else self.transform(item))
        lacking = self.depth - len(items)
        numbers = [int(one.get("slice", -1)) for one in chosen] + [-1] * lacking
        items += [items[-1]] * lacking
        volume = {**items[0], "slice": torch.tensor(numbers)}
        for key, value in items[0].items():
            if isinstance(value, torch.Tensor) and value.ndim >= 2:
                # [C, S, S] to [C, depth, S, S]; masks [S, S] to [depth, S, S]
                volume[key] = torch.stack([item[key] for item in items], dim=-3)
        return volume


def runs_of(entries: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The volumes that entries of a datalist are slices of: a case's slices of one contrast without a gap, upwards.

    Args:
        entries: with ``case``, ``slice`` and ``modality``.

    Returns:
        In the order of their first entries.

    Examples:
        >>> found = runs_of([{"case": "a", "modality": "t1n", "slice": z} for z in (7, 3, 4)])
        >>> [[entry["slice"] for entry in run] for run in found]
        [[3, 4], [7]]
    """
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for entry in entries:
        found.setdefault((str(entry.get("case", "")), str(entry.get("modality", ""))), []).append(entry)
    runs: list[list[Mapping[str, Any]]] = []
    for group in found.values():
        group.sort(key=lambda entry: int(entry["slice"]))
        for number, entry in enumerate(group):
            if number == 0 or int(entry["slice"]) != int(group[number - 1]["slice"]) + 1:
                runs.append([])
            runs[-1].append(entry)
    return runs


def _blocks(
    entries: Sequence[Mapping[str, Any]], depth: int, manifest: Manifest, centered: bool
) -> list[dict[str, Any]]:
    """An entry for each ``depth`` slices of each run, the last perhaps of fewer: the first's, ``run``, ``start``.

    Centered, there is an entry for each slice, that slice's, whose ``run`` are the slices around it.
    """
    if depth < 1:
        raise DataError(f"depth: found {depth}, expected 1 or more")
    if any("slice" not in entry or "case" not in entry for entry in entries):
        raise DataError(
            f"{manifest.path.parent}: found images without a case or a number of the slice, expected slices of "
            "volumes, made by vaevq-med slice-extract, for items of several (depth)"
        )
    runs = runs_of(entries)
    if centered:
        if depth % 2 == 0:
            raise DataError(f"depth: found {depth}, expected an odd number, of which one slice is the middle")
        return [
            {**run[z], "run": [run[min(max(z + o - depth // 2, 0), len(run) - 1)] for o in range(depth)], "start": 0}
            for run in runs
            for z in range(len(run))
        ]
    return [{**run[start], "run": run, "start": start} for run in runs for start in range(0, len(run), depth)]


def _rooted(entry: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """An entry with absolute paths."""
    image = entry["image"]
    paths = str(root / image) if isinstance(image, str) else [str(root / path) for path in image]
    item = {**entry, "image": paths}
    if entry.get("segmentation"):
        item["segmentation"] = str(root / str(entry["segmentation"]))
    return item


def _select(
    manifest: Manifest, split: str, modalities: Sequence[str] | None, stack_modalities: bool
) -> Sequence[Mapping[str, Any]]:
    """A split's entries of the chosen contrasts."""
    entries = manifest.entries(split)
    where = manifest.path.parent
    found = _modalities_of(entries)
    if modalities is not None:
        modalities = listed(modalities)
        unknown = sorted(set(modalities) - set(found))
        if unknown and entries:
            raise DataError(
                f"{where}: found no modality {', '.join(unknown)} in split {split!r}, "
                f"expected some of {', '.join(found) or 'none, as the images have no modality'}"
            )
        entries = [entry for entry in entries if entry.get("modality") in modalities]
    if stack_modalities and entries:
        chosen = chosen_modalities(manifest, split, modalities, stacked=True)
        if not chosen:
            raise DataError(f"{where}: found images without a modality, expected some to stack (stack_modalities)")
        stacked = stack_entries(entries, chosen)
        if not stacked:
            raise DataError(
                f"{where}: found no slice in split {split!r} with all of {', '.join(chosen)}, expected at least one"
            )
        return stacked
    if not entries:
        counts = ", ".join(f"{s} {len(manifest.entries(s))}" for s in SPLITS)
        raise DataError(
            f"{where}: found an empty split {split!r} ({counts}), expected at least one image; "
            + manifest.splitting_advice()
        )
    return entries


def _of_patients(
    entries: Sequence[Mapping[str, Any]], share: float, seed: int, manifest: Manifest
) -> Sequence[Mapping[str, Any]]:
    """The entries of a share of their patients, who come in the order of the hashes of their names."""
    fits = is_number(share, 0, 1) and share > 0
    expect(fits, "patient_share (train_patients)", share, "a share above 0 and at most 1")
    if share == 1:
        return entries
    names = {str(entry.get("patient", "")) for entry in entries}
    if "" in names:
        raise DataError(
            f"{manifest.path.parent}: found images without a patient, expected one of each for patient_share {share}"
        )
    order = sorted(names, key=lambda name: patient_position(name, seed))
    kept = set(order[: max(1, round(share * len(order)))])
    return [entry for entry in entries if str(entry["patient"]) in kept]


def _modalities_of(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({str(entry["modality"]) for entry in entries if "modality" in entry})


def chosen_modalities(manifest: Manifest, split: str, modalities: Any, stacked: bool) -> list[str]:
    """The contrasts that are read of a split: of stacked ones in the order of the channels, otherwise sorted.

    Args:
        manifest: of the data set.
        split: one of its splits.
        modalities: what is asked for, a list or one word; None for all.
        stacked: whether they are the channels of one image.
    """
    found = _modalities_of(manifest.entries(split))
    wanted = [] if modalities is None else [str(name) for name in listed(modalities)]
    if not stacked:
        return sorted(set(wanted or found))
    named = [str(name) for name in manifest.content.get("modality", {}).values() if name in found]
    return wanted or named or found


class ResumableBatchSampler(Sampler[list[int]]):
    """An endless stream of shuffled batches whose n-th batch depends on the seed and n alone.

    The stream is one permutation of the data set after the other, cut into global batches; each process
    takes its share of a global batch, so the order of the images is the same on any number of processes
    that make the same global batch.

    Args:
        num_items: size of the data set.
        batch_size: images a process and step.
        seed: seed of the permutations.
        start: the first batch to yield; a resumed run sets it to the iteration it stands at.
        rank: this process's number.
        world_size: number of processes.

    Example:
        >>> first = ResumableBatchSampler(5, batch_size=2, seed=1)
        >>> stream = iter(first)
        >>> batches = [next(stream) for _ in range(4)]
        >>> later = iter(ResumableBatchSampler(5, batch_size=2, seed=1, start=3))
        >>> next(later) == batches[3]
        True
    """

    def __init__(
        self,
        num_items: int,
        *,
        batch_size: int,
        seed: int = 0,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if num_items < 1 or batch_size < 1:
            raise DataError(f"found {num_items} items in batches of {batch_size}, expected at least 1 of each")
        self.num_items = num_items
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.rank = rank
        self.world_size = world_size

    @property
    def batches_per_epoch(self) -> int:
        """Steps that see about each image once: ``num_items // global batch``, at least 1."""
        return max(1, self.num_items // (self.batch_size * self.world_size))

    def _permutation(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(mix_seeds(self.seed, epoch))
        return torch.randperm(self.num_items, generator=generator).tolist()

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this process's share of each global batch, for ever, from batch ``start`` on."""
        batch = self.start
        epoch, permutation = -1, []  # type: int, list[int]
        while True:
            first = (batch * self.world_size + self.rank) * self.batch_size
            share = []
            for position in range(first, first + self.batch_size):
                if position // self.num_items != epoch:
                    epoch = position // self.num_items
                    permutation = self._permutation(epoch)
                share.append(epoch * self.num_items + permutation[position % self.num_items])
            yield share
            batch += 1
