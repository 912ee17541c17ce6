"""A case: the volumes of an examination, as files or tables name them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vaevq_med.core.errors import DataError
from vaevq_med.prepare.job import Unit
from vaevq_med.prepare.volumes.labels import BRATS2024

SUFFIXES = (".nii.gz", ".nii", ".mha", ".nrrd")
CONTRAST_ALIASES: Mapping[str, str] = {
    "t1": "t1n",
    "t1n": "t1n",
    "t1ce": "t1c",
    "t1gd": "t1c",
    "t1c": "t1c",
    "t2": "t2w",
    "t2w": "t2w",
    "flair": "t2f",
    "t2f": "t2f",
    "seg": "seg",
}
"""What the releases call the contrasts, to the names of BraTS 2023 and 2024."""
DECATHLON_CHANNELS: Mapping[str, int] = {"t2f": 0, "t1n": 1, "t1c": 2, "t2w": 3}
"""Order of the contrasts in Task01_BrainTumour's 4D volumes: FLAIR, T1w, T1gd, T2w."""

_CASE_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9_-])?")


@dataclass(frozen=True)
class Volume:
    """Where a volume is.

    Attributes:
        path: its file, or the folder of a DICOM series.
        channel: index along the fourth axis of a 4D file, or None for a 3D one.
        series: SeriesInstanceUID of a DICOM series; None where it is the only one of its folder.
        title: what a series is called.
    """

    path: Path
    channel: int | None = None
    series: str | None = None
    title: str | None = None

    @property
    def name(self) -> str:
        """For messages, and of what is written of it."""
        return self.title or self.path.name


@dataclass(frozen=True)
class Case(Unit):
    """One examination of one patient.

    Attributes:
        name: unique, and safe as a folder's name.
        patient: whom the split keeps together.
        images: contrast to volume.
        segmentation: the labels, or None.
        label_map: name of the map that the segmentation's values follow.
        target_map: name of the map that they are written in.
        map_is_stated: whether a user named the map, so that what its values seem to say against it is a remark.
    """

    patient: str
    images: Mapping[str, Volume]
    segmentation: Volume | None
    label_map: str
    target_map: str = BRATS2024.name
    map_is_stated: bool = False


def strip_suffix(name: str) -> str | None:
    """A volume's file name without its suffix, or None where it is no volume's.

    Examples:
        >>> strip_suffix("a-t1n.nii.gz"), strip_suffix("a.png")
        ('a-t1n', None)
    """
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return None


def check_case_name(name: str) -> None:
    """Refuse a name that cannot be a folder's, or would lead out of one.

    Raises:
        DataError: the name has other characters than letters, digits, ``.``, ``_`` and ``-``, or is too long.
    """
    if not _CASE_NAME.fullmatch(name):
        raise DataError(
            f"found case name {name!r}, expected 1 to 128 letters, digits, '.', '_' or '-', "
            "starting with a letter or digit"
        )


def assemble(
    name: str,
    patient: str,
    files: Mapping[str, Sequence[Path]],
    modalities: Sequence[str],
    label_map: str,
    stated: bool,
    root: Path,
) -> Case | str:
    """A case from its files, or what is wrong with it."""
    for contrast, paths in sorted(files.items()):
        if len(paths) > 1:
            shown = " and ".join(relative(path, root) for path in paths[:2])
            same_folder = len({path.parent for path in paths}) == 1
            what = f"{len(paths)} files for {contrast}" if same_folder else "a duplicate case name"
            return f"found {what} ({shown}), expected one"
    if "image" in files:
        stacked = files["image"][0]
        unknown = [m for m in modalities if m not in DECATHLON_CHANNELS]
        if unknown:
            return f"found contrasts {', '.join(DECATHLON_CHANNELS)}, expected also {', '.join(unknown)}"
        images = {m: Volume(stacked, DECATHLON_CHANNELS[m]) for m in modalities}
    else:
        missing = [m for m in modalities if m not in files]
        if missing:
            found = ", ".join(sorted(files)) or "nothing"
            return f"missing {', '.join(missing)}; found {found}, expected {', '.join(modalities)}"
        images = {m: Volume(files[m][0]) for m in modalities}
    segmentation = Volume(files["seg"][0]) if files.get("seg") else None
    return Case(name, patient, images, segmentation, label_map, map_is_stated=stated)


def all_volumes(case: Case) -> Iterator[Volume]:
    """The volumes of a case, its segmentation last."""
    yield from case.images.values()
    if case.segmentation is not None:
        yield case.segmentation


def relative(path: Path, root: Path) -> str:
    """A path as a reader of the folder calls it, in one line that any stream can encode."""
    return printable(path.relative_to(root).as_posix() if path.is_relative_to(root) else path)


def printable(text: object) -> str:
    """One line that any stream can encode, whatever bytes a file's name is made of.

    Args:
        text: the name.
    """
    return "".join(c if c.isprintable() else "?" for c in str(text))


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names for a reader, the first ones and how many more.

    Args:
        names: what is listed.
        most: how many are shown.
    """
    shown = ", ".join(printable(name) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
