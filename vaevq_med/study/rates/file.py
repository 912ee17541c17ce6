"""The file of a study of rate against distortion: which volumes, which codecs and tokenizers, at which settings."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from vaevq_med.codec.classical import codec_named, find_codecs
from vaevq_med.codec.coders.registry import known_coders
from vaevq_med.core.names import nearest
from vaevq_med.study.part import AnyStudy, Count, Name, Part, by_name, each_once, named, refuse

Bits = Annotated[list[Annotated[int, Field(ge=8, le=16)]], Field(min_length=1), AfterValidator(each_once)]
Setting = int | float
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _finite(values: list[Setting]) -> list[Setting]:
    wrong = next((value for value in values if not math.isfinite(value)), None)
    if wrong is not None:
        raise refuse(f"a list with {wrong}; expected finite numbers")
    return values


Settings = Annotated[list[Setting], Field(min_length=1), AfterValidator(_finite), AfterValidator(each_once)]


def _known(name: str, known: Collection[str]) -> str:
    if name not in known:
        expected = nearest(name, known) or f"one of {', '.join(sorted(known))}"
        raise refuse(f"{name}; expected {expected}")
    return name


def _known_codec(name: str) -> str:
    return _known(name, find_codecs())


def _known_coder(name: str) -> str:
    return _known(name, known_coders())


class CodecPart(Part):
    """A classical codec.

    Attributes:
        name: of one in ``vaevq_med.codec.classical``.
        title: what tables call it; by default the codec's own.
        bits: a sample of the data, each a row; None for those of the study. Where a library codes fewer, it is given
            the most that it does.
        settings: that draw its curve; None for the codec's own.
    """

    name: Annotated[str, AfterValidator(_known_codec)]
    title: str = ""
    bits: Bits | None = None
    settings: Settings | None = None

    @field_validator("settings")
    @classmethod
    def _taken(cls, settings: list[Setting] | None, info: ValidationInfo) -> list[Setting] | None:
        if settings is not None and "name" in info.data:  # otherwise the name is what is wrong
            codec = codec_named(info.data["name"])
            wrong = next((setting for setting in settings if not codec.takes(setting)), None)
            if wrong is not None:
                raise refuse(f"a list with {wrong}; expected {codec.expected} ({codec.setting})")
        return settings


class TokenizerPart(Part):
    """A trained tokenizer as a codec.

    Attributes:
        name: of its records.
        title: what tables call it.
        checkpoint: of it.
        coder: of the indices, by its name.
        coder_model: file that the coder needs besides.
        settings: weights of the code lengths in the choice of codewords, that draw its curve; 0 is the nearest.
    """

    name: Name
    title: str = ""
    checkpoint: Path
    coder: Annotated[str, AfterValidator(_known_coder)] = "adaptive"
    coder_model: Annotated[Path | None, Field(validate_default=True)] = None
    settings: Settings = [0.0]

    @field_validator("coder_model")
    @classmethod
    def _needed(cls, model: Path | None, info: ValidationInfo) -> Path | None:
        coder = info.data.get("coder")  # missing where the name is what is wrong
        if coder is not None and known_coders()[coder].needs_model != (model is not None):
            if model is None:
                raise refuse(f"null; expected the file that the coder {coder} needs")
            raise refuse(f"{model}; expected none, since the coder {coder} takes none")
        return model

    @field_validator("settings")
    @classmethod
    def _weights(cls, settings: list[Setting]) -> list[Setting]:
        wrong = next((setting for setting in settings if setting < 0), None)
        if wrong is not None:
            raise refuse(f"a list with {wrong}; expected weights of 0 or more")
        return settings


class Perceptual(Part):
    """The distance by features of a network.

    Attributes:
        network: its name.
        weights: its file, where it needs one.
        slices: evenly spaced ones of those with content, that it looks at.
    """

    network: str = "efficientnet-lite0"
    weights: Path | None = None
    slices: Count = 24


class VolumeStudy(AnyStudy):
    """What every study of coded volumes says.

    Attributes:
        output: folder of everything that is written.
        input: folder of cases, as ``slice-extract`` knows them.
        cases: CSV of paths, for another layout.
        split_file: who stands in which split; None takes every patient.
        split: whose patients are coded; under ``training`` also those whom a tokenizer was trained on.
        recipe: whose window makes intensities comparable.
        contrasts: of each case that are coded.
        bits: a sample of the data that classical codecs are given.
        codecs: classical ones, by name or in full.
        tokenizers: trained ones.
        background: ``decoded`` judges what comes back; ``masked`` sets the background of every row to 0, and counts the
            bytes of the mask where a row's files have none of their own.
        lossless: whether codecs that can are also run without loss.
        slices: with content, evenly spaced, of which SSIM is; None takes all of them.
        perceptual: the distance by features, or None for none.
        notes: sentences that stand under the table.
    """

    output: Path
    input: Path
    cases: Path | None = None
    split_file: Path | None = None
    split: Literal["training", "validation", "test"] = "test"
    recipe: str = "brats24/axial_256"
    contrasts: Annotated[list[str], Field(min_length=1), AfterValidator(each_once)] = ["t1c", "t2f"]
    bits: Bits = [8]
    codecs: Annotated[list[Annotated[CodecPart, BeforeValidator(named)]], AfterValidator(by_name)] = []
    tokenizers: Annotated[list[TokenizerPart], AfterValidator(by_name)] = []
    background: Literal["decoded", "masked"] = "decoded"
    lossless: bool = True
    slices: Count | None = None
    perceptual: Perceptual | None = Perceptual()
    notes: list[str] = []


class RateDistortionStudy(VolumeStudy):
    """Bytes of volumes against what is left of them.

    Attributes:
        rates: in bits a voxel, at which the table reads the curves.
        anchors: names of rows that BD-rates are stated against.
    """

    study: Literal["rate_distortion"]
    rates: Annotated[list[Rate], Field(min_length=1)] = [0.012, 0.02, 0.041, 0.05, 0.1, 0.2]
    anchors: list[str] = []

    @property
    def label(self) -> str:
        """Its name, or what it does."""
        return self.name or "rate-distortion"
