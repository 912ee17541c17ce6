"""Preprocessing recipes: every number with which volumes become slices, and images a data set, read from JSON."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field

from vaevq_med.core.errors import DataError
from vaevq_med.core.options import Number, Options
from vaevq_med.core.resources import recipe_path
from vaevq_med.images.splits import SplitRule

MAX_SIZE = 4096
_RESERVED = ("seg", "case", "patient", "image")
_EXTRACTOR, _SIGNED_EXTRACTOR, _WRITER = 1, 2, 1
"""Part of a recipe's hash; a change of what the same recipe writes, of a volume or of a picture, raises it."""


def _each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names) or set(names) & set(_RESERVED):
        raise ValueError
    return names


def _rising(pair: tuple[Number, Number]) -> tuple[Number, Number]:
    if not pair[0] < pair[1]:
        raise ValueError
    return pair


def _with_patient(pattern: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            groups = re.compile(pattern).groupindex
    except (re.error, OverflowError, RecursionError):
        groups = {}
    if "patient" not in groups:
        raise ValueError
    return pattern


class AnyRecipe(Options, ABC):
    """What every recipe has.

    Attributes:
        name: what the recipe is called.
        description: one line for a reader.
    """

    name: str = Field(min_length=1)
    description: str = ""

    @classmethod
    def load(cls, name_or_path: str | Path) -> Self:
        """Read a recipe that ships with the package, or a file of one's own.

        Args:
            name_or_path: e.g. ``brats24/axial_256``, or the path of a ``.json`` file.

        Raises:
            VaevqMedError: there is no such recipe, or it is not valid.

        Examples:
            >>> Recipe.load("brats24/axial_256").percentiles, ImageRecipe.load("imagenet/short_256").resize
            ((0.0, 99.5), 256)
        """
        path = Path(name_or_path)
        if path.suffix != ".json" and path.is_file():
            raise DataError(f"recipe {path}: found the suffix {path.suffix!r}, expected .json")
        if path.suffix != ".json":
            path = recipe_path(path.as_posix())
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"recipe {path}: found no readable file ({error.strerror}), expected JSON") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"recipe {path}: found invalid JSON ({error}), expected an object") from error
        return cls.read(values, f"recipe {path}")

    @abstractmethod
    def summary(self) -> str:
        """What tells it from others, for a message."""

    @property
    @abstractmethod
    def image_hash(self) -> str:
        """SHA-256 of everything that decides the images' bytes."""


class BiasFieldCorrection(Options):
    """N4 bias-field correction (Tustison et al. 2010, doi:10.1109/TMI.2010.2046908).

    Attributes:
        shrink_factor: the field is fitted on every so many voxels along each axis.
        iterations: at most this many at each resolution level, coarse to fine.
    """

    shrink_factor: int = Field(default=4, ge=1, le=16)
    iterations: tuple[Annotated[int, Field(ge=1, le=1000)], ...] = Field(
        default=(50, 50, 50, 50), min_length=1, max_length=8, description="1 to 8 whole numbers from 1 to 1000"
    )


Length = Annotated[Number, Field(ge=0.05, le=50)]
Percent = Annotated[Number, Field(ge=0, le=100)]


class Recipe(AnyRecipe):
    """What is done to a case, in this order.

    Attributes:
        modalities: contrasts that every case must have; their order gives the class labels.
        axis: where the slices are cut.
        max_obliquity_degrees: a volume whose axes lean further is refused, unless ``spacing`` resamples it.
        bias_field_correction: N4, or None.
        spacing: resample to voxels of this size, in mm (right-left, posterior-anterior, inferior-superior), or None.
        clip_negatives: set negative intensities to 0, as background; otherwise they are kept, for volumes that are
            z-scored or scaled to [-1, 1], and the background is made black.
        percentiles: of a volume's foreground; they become black and white.
        min_foreground: drop a slice with a smaller share of foreground, in any of the contrasts.
        size: side of the square slices, in pixels.
        interpolation: of images; labels take the nearest.
        antialias: low-pass filter before shrinking.
        format: ``png`` (8 bit), ``png16`` (16 bit) or ``npy`` (float32 in [0, 1]).
        split: how patients are dealt to splits.
    """

    modalities: Annotated[tuple[Annotated[str, Field(pattern="^[a-z0-9]{1,16}$")], ...], AfterValidator(_each_once)] = (
        Field(
            default=("t1n", "t1c", "t2w", "t2f"),
            min_length=1,
            description=f"names of lower-case letters and digits other than {', '.join(_RESERVED)}, each one once",
        )
    )
    axis: Literal["axial", "coronal", "sagittal"] = "axial"
    max_obliquity_degrees: Number = Field(default=1.0, ge=0, le=45)
    bias_field_correction: BiasFieldCorrection | None = None
    spacing: tuple[Length, Length, Length] | None = Field(default=None, description="three lengths from 0.05 to 50 mm")
    clip_negatives: bool = True
    percentiles: Annotated[tuple[Percent, Percent], AfterValidator(_rising)] = Field(
        default=(0.0, 99.5), description="two rising numbers in [0, 100]"
    )
    min_foreground: Number = Field(default=0.05, ge=0, le=1, description="a share in [0, 1]")
    size: int = Field(default=256, ge=8, le=MAX_SIZE, description=f"8 to {MAX_SIZE} pixels")
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    antialias: bool = True
    format: Literal["png", "png16", "npy"] = "png"
    split: SplitRule = SplitRule()

    def summary(self) -> str:  # noqa: D102
        return f"{self.name} at {self.size} pixels as {self.format}"

    @property
    def image_hash(self) -> str:
        """SHA-256 of everything that decides the images' bytes: all but the name, description and split."""
        extractor = _EXTRACTOR if self.clip_negatives else _SIGNED_EXTRACTOR
        content = {k: v for k, v in self.to_dict().items() if k not in ("name", "description", "split")}
        return hashlib.sha256(json.dumps([extractor, content], sort_keys=True).encode()).hexdigest()


class ImageRecipe(AnyRecipe):
    """What is done to each image.

    Attributes:
        resize: shrink to this length of the shorter side, in pixels; None keeps every file's bytes. A file whose
            shorter side is no longer keeps its bytes too.
        format: of what is shrunk; 16-bit images become PNG either way.
        quality: of JPEG, without chroma subsampling.
        holdout: share of the training images that is set aside as validation, by the hash of their names; the
            validation images then make the test split.
        split: how the images of a folder without splits are dealt.
        patient: regular expression whose group ``patient`` (and perhaps ``case``) names whom an image shows, in its
            file's name, or in its path where the expression has a slash; None takes all images as independent.
    """

    resize: int | None = Field(default=None, ge=8, le=MAX_SIZE, description=f"8 to {MAX_SIZE} pixels")
    format: Literal["jpeg", "png"] = "jpeg"
    quality: int = Field(default=95, ge=1, le=100)
    holdout: Number = Field(default=0.0, ge=0, le=0.5, description="a share in [0, 0.5]")
    split: SplitRule = SplitRule()
    patient: Annotated[str, AfterValidator(_with_patient)] | None = Field(
        default=None, description="a regular expression with a group (?P<patient>...)"
    )

    def summary(self) -> str:  # noqa: D102
        return f"{self.name} {'as they are' if self.resize is None else f'at {self.resize} pixels'}"

    @property
    def image_hash(self) -> str:  # noqa: D102
        content: Any = None if self.resize is None else [self.resize, self.format, self.quality]
        return hashlib.sha256(json.dumps([_WRITER, content]).encode()).hexdigest()
