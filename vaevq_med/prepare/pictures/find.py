"""Find ImageNet, or a user's own images: folders of classes, flat folders, or the ILSVRC2012 archives.

What is found are batches of image files, and the class of each by its name; nothing is decoded here.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from vaevq_med.core.errors import DataError
from vaevq_med.images.manifest import FILE_NAME
from vaevq_med.prepare.job import Search
from vaevq_med.prepare.pictures.batches import Batch, is_name, list_archive
from vaevq_med.prepare.pictures.classes import choose_classes
from vaevq_med.prepare.pictures.ground_truth import GroundTruth, find_ground_truth, read_ground_truth
from vaevq_med.prepare.pictures.patients import People

SUFFIXES = frozenset({".jpeg", ".jpg", ".png", ".tif", ".tiff", ".bmp", ".webp"})
BATCH_SIZE = 512
_FOLDERS = {
    "training": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_ROOTS = (".", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")
_ARCHIVE = re.compile(r"(?:^|[_.-])(train|val|test)(?:ing|id|idation)?(?=[_.-]|$)")


@dataclass
class ImageSearch(Search[Batch]):
    """What is below an input folder; the units are batches.

    Attributes:
        classes: names of the classes, sorted; their positions are the labels.
        class_of: class of an image by its batch and name; None for none.
        people: patient and case of each image by its path, where they are known.
    """

    classes: tuple[str, ...] = ()
    class_of: Callable[[Batch, str], str | None] = lambda batch, name: None
    people: People = field(default_factory=dict)


@dataclass
class _Finder:
    """Collects batches and what does not belong to any."""

    output: Path
    batches: list[Batch] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    data_sets: set[Path] = field(default_factory=set)

    def folder(
        self, folder: Path, prefix: str, split: str | None, class_name: str | None, names: Sequence[str]
    ) -> None:
        """Add the image files of a folder, in batches."""
        seen: dict[str, str] = {}
        kept: list[str] = []
        for name in names:
            where = f"{prefix}/{name}" if prefix else name
            stem = str(PurePosixPath(name).with_suffix(""))
            if not _is_image(name):
                self.others[PurePosixPath(name).suffix.lower() or "no suffix"] += 1
            elif not is_name(where):
                self.problems.append((ascii(where), "found a name that is not UTF-8, expected one"))
            elif stem in seen:
                self.problems.append((where, f"found another image of that name ({seen[stem]}), expected one"))
            else:
                seen[stem] = name
                kept.append(name)
        for number in range(0, len(kept), BATCH_SIZE):
            record = f"{prefix.replace('/', '+') or 'images'}+{number // BATCH_SIZE:05d}"
            self.batches.append(
                Batch(record, prefix, folder, split, class_name, files=tuple(kept[number : number + BATCH_SIZE]))
            )

    def split(self, folder: Path, split: str) -> None:
        """Add a folder of a split: subfolders are classes, and files lie flat."""
        prefix = folder.name
        files, folders = self._scan(folder)
        for class_name in folders:
            self.folder(
                folder / class_name, f"{prefix}/{class_name}", split, class_name, self._below(folder / class_name)
            )
        self.folder(folder, prefix, split, None, files)

    def archive(self, path: Path, split: str) -> None:
        """Add an archive of images, or of archives, one a class."""
        prefix = {"training": "train", "validation": "val"}[split]
        images: list[tuple[str, int, int]] = []
        for name, offset, size in list_archive(path):
            if not is_name(name):
                self.problems.append((ascii(f"{path.name}: {name[:60]}"), "found a name that no file can have"))
            elif name.endswith(".tar"):
                class_name = name.removesuffix(".tar")
                inner = (offset, size)
                self.batches.append(
                    Batch(
                        f"{prefix}+{class_name}+00000", f"{prefix}/{class_name}", path, split, class_name, inner=inner
                    )
                )
            elif not _is_image(name):
                self.others[PurePosixPath(name).suffix.lower() or "no suffix"] += 1
            else:
                images.append((name, offset, size))
        for number in range(0, len(images), BATCH_SIZE):
            members = tuple(images[number : number + BATCH_SIZE])
            self.batches.append(Batch(f"{prefix}+{number // BATCH_SIZE:05d}", prefix, path, split, members=members))

    def own(self, folder: Path, *, classes: bool) -> None:
        """Add a user's own folder: its subfolders are classes, unless images lie beside them."""
        files, folders = self._scan(folder)
        if classes and folders and not any(map(_is_image, files)):
            for class_name in folders:
                self.folder(folder / class_name, class_name, None, class_name, self._below(folder / class_name))
        else:
            nested = [f"{name}/{file}" for name in folders for file in self._below(folder / name)]
            self.folder(folder, "", None, None, sorted(files + nested))

    def _scan(self, folder: Path) -> tuple[list[str], list[str]]:
        """Names of the files and of the folders in a folder, sorted; hidden ones and data sets are left out."""
        try:
            entries = [entry for entry in os.scandir(folder) if entry.name[0] != "."]
        except OSError as error:
            raise DataError(f"input {folder}: found no readable folder ({error.strerror}), expected one") from None
        folders = sorted(e.name for e in entries if e.is_dir() and not self._left_out(Path(e.path)))
        return sorted(e.name for e in entries if e.is_file()), folders

    def _left_out(self, folder: Path) -> bool:
        """Whether a folder is the output, or a data set that an earlier run wrote."""
        if folder.resolve() == self.output:
            return True
        if (folder / FILE_NAME).is_file() and (folder / "recipe.json").is_file():
            self.data_sets.add(folder)
            return True
        return False

    def _below(self, folder: Path) -> list[str]:
        """Paths of all files under a folder, sorted."""
        found = []
        for root, folders, files in os.walk(folder, followlinks=True):
            folders[:] = sorted(name for name in folders if name[0] != "." and not self._left_out(Path(root, name)))
            relative = PurePosixPath(Path(root).relative_to(folder).as_posix())
            found += [(relative / name).as_posix() for name in files if name[0] != "."]
        return sorted(found)


