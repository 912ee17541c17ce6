"""Preprocessing recipes: every number with which volumes become slices, read from JSON and checked."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vaevq_med.core.errors import DataError
from vaevq_med.core.options import expect, is_int, is_number, known
from vaevq_med.core.resources import recipe_path
from vaevq_med.images.splits import SplitRule

AXES = ("axial", "coronal", "sagittal")
FORMATS = ("png", "png16", "npy")
INTERPOLATIONS = ("bilinear", "bicubic")
MAX_SIZE = 4096
_RESERVED = ("seg", "case", "patient", "image")
_EXTRACTOR = 1
"""Part of every recipe's hash; a change of what the same recipe writes raises it."""


@dataclass(frozen=True)
class BiasFieldCorrection:
    """N4 bias-field correction (Tustison et al. 2010, doi:10.1109/TMI.2010.2046908).

    Attributes:
        shrink_factor: the field is fitted on every so many voxels along each axis.
        iterations: at most this many at each resolution level, coarse to fine.
    """

    shrink_factor: int = 4
    iterations: tuple[int, ...] = (50, 50, 50, 50)

    def __post_init__(self) -> None:
        expect(is_int(self.shrink_factor, 1, 16), "bias_field_correction.shrink_factor", self.shrink_factor, "1 to 16")
        expect(
            isinstance(self.iterations, tuple)
            and 0 < len(self.iterations) <= 8
            and all(is_int(n, 1, 1000) for n in self.iterations),
            "bias_field_correction.iterations",
            self.iterations,
            "1 to 8 whole numbers from 1 to 1000",
        )


