"""What a study of rate against distortion compares: classical codecs at a number of bits, and tokenizers."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from vaevq_med.codec.classical import ClassicalCodec
from vaevq_med.study.rates.scans import Scan, ScanFile


def processor_seconds() -> float:
    """Seconds of a core that this process and its ended children have had, which other programs do not prolong."""
    return time.process_time() + sum(os.times()[2:4])


@dataclass(frozen=True)
class Coded:
    """A volume that was coded and decoded.

    Attributes:
        size: bytes of all its files.
        unit: what came back, float32 ``[Z, Y, X]`` in [0, 1].
        encode_seconds: of one core.
        decode_seconds: of one core.
        parts: what the bytes are made of, where that is known.
    """

    size: int
    unit: NDArray[np.float32]
    encode_seconds: float
    decode_seconds: float
    parts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate(ABC):
    """A row of the table.

    Attributes:
        name: in records and file names.
        title: in tables.
        settings: that draw its curve.
        lossless: the setting without loss, where it has one.
        has_mask: whether its files say exactly which voxels are background.
    """

    name: str
    title: str
    settings: tuple[float, ...]
    lossless: ClassVar[float | None] = None
    has_mask: ClassVar[bool] = False

    @property
    def shipped(self) -> int:
        """Bytes that a decoder needs once, besides the files."""
        return 0

    @property
    @abstractmethod
    def slices_alone(self) -> bool:
        """Whether each slice is coded without the others."""

    def first_seen(self, patients: Collection[str]) -> tuple[str, str] | None:
        """The first of some patients whom it was trained on, and by which file; None without."""
        return None

    @abstractmethod
    def made_of(self) -> Mapping[str, Any]:
        """What its files depend on besides the setting and the volume, as plain values.

        Raises:
            VaevqMedError: something that it needs is not there.
        """

    @abstractmethod
    def code(self, file: ScanFile, scan: Scan, setting: float) -> Coded:
        """Encode and decode a volume.

        Args:
            file: where it is.
            scan: its content.
            setting: one of :attr:`settings`.
        """


def mask_bytes(brain: NDArray[np.bool_]) -> int:
    """What a mask of the foreground, ``[Z, Y, X]``, costs beside files that have none."""
    from vaevq_med.codec.coders.mask import encode_mask

    return len(encode_mask(brain))


def as_judged(coded: Coded, row: Candidate, brain: NDArray[np.bool_], mask: int | None) -> Coded:
    """What is counted and judged of a result.

    Args:
        coded: as it came back.
        row: whose it is.
        brain: the foreground.
        mask: bytes of its mask where the background of every row is set to 0; None judges what comes back.
    """
    if mask is None:
        return coded
    own = {} if row.has_mask else {"mask": mask}
    unit = coded.unit * brain
    return replace(coded, size=coded.size + sum(own.values()), unit=unit, parts={**coded.parts, **own})


@dataclass(frozen=True)
class ClassicalCandidate(Candidate):
    """A classical codec of data of so many bits.

    Attributes:
        codec: which.
        bits: a sample that it is given.
    """

    codec: ClassicalCodec
    bits: int

    @property
    def lossless(self) -> float | None:  # type: ignore[override]
        """As the codec says."""
        return self.codec.lossless

    @property
    def slices_alone(self) -> bool:
        """As the codec says."""
        return self.codec.slices_alone

    def made_of(self) -> Mapping[str, Any]:
        """Name, bits, and the versions of its packages."""
        return {"codec": self.codec.name, "bits": self.bits, "versions": dict(self.codec.versions())}

    def code(self, file: ScanFile, scan: Scan, setting: float) -> Coded:
        """Round to whole numbers of so many bits, encode, and decode."""
        top = 2**self.bits - 1
        volume = np.rint(scan.unit * top).astype(np.uint8 if self.bits <= 8 else np.uint16)
        self.codec.check()  # what is imported now costs the codec no time
        begun = processor_seconds()
        files = self.codec.encode(volume, self.bits, setting)
        encoded = processor_seconds()
        found = self.codec.decode(files, volume.shape, self.bits)
        decoded = processor_seconds()
        unit = found.astype(np.float32) / top
        sizes = {"slices": len(files[0]), "streams": sum(map(len, files[1:]))}
        return Coded(sum(map(len, files)), unit, encoded - begun, decoded - encoded, sizes)
