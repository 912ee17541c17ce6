"""The file of a study of rate against distortion: which volumes, which codecs and tokenizers, at which settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from vaevq_med.codec.classical import find_codecs
from vaevq_med.core.names import nearest
from vaevq_med.study.part import AnyStudy, Count, Name, Part, by_name, each_once, named, refuse

Bits = Annotated[list[Annotated[int, Field(ge=8, le=16)]], Field(min_length=1), AfterValidator(each_once)]
Setting = int | float
Settings = Annotated[list[Setting], Field(min_length=1), AfterValidator(each_once)]


def _known_codec(name: str) -> str:
    if name not in find_codecs():
        expected = nearest(name, find_codecs()) or f"one of {', '.join(sorted(find_codecs()))}"
        raise refuse(f"{name}; expected {expected}")
    return name


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
    coder: str = "adaptive"
    coder_model: Path | None = None
    settings: Settings = [0.0]


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


class RateDistortionStudy(AnyStudy):
    """Bytes of volumes against what is left of them.

    Attributes:
        output: folder of everything that is written.
        input: folder of cases, as ``slice-extract`` knows them.
        cases: CSV of paths, for another layout.
        split_file: who stands in which split; None takes every patient.
        split: whose patients are coded.
        recipe: whose window makes intensities comparable.
        contrasts: of each case that are coded.
        bits: a sample of the data that classical codecs are given.
        codecs: classical ones, by name or in full.
        tokenizers: trained ones.
        background: ``decoded`` judges what comes back; ``masked`` sets the background of every row to 0, and counts the
            bytes of the mask where a row's files have none of their own.
        lossless: whether codecs that can are also run without loss.
        slices: with content, evenly spaced, of which SSIM is; None takes all of them.
        rates: in bits a voxel, at which the table reads the curves.
        anchors: names of rows that BD-rates are stated against.
        perceptual: the distance by features, or None for none.
        notes: sentences that stand under the table.
    """

    study: Literal["rate_distortion"]
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
    rates: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)] = [0.012, 0.02, 0.041, 0.05, 0.1, 0.2]
    anchors: list[str] = []
    perceptual: Perceptual | None = Perceptual()
    notes: list[str] = []

    @property
    def label(self) -> str:
        """Its name, or what it does."""
        return self.name or "rate-distortion"
