"""The file of a study of downstream tasks: that of coded volumes, with the instruments that judge them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from vaevq_med.study.part import Count, Part, each_once, refuse
from vaevq_med.study.rates.file import VolumeStudy

Diameter = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
Strength = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Volume = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _rising(values: list[float]) -> list[float]:
    if values != sorted(set(values)):
        raise refuse(f"lesion_sizes is {values}; expected two rising volumes in ml", "volumes")
    return values


class Detectability(Part):
    """Synthetic lesions that an observer looks for.

    Attributes:
        contrast: of the case, in which they are brighter than the tissue around them.
        diameters: in mm.
        strengths: what is added, in units of the window.
        draws: copies of each case, in which every diameter and strength is placed once.
        seed: of the places.
    """

    contrast: str = "t2f"
    diameters: Annotated[list[Diameter], Field(min_length=1), AfterValidator(each_once)] = [3.0, 5.0, 8.0, 12.0]
    strengths: Annotated[list[Strength], Field(min_length=1), AfterValidator(each_once)] = [0.05, 0.1, 0.2]
    draws: Count = 2
    seed: Annotated[int, Field(ge=0)] = 0


class TasksStudy(VolumeStudy):
    """What is left for a diagnosis in volumes that were coded.

    Attributes:
        contrasts: of each case that are coded.
        lossless: whether codecs that can are also run without loss.
        segmenter: checkpoint of a segmentation network; None leaves segmentation out.
        lesion_sizes: in ml, where small lesions end and large ones begin; None for the tertiles of the lesions of the
            split file's training patients.
        radiomics: whether features of the tumor's regions are compared.
        detectability: synthetic lesions, or None for none.
    """

    study: Literal["tasks"]
    contrasts: Annotated[list[str], Field(min_length=1), AfterValidator(each_once)] = ["t1n", "t1c", "t2w", "t2f"]
    lossless: bool = False
    segmenter: Path | None = None
    lesion_sizes: Annotated[list[Volume], Field(min_length=2, max_length=2), AfterValidator(_rising)] | None = None
    radiomics: bool = True
    detectability: Detectability | None = Detectability()

    @model_validator(mode="after")
    def _coded(self) -> TasksStudy:
        asked = self.detectability
        if asked is not None and asked.contrast not in self.contrasts:
            raise refuse(
                f"detectability.contrast is {asked.contrast}; expected one of contrasts ({', '.join(self.contrasts)})",
                "name",
            )
        return self

    @property
    def label(self) -> str:
        """Its name, or what it does."""
        return self.name or "tasks"
