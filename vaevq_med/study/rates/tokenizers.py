"""A trained tokenizer as a row of a study of rate against distortion: whole cases, compressed and decompressed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.study.rates.candidates import Candidate, Coded
from vaevq_med.study.rates.file import TokenizerPart
from vaevq_med.study.rates.scans import Scan, ScanFile


@dataclass(frozen=True)
class TokenizerCandidate(Candidate):
    """A checkpoint, an entropy coder, and weights of the code lengths.

    A case is one file of all its contrasts. A contrast is counted with its own parts and its share of what the
    contrasts have in common: those bytes divided by the number of contrasts.

    Attributes:
        part: as the study's file says.
    """

    has_mask: ClassVar[bool] = True

    part: TokenizerPart

    @classmethod
    def of(cls, part: TokenizerPart) -> TokenizerCandidate:
        """A row of a study's file."""
        return cls(part.name, part.title or part.name, tuple(part.settings), part)

    @property
    def slices_alone(self) -> bool:
        """A 2D tokenizer codes each slice by itself; its entropy coder may look at the slice below."""
        return True

    def made_of(self) -> Mapping[str, Any]:
        """The checkpoint and the coder."""
        raise VaevqMedError(
            f"tokenizers has {self.name}; expected none: this version does not code with tokenizers yet"
        )

    def code(self, file: ScanFile, scan: Scan, setting: float) -> Coded:
        """Compress the case, decompress it, and look at the contrast through the scan's window."""
        raise NotImplementedError
