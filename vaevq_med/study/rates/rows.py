"""The rows of a study of rate against distortion, from what its file names."""

from __future__ import annotations

from vaevq_med.codec.classical import codec_named
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.study.rates.candidates import Candidate, ClassicalCandidate
from vaevq_med.study.rates.file import CodecPart, VolumeStudy
from vaevq_med.study.rates.tokenizers import TokenizerCandidate


def classical(part: CodecPart, study: VolumeStudy) -> list[ClassicalCandidate]:
    """A codec's rows: one a number of bits; two numbers that its library codes alike are one row."""
    codec = codec_named(part.name)
    depths = dict.fromkeys(codec.depth(bits) for bits in part.bits or study.bits)
    title = part.title or codec.title
    settings = tuple(part.settings or codec.settings)
    return [
        ClassicalCandidate(f"{part.name}_{depth}", f"{title}, {depth} bit", settings, codec, depth) for depth in depths
    ]


def candidates(study: VolumeStudy) -> list[Candidate]:
    """All rows of a study, in its order, each checked for what it needs.

    Raises:
        VaevqMedError: two rows have one name, or a package or a checkpoint is missing.
    """
    found: list[Candidate] = [TokenizerCandidate.of(part) for part in study.tokenizers]
    found += [row for part in study.codecs for row in classical(part, study)]
    names = [row.name for row in found]
    for name in names:
        if names.count(name) > 1:  # of a tokenizer, since those of codecs differ
            raise VaevqMedError(f"tokenizers has {name}, which is the row of a codec; expected another name")
    for row in found:
        row.made_of()
    return found
