"""``vaevq-med label-maps``: the segmentations of a slice data set as images of a data set of their own.

Every command that reads slices then reads masks: a tokenizer of label maps is trained, judged and used like any other
(All in Tokens, arXiv 2301.02229; CAM-Seg, 2503.15617).
"""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from vaevq_med.core.errors import DataError
from vaevq_med.core.files import atomic_write_bytes
from vaevq_med.core.folder import OutputFolder
from vaevq_med.images.manifest import SPLITS, Manifest, load_manifest, split_hash, write_manifest
from vaevq_med.images.pixels import read_labels
from vaevq_med.images.regions import region_labels
from vaevq_med.images.transforms import REGIONS

MODALITY = "labels"


@dataclass(frozen=True)
class LabelMapsReport:
    """What was written.

    Attributes:
        output: folder of the data set.
        images: of each split.
        left_out: slices without a segmentation, and segmented ones without a tumor where these are left out.
    """

    output: Path
    images: Mapping[str, int]
    left_out: Mapping[str, int]


@dataclass(frozen=True)
class LabelMaps:
    """Write the masks of a slice data set's regions as color images: a channel a region, 0 or 255.

    Patients keep their split.

    Attributes:
        dataset: folder of ``dataset.json``.
        output: folder of the new data set.
        keep_empty: keep slices that were segmented and show no tumor.
        overwrite: replace label maps of other images.
    """

    dataset: Path
    output: Path
    keep_empty: bool = False
    overwrite: bool = False

    def run(
        self,
        *,
        on_start: Callable[[int], None] = lambda total: None,
        on_images: Callable[[int], None] = lambda count: None,
    ) -> LabelMapsReport:
        """Write the images, then the datalist.

        Args:
            on_start: called once with the number of segmented slices.
            on_images: called with the number of slices that are done with.

        Raises:
            DataError: the data set has no label map or no segmentation, a file of it cannot be read, or the output is
                of other things or cannot be written.
        """
        manifest = load_manifest(self.dataset)
        labels = {name: region_labels(manifest)[name] for name in REGIONS}
        slices = {split: _segmented(manifest, split) for split in SPLITS}
        total = sum(map(len, slices.values()))
        if not total:
            raise DataError(f"{self.dataset}: found no slice with a segmentation, expected some")
        folder = OutputFolder(self.output, ".labels", "label-maps", "label maps")
        mark = hashlib.sha256(f"{manifest.content_hash} {self.keep_empty}".encode()).hexdigest()
        folder.check()
        if folder.holds_other(mark) and not self.overwrite:
            raise DataError(
                f"output {self.output}: found label maps of other images or options, expected those of {self.dataset}; "
                "choose another folder, or replace them with --overwrite"
            )
        on_start(total)
        with folder.lock():
            stale = folder.is_of_another(mark)
            folder.begin(mark)
            with folder.writing():
                if stale:
                    shutil.rmtree(self.output / "images", ignore_errors=True)
                digest = hashlib.sha256()
                entries = {
                    split: list(self._written(found, labels, digest.update, on_images))
                    for split, found in slices.items()
                }
                if not any(entries.values()):
                    raise DataError(f"{self.dataset}: found no slice with a tumor, expected some, or --keep-empty")
                write_manifest(self.output, self._content(manifest, entries, digest.hexdigest()))
        images = {split: len(kept) for split, kept in entries.items()}
        segmented = sum(images.values())
        return LabelMapsReport(
            self.output,
            images,
            {"without a segmentation": _slices(manifest) - total, "without a tumor": total - segmented},
        )

    def _written(
        self,
        found: Sequence[Mapping[str, Any]],
        labels: Mapping[str, Sequence[int]],
        note: Callable[[bytes], None],
        on_images: Callable[[int], None],
    ) -> Iterator[dict[str, Any]]:
        """The entries of those slices that were written."""
        for entry in found:
            values = read_labels(self.dataset / str(entry["segmentation"]))
            masks = np.stack([np.isin(values, labels[name]) for name in REGIONS], axis=-1)  # [H, W, 3]
            on_images(1)
            if not (self.keep_empty or masks.any()):
                continue
            name = _file_name(entry)
            buffer = io.BytesIO()
            Image.fromarray(masks.astype(np.uint8) * 255).save(buffer, format="PNG")
            path = self.output / name
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_bytes(path, buffer.getvalue(), durable=False)
            note(f"{name} {hashlib.sha256(buffer.getvalue()).hexdigest()}\n".encode())
            kept = {key: entry[key] for key in ("patient", "case", "slice") if key in entry}
            yield {"image": name, **kept, "modality": MODALITY, "label": 0}

    @staticmethod
    def _content(manifest: Manifest, entries: Mapping[str, Any], digest: str) -> dict[str, Any]:
        source = manifest.content
        return {
            "name": f"{source.get('name', 'slices')} label maps",
            "description": f"Masks of {', '.join(REGIONS)} as channels, 0 or 255",
            "tensorImageSize": "2D",
            "modality": {"0": MODALITY},
            "channels_per_image": len(REGIONS),
            "reading": {"shape": "square", "channels": len(REGIONS), "version": 1},
            **{key: source[key] for key in ("image_size",) if key in source},
            "format": "png",
            "source": {"content_hash": manifest.content_hash, "split_hash": manifest.split_hash},
            "versions": {name: version(name) for name in ("vaevq_med", "numpy", "pillow")},
            "content_hash": f"sha256:{digest}",
            "split_hash": split_hash(entries),
            **entries,
        }


def _segmented(manifest: Manifest, split: str) -> list[Mapping[str, Any]]:
    """The first entry of each slice that has a segmentation, whatever its contrast."""
    found = (entry for entry in manifest.entries(split) if entry.get("segmentation"))
    slices: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for entry in found:
        slices.setdefault(_place(entry), entry)
    return list(slices.values())


def _place(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Which slice an entry is of, as well as the data set says it."""
    if "case" in entry and "slice" in entry:
        return str(entry["case"]), str(entry["slice"])
    return (str(PurePosixPath(entry.get("segmentation") or entry["image"])),)


def _file_name(entry: Mapping[str, Any]) -> str:
    """After the path of the segmentation, which lies inside the data set and tells it from all others."""
    path = PurePosixPath(entry["segmentation"])
    return f"images/{path if path.suffix == '.png' else f'{path}.png'}"


def _slices(manifest: Manifest) -> int:
    return len({_place(entry) for split in SPLITS for entry in manifest.entries(split)})
