"""Which classes a data set of images has, and which split each image stands in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vaevq_med.core.errors import DataError
from vaevq_med.images.manifest import SPLITS
from vaevq_med.images.splits import patient_position

ILSVRC2012 = {"training": 1_281_167, "validation": 50_000}
_WNID = re.compile(r"n\d{8}")


def choose_classes(available: Sequence[str], wanted: str, seed: int) -> tuple[str, ...]:
    """The classes that ``--classes`` asks for, sorted.

    Args:
        available: all classes.
        wanted: a number; a file with a class a line, in its first word; or names with commas between.
        seed: another seed chooses others for a number; a choice depends on the names alone.

    Raises:
        DataError: there are fewer, or a name is unknown.

    Examples:
        >>> choose_classes(["cat", "dog", "owl"], "owl,cat", seed=0)
        ('cat', 'owl')
    """
    if wanted.isdecimal():
        count = int(wanted)
        if not 1 <= count <= len(available):
            raise DataError(f"classes: found {count}, expected 1 to {len(available)}, as many as there are")
        return tuple(sorted(sorted(available, key=lambda name: patient_position(name, seed))[:count]))
    path = Path(wanted)
    if path.is_file():
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"classes {path}: found no readable text ({error}), expected a class a line") from None
        names = {words[0] for line in lines if (words := line.replace(",", " ").split())}
    else:
        names = {name.strip() for name in wanted.split(",") if name.strip()}
    unknown = sorted(names - set(available))
    if unknown or not names:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise DataError(
            f"classes: found {unknown[0] if unknown else 'none'}{more}, expected some of the {len(available)} classes "
            "of the input, a number of them, or a file that lists them"
        )
    return tuple(sorted(names))


def check_ilsvrc(counts: dict[str, int], classes: Sequence[str]) -> str | None:
    """A note where what looks like ILSVRC2012 is not all of it; None otherwise.

    Args:
        counts: images of each of :data:`SPLITS`, before any is held out.
        classes: names of all classes.
    """
    if not classes or not all(map(_WNID.fullmatch, classes)):
        return None
    if len(classes) == 1000 and all(counts[split] == count for split, count in ILSVRC2012.items()):
        return None
    found = ", ".join(f"{counts[split]:,} {split}" for split in ILSVRC2012)
    whole = ", ".join(f"{count:,} {split}" for split, count in ILSVRC2012.items())
    return f"{found} images of {len(classes):,} classes; all of ILSVRC2012 is {whole} images of 1,000 classes"


def deal(name: str, split: str | None, holdout: float, seed: int, has_validation: bool) -> str:
    """The split that an image of a data set with splits ends in.

    Args:
        name: its path below ``images/``, without the suffix.
        split: of its folder.
        holdout: share of the training images that becomes validation.
        seed: of the hash.
        has_validation: whether the data set has validation images, which then become the test split.

    Examples:
        >>> deal("val/x", "validation", 0.1, 0, True), deal("val/x", "validation", 0.0, 0, True)
        ('test', 'validation')
    """
    assert split in SPLITS
    if holdout == 0:
        return split
    if split == "training":
        return "validation" if patient_position(name, seed) < holdout else "training"
    return "test" if split == "validation" and has_validation else split