def find_images(
    folder: Path,
    output: Path,
    *,
    val_labels: Path | None = None,
    classes: str | None = None,
    use_classes: bool = True,
    seed: int = 0,
) -> ImageSearch:
    """Find what :attr:`Batch.contents` can read below a folder.

    A folder ``train`` (and ``val``, ``test``) or an archive ``*train*.tar`` (and ``*val*.tar``) make a data set with
    splits; anything else is a user's own folder, whose subfolders are classes unless images lie beside them.

    Args:
        folder: the input.
        output: a folder to leave out, for it may lie inside.
        val_labels: classes of validation images that lie flat; by default looked for in ``folder``.
        classes: keep these only: a number, chosen by ``seed``, or a file or list of names.
        use_classes: whether subfolders of a user's own folder are classes.
        seed: of the choice.

    Raises:
        DataError: there is nothing, or an option is not what was expected.
    """
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "nothing"
        raise DataError(f"input {folder}: found {kind}, expected a folder of images, or of the ILSVRC2012 archives")
    finder = _Finder(output.resolve())
    notes: list[str] = []
    truth: GroundTruth | None = None
    root, folders, archives = _layout(folder)
    if not folders and not archives:
        if val_labels is not None:
            raise DataError(f"--val-labels: found no validation images in {folder}, expected folder or archive 'val'")
        finder.own(folder, classes=use_classes)
    for split, place in folders.items():
        finder.split(place, split)
    for split, place in archives.items():
        finder.archive(place, split)
    if folders or archives:
        truth_file = val_labels or find_ground_truth((folder, root))
        if truth_file is not None:
            truth = read_ground_truth(truth_file)
    if not finder.batches and not finder.problems:
        raise DataError(f"input {folder}: found no images, expected some ({', '.join(sorted(SUFFIXES))})")
    named = {batch.class_name for batch in finder.batches if batch.class_name is not None}
    numbered = tuple(sorted({b.class_name for b in finder.batches if b.class_name and b.split == "training"} or named))

    def class_of(batch: Batch, name: str) -> str | None:
        if batch.class_name is not None or truth is None or batch.split != "validation":
            return batch.class_name
        return truth.class_of(name, numbered)

    flat = [b for b in finder.batches if b.class_name is None and b.split == "validation"]
    if flat and truth is None and named:
        tail = "and were left out, as --classes needs them" if classes is not None else "in the datalist"
        notes.append(f"no ground truth was found (--val-labels): the validation images have no classes {tail}")
    if truth is not None:
        found = {class_of(b, name) for b in flat for name in b.names()}
        if None in found:
            notes.append(f"some validation images are not in the ground truth {truth.path.name}; they have no class")
        named |= {name for name in found if name is not None}
    batches = list(finder.batches)
    if named and any(b.split == "test" and b.class_name is None for b in batches):
        batches = [b for b in batches if b.split != "test" or b.class_name is not None]
        notes.append("the test images have no classes and were left out; validation images are what papers evaluate on")
    everything = tuple(sorted(named))
    kept = everything if classes is None else choose_classes(everything, classes, seed)
    if classes is not None:
        batches = [part for b in batches if (part := _restricted(b, frozenset(kept), class_of)) is not None]
    if finder.data_sets:
        places = ", ".join(sorted(str(path.relative_to(folder)) for path in finder.data_sets))
        notes.append(f"folders that hold a data set ({FILE_NAME} and recipe.json) were left out: {places}")
    if finder.others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(finder.others.items()))
        notes.append(f"files of other kinds were left out: {kinds}")
    return ImageSearch(batches, sorted(finder.problems), notes, kept, class_of)


def _layout(folder: Path) -> tuple[Path, dict[str, Path], dict[str, Path]]:
    """The folder that holds the splits, and each split's folder or else archive."""
    for root in (folder / name for name in _ROOTS):
        folders = {
            split: next((root / name for name in names if (root / name).is_dir()), None)
            for split, names in _FOLDERS.items()
        }
        archives: dict[str, Path] = {}
        for path in sorted(root.glob("*.tar")) if root.is_dir() else []:
            match = _ARCHIVE.search(path.stem.lower())
            split = {"train": "training", "val": "validation"}.get(match[1]) if match else None
            if split is not None and "_t3" not in path.stem and folders[split] is None:
                if split in archives:
                    raise DataError(f"input {root}: found {archives[split].name} and {path.name}, expected one")
                archives[split] = path
        found = {split: place for split, place in folders.items() if place is not None}
        if "training" in found or "validation" in found or archives:
            return root, found, archives
    return folder, {}, {}


def _restricted(batch: Batch, kept: frozenset[str], class_of: Callable[[Batch, str], str | None]) -> Batch | None:
    """The part of a batch that is of the kept classes."""
    if batch.class_name is not None:
        return batch if batch.class_name in kept else None
    files = tuple(name for name in batch.files if class_of(batch, name) in kept)
    members = tuple(member for member in batch.members if class_of(batch, member[0]) in kept)
    if not files and not members:
        return None
    return Batch(batch.name, batch.prefix, batch.source, batch.split, files=files, members=members)


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES
