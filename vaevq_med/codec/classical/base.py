"""What every classical codec is, and how those of this folder are found."""

from __future__ import annotations

import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaevq_med.codec.errors import CodecError
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.names import nearest

Volume = NDArray[np.uint8] | NDArray[np.uint16]
EXTRA = 'pip install "vaevq_med[codecs]"'


class MissingCodecError(CodecError):
    """The package that has a codec is not installed."""


@dataclass(frozen=True, kw_only=True)
class ClassicalCodec(ABC):
    """Arrays to bytes and back, in one thread.

    Slices that hold nothing are coded by nobody: a first file of one bit a slice says which there are, so that the
    headers of blank slices, 85 to 385 bytes each, are counted against no codec. Lengths of files are not counted, as a
    folder keeps them.

    Attributes:
        name: in study files and records.
        title: in tables.
        packages: the distributions that it comes from.
        slices_alone: whether it codes each slice without the others.
        depths: bits a sample that it can code.
        setting: what its setting is called, e.g. ``crf``.
        settings: that draw its curve, from the smallest files to the largest.
        range: the lowest and the highest setting that its library takes.
        whole: whether only whole numbers are settings.
        lossless: the setting without loss, where it has one; it may lie beside the range.
    """

    name: str
    title: str
    packages: tuple[str, ...]
    slices_alone: bool
    depths: tuple[int, ...]
    setting: str
    settings: tuple[float, ...]
    range: tuple[float, float]
    whole: bool = False
    lossless: float | None = None
    notes: str = field(default="")

    def depth(self, bits: int) -> int:
        """Bits a sample that it codes where so many are wanted: the most that it can, but not more."""
        fitting = [depth for depth in self.depths if depth <= bits]
        if not fitting:
            raise CodecError(f"{self.name}: bits is {bits}; expected one of {', '.join(map(str, self.depths))}")
        return max(fitting)

    def takes(self, setting: float) -> bool:
        """Whether its library takes a setting; some of the others end the process."""
        if setting == self.lossless:
            return True
        low, high = self.range
        return math.isfinite(setting) and low <= setting <= high and (not self.whole or setting == int(setting))

    @property
    def expected(self) -> str:
        """Which settings it takes, in words."""
        low, high = self.range
        beside = self.lossless is not None and not low <= self.lossless <= high
        numbers = f"{'whole numbers' if self.whole else 'numbers'} from {low:g} to {high:g}"
        return f"{numbers}{f', or {self.lossless:g} for no loss' if beside else ''}"

    def encode(self, volume: Volume, bits: int, setting: float) -> list[bytes]:
        """The files of a volume.

        Args:
            volume: ``[Z, Y, X]`` of whole numbers below 2 to the power of ``bits``, with a background of 0.
            bits: one of :attr:`depths`; above 8 the volume is of 16-bit numbers.
            setting: see :attr:`setting`.

        Returns:
            First that of one bit a slice, then those of the codec.

        Raises:
            CodecError: its package is missing, the volume is of another kind, or it takes no such setting; or its
                library failed.
        """
        self.check()
        expected = np.uint8 if bits <= 8 else np.uint16
        if bits not in self.depths or volume.dtype != expected or volume.ndim != 3:
            raise CodecError(
                f"{self.name}: the volume is {volume.dtype} {list(volume.shape)} at {bits} bits; expected "
                f"{np.dtype(expected)} [Z, Y, X] at {' or '.join(map(str, self.depths))} bits"
            )
        if not self.takes(setting):
            raise CodecError(f"{self.name}: {self.setting} is {setting}; expected {self.expected}")
        live = volume.any(axis=(1, 2))  # [Z]
        found: Volume = volume[live]
        with self._own_errors("encode"):
            files = self._encode(found, bits, setting) if live.any() else []
        return [np.packbits(live).tobytes(), *files]

    def decode(self, files: Sequence[bytes], shape: tuple[int, int, int], bits: int) -> Volume:
        """The volume of files that :meth:`encode` made.

        Args:
            files: all of them.
            shape: of the volume.
            bits: as it was encoded with.

        Raises:
            CodecError: its package is missing, or its library failed.
        """
        live = np.unpackbits(np.frombuffer(files[0], np.uint8))[: shape[0]].astype(bool)
        volume = np.zeros(shape, np.uint8 if bits <= 8 else np.uint16)
        if live.any():
            with self._own_errors("decode"):
                volume[live] = self._decode(files[1:], (int(live.sum()), *shape[1:]), bits)
        return volume

    @contextmanager
    def _own_errors(self, way: str) -> Iterator[None]:
        """Whatever a library raises inside is told as an error of this codec, since each has kinds of its own."""
        try:
            yield
        except (VaevqMedError, MemoryError):
            raise
        except Exception as error:
            said = " ".join(f"{type(error).__name__}: {error}".rstrip(": ").split())[:200]
            raise CodecError(f"{self.name}: found that its library failed to {way} ({said})") from error

    def versions(self) -> Mapping[str, str]:
        """What made the files, for a record.

        Raises:
            MissingCodecError: a package is not installed.
        """
        try:
            return {package: version(package) for package in self.packages}
        except PackageNotFoundError as error:
            raise MissingCodecError(
                f"{self.name} needs {error.name}, which is not installed; expected it: {EXTRA}"
            ) from None

    def check(self) -> None:
        """Refuse to go on without its packages.

        Raises:
            MissingCodecError: naming what is missing, and how to install it.
        """
        for package in self.packages:
            self._load(package.replace("-", "_"))

    def _load(self, module: str) -> Any:
        """A module of one of its packages, imported when it is used."""
        try:
            return importlib.import_module(module)
        except ImportError:
            missing = module.split(".")[0].replace("_", "-")
            raise MissingCodecError(
                f"{self.name} needs {missing}, which is not installed; expected it: {EXTRA}"
            ) from None

    @abstractmethod
    def _encode(self, volume: Volume, bits: int, setting: float) -> list[bytes]:
        """The files of the slices that hold something, at least one."""

    @abstractmethod
    def _decode(self, files: Sequence[bytes], shape: tuple[int, int, int], bits: int) -> Volume:
        """These slices again."""


@cache
def find_codecs() -> Mapping[str, ClassicalCodec]:
    """The codecs of this folder by name: each of its files lists its own in ``CODECS``."""
    package = importlib.import_module(__package__ or "")
    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    codecs = [codec for module in modules for codec in getattr(module, "CODECS", ())]
    return {codec.name: codec for codec in codecs}


def codec_named(name: str) -> ClassicalCodec:
    """A codec by its name.

    Raises:
        CodecError: there is none; the message has the nearest name.
    """
    codecs = find_codecs()
    if name not in codecs:
        expected = nearest(name, codecs) or f"one of {', '.join(sorted(codecs))}"
        raise CodecError(f"codec is {name}; expected {expected}")
    return codecs[name]
