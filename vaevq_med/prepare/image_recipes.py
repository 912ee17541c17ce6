"""Recipes of ready-made 2D images: what is written of each file, and how files are dealt to splits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vaevq_med.core.errors import DataError
from vaevq_med.core.options import expect, is_int, is_number, known
from vaevq_med.images.splits import SplitRule
from vaevq_med.prepare.recipes import MAX_SIZE, read_recipe

FORMATS = ("jpeg", "png")
_WRITER = 1
"""Part of every recipe's hash; a change of what the same recipe writes raises it."""


@dataclass(frozen=True)
class ImageRecipe:
    """What is done to each image.

    Attributes:
        name: what the recipe is called.
        description: one line for a reader.
        resize: shrink to this length of the shorter side, in pixels; None keeps every file's bytes. A file whose
            shorter side is no longer keeps its bytes too.
        format: ``jpeg`` or ``png``, of what is shrunk; 16-bit images become PNG either way.
        quality: of JPEG, 1 to 100, without chroma subsampling.
        holdout: share of the training images that is set aside as validation, by the hash of their names; the
            validation images then make the test split.
        split: how the images of a folder without splits are dealt.
    """

    name: str
    description: str = ""
    resize: int | None = None
    format: str = "jpeg"
    quality: int = 95
    holdout: float = 0.0
    split: SplitRule = field(default_factory=SplitRule)

    def __post_init__(self) -> None:
        expect(isinstance(self.name, str) and self.name, "name", self.name, "a text")
        expect(isinstance(self.description, str), "description", self.description, "a text")
        expect(
            self.resize is None or is_int(self.resize, 8, MAX_SIZE), "resize", self.resize, f"8 to {MAX_SIZE} pixels"
        )
        expect(self.format in FORMATS, "format", self.format, "one of " + ", ".join(FORMATS))
        expect(is_int(self.quality, 1, 100), "quality", self.quality, "1 to 100")
        expect(is_number(self.holdout, 0, 0.5), "holdout", self.holdout, "a share in [0, 0.5]")

    def with_options(self, *, resize: int | None = None, holdout: float | None = None) -> ImageRecipe:
        """This recipe with what the command line changes.

        Args:
            resize: length of the shorter side, or None to keep the recipe's.
            holdout: share of the training images, or None to keep the recipe's.

        Raises:
            DataError: a value is out of its range.
        """
        return replace(
            self,
            resize=self.resize if resize is None else resize,
            holdout=self.holdout if holdout is None else holdout,
        )

    def to_dict(self) -> dict[str, Any]:
        """The recipe as its JSON file holds it."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**values, "split": {f.name: getattr(self.split, f.name) for f in fields(self.split)}}

    def summary(self) -> str:
        """What tells it from others, for a message."""
        return f"{self.name} {'as they are' if self.resize is None else f'at {self.resize} pixels'}"

    @property
    def image_hash(self) -> str:
        """SHA-256 of everything that decides the images' bytes."""
        content = None if self.resize is None else [self.resize, self.format, self.quality]
        return hashlib.sha256(json.dumps([_WRITER, content]).encode()).hexdigest()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImageRecipe:
        """Build a recipe from the object that a JSON file holds.

        Raises:
            DataError: a field is unknown, missing or out of its range.
        """
        known(values, cls, "recipe")
        if "name" not in values:
            raise DataError("recipe: found no 'name', expected one")
        split = values.get("split", {})
        expect(isinstance(split, Mapping), "split", split, "an object")
        known(split, SplitRule, "split")
        return cls(**{**values, "split": SplitRule(**split)})


def load_image_recipe(name_or_path: str | Path) -> ImageRecipe:
    """Read a recipe that ships with the package, or a file of one's own.

    Args:
        name_or_path: e.g. ``imagenet/short_256``, or the path of a ``.json`` file.

    Raises:
        VaevqMedError: there is no such recipe, or it is not valid.

    Examples:
        >>> load_image_recipe("imagenet/short_256").resize
        256
    """
    path, values = read_recipe(name_or_path)
    try:
        return ImageRecipe.from_dict(values)
    except DataError as error:
        raise DataError(f"recipe {path}: {error}") from error