@dataclass(frozen=True)
class Recipe:
    """What is done to a case, in this order.

    Attributes:
        name: what the recipe is called.
        description: one line for a reader.
        modalities: contrasts that every case must have; their order gives the class labels.
        axis: ``axial``, ``coronal`` or ``sagittal``.
        max_obliquity_degrees: a volume whose axes lean further is refused, unless ``spacing`` resamples it.
        bias_field_correction: N4, or None.
        spacing: resample to voxels of this size, in mm (right-left, posterior-anterior, inferior-superior),
            or None.
        clip_negatives: set negative intensities to 0.
        percentiles: of a volume's nonzero voxels; they become black and white.
        min_foreground: drop a slice with a smaller share of nonzero pixels, in any of the contrasts.
        size: side of the square slices, in pixels.
        interpolation: ``bilinear`` or ``bicubic``, for images; labels take the nearest.
        antialias: low-pass filter before shrinking.
        format: ``png`` (8 bit), ``png16`` (16 bit) or ``npy`` (float32 in [0, 1]).
        split: how patients are dealt to splits.
    """

    name: str
    description: str = ""
    modalities: tuple[str, ...] = ("t1n", "t1c", "t2w", "t2f")
    axis: str = "axial"
    max_obliquity_degrees: float = 1.0
    bias_field_correction: BiasFieldCorrection | None = None
    spacing: tuple[float, float, float] | None = None
    clip_negatives: bool = True
    percentiles: tuple[float, float] = (0.0, 99.5)
    min_foreground: float = 0.05
    size: int = 256
    interpolation: str = "bilinear"
    antialias: bool = True
    format: str = "png"
    split: SplitRule = field(default_factory=SplitRule)

    def __post_init__(self) -> None:
        expect(isinstance(self.name, str) and self.name, "name", self.name, "a text")
        expect(isinstance(self.description, str), "description", self.description, "a text")
        valid = bool(self.modalities) and all(
            isinstance(m, str) and re.fullmatch(r"[a-z0-9]{1,16}", m) and m not in _RESERVED for m in self.modalities
        )
        expect(
            valid,
            "modalities",
            list(self.modalities),
            f"names of lower-case letters and digits other than {', '.join(_RESERVED)}",
        )
        expect(len(set(self.modalities)) == len(self.modalities), "modalities", list(self.modalities), "each one once")
        for name, choices in (("axis", AXES), ("interpolation", INTERPOLATIONS), ("format", FORMATS)):
            expect(getattr(self, name) in choices, name, getattr(self, name), "one of " + ", ".join(choices))
        expect(
            is_number(self.max_obliquity_degrees, 0, 45),
            "max_obliquity_degrees",
            self.max_obliquity_degrees,
            "0 to 45",
        )
        if self.spacing is not None:
            expect(
                len(self.spacing) == 3 and all(is_number(s, 0.05, 50) for s in self.spacing),
                "spacing",
                list(self.spacing),
                "three lengths from 0.05 to 50 mm, or null",
            )
        for name in ("clip_negatives", "antialias"):
            expect(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        expect(
            len(self.percentiles) == 2
            and all(is_number(p, 0, 100) for p in self.percentiles)
            and self.percentiles[0] < self.percentiles[1],
            "percentiles",
            list(self.percentiles),
            "two rising numbers in [0, 100]",
        )
        expect(is_number(self.min_foreground, 0, 1), "min_foreground", self.min_foreground, "a share in [0, 1]")
        expect(is_int(self.size, 8, MAX_SIZE), "size", self.size, f"8 to {MAX_SIZE} pixels")

    def with_options(self, *, size: int | None = None, image_format: str | None = None) -> Recipe:
        """This recipe with what the command line changes.

        Args:
            size: side of the slices in pixels, or None to keep the recipe's.
            image_format: one of :data:`FORMATS`, or None to keep the recipe's.

        Raises:
            DataError: a value is out of its range.
        """
        return replace(
            self,
            size=self.size if size is None else size,
            format=self.format if image_format is None else image_format,
        )

    def to_dict(self) -> dict[str, Any]:
        """The recipe as its JSON file holds it."""
        correction = self.bias_field_correction
        return {
            **{f.name: _plain(getattr(self, f.name)) for f in fields(self)},
            "bias_field_correction": None
            if correction is None
            else {"shrink_factor": correction.shrink_factor, "iterations": list(correction.iterations)},
            "split": {f.name: getattr(self.split, f.name) for f in fields(self.split)},
        }

    def summary(self) -> str:
        """What tells it from others, for a message."""
        return f"{self.name} at {self.size} pixels as {self.format}"

    @property
    def image_hash(self) -> str:
        """SHA-256 of everything that decides the images' bytes: all but the name, description and split."""
        content = {k: v for k, v in self.to_dict().items() if k not in ("name", "description", "split")}
        return hashlib.sha256(json.dumps([_EXTRACTOR, content], sort_keys=True).encode()).hexdigest()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Build a recipe from the object that a JSON file holds.

        Raises:
            DataError: a field is unknown, missing or out of its range.
        """
        known(values, cls, "recipe")
        if "name" not in values:
            raise DataError("recipe: found no 'name', expected one")
        kwargs: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        for name in ("modalities", "percentiles"):
            if name in kwargs:
                expect(isinstance(kwargs[name], tuple), name, kwargs[name], "a list")
        spacing = kwargs.get("spacing")
        expect(spacing is None or isinstance(spacing, tuple), "spacing", spacing, "a list, or null")
        inner_kinds: dict[str, type] = {"bias_field_correction": BiasFieldCorrection, "split": SplitRule}
        for name, kind in inner_kinds.items():
            inner = kwargs.get(name)
            if inner is None and (name == "bias_field_correction" or name not in kwargs):
                continue
            expect(isinstance(inner, Mapping), name, inner, "an object")
            assert inner is not None
            known(inner, kind, name)
            kwargs[name] = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in inner.items()})
        return cls(**kwargs)


def read_recipe(name_or_path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The file of a recipe, and the JSON object in it.

    Args:
        name_or_path: as for :func:`load_recipe`.

    Raises:
        VaevqMedError: there is no such recipe, or it is no JSON object.
    """
    path = Path(name_or_path)
    if path.suffix != ".json":
        path = recipe_path(path.as_posix())
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"recipe {path}: found no readable file ({error.strerror}), expected JSON") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"recipe {path}: found invalid JSON ({error}), expected an object") from error
    if not isinstance(values, dict):
        raise DataError(f"recipe {path}: found {type(values).__name__}, expected a JSON object")
    return path, values


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a recipe that ships with the package, or a file of one's own.

    Args:
        name_or_path: e.g. ``brats24/axial_256``, or the path of a ``.json`` file.

    Raises:
        VaevqMedError: there is no such recipe, or it is not valid.

    Examples:
        >>> load_recipe("brats24/axial_256").percentiles
        (0.0, 99.5)
    """
    path, values = read_recipe(name_or_path)
    try:
        return Recipe.from_dict(values)
    except DataError as error:
        raise DataError(f"recipe {path}: {error}") from error


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
