"""What a kind of foreign tokenizer says of itself: which file it reads, with which options, and what it becomes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vaevq_med.core.declared import Declared, option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AdoptOptions(Declared):
    """Options of every kind.

    Attributes:
        image_size: side of an image.
        in_channels: channels of an image here.
    """

    image_size: int | None = option(None, "Side of the images, in pixels; by default the published one.", min=1)
    in_channels: int | None = option(
        None,
        "Channels of an image here: the network's, which is the default, or 1, repeated on the way in and averaged on "
        "the way out.",
        min=1,
    )


@dataclass(frozen=True, kw_only=True)
class AdapterOptions(AdoptOptions):
    """Of networks of other packages.

    Attributes:
        value_range: what black and white are to the network.
        depth: slices of an item.
    """

    value_range: str = option(
        "", "What black and white are to the network; by default those of the kind.", metavar="LOW,HIGH"
    )
    depth: int | None = option(None, "Slices that a network of volumes is given at once.", min=1)


@dataclass(frozen=True, kw_only=True)
class LatentOptions:
    """Of networks whose latent is continuous: how it becomes numbers of so many bits.

    Attributes:
        latent_bits: of a channel of a position.
        latent_range: of every channel.
        latent_from: data set that it is measured on.
        latent_images: of it.
    """

    latent_bits: int = option(8, "Bits of each channel of a continuous latent.", min=1, max=16)
    latent_range: str = option("", "Range of its channels, given.", metavar="LOW,HIGH")
    latent_from: Path | None = option(
        None, "Data set on whose images its range is measured, channel by channel.", metavar="DATASET"
    )
    latent_images: int = option(64, "Images of the training split that it is measured on.", min=1)


@dataclass(frozen=True)
class Adopted:
    """A foreign tokenizer in the form of this package.

    Attributes:
        definition: of the network, plain values with ``_target_``; a continuous one's quantizer comes later.
        network: its state dictionary.
        image_size: published side of its images.
        in_channels: of an image.
        averaged: the same of averaged weights, where the file has some.
        files: of which it was made.
        depth: slices of an item, of a network of volumes.
        latent_channels: of a continuous latent that is still to be quantized.
        notes: what the user has to be told.
    """

    definition: Mapping[str, Any]
    network: Mapping[str, Tensor]
    image_size: int
    in_channels: int
    averaged: Mapping[str, Tensor] | None = None
    files: tuple[Path, ...] = ()
    depth: int | None = None
    latent_channels: int | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)


REPEATED = "gray images: repeated to the network's channels on the way in, averaged on the way out"


class Kind(ABC):
    """A kind of foreign tokenizer; a class of it in a module of this room, or in one of a package's entry points.

    Attributes:
        name: on the command line.
        title: whose it is, and its source.
        source: what the file or folder is.
        license: that the published weights and the code are under, in a few words.
        options: dataclass of its options, an :class:`AdoptOptions`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    license: ClassVar[str]
    options: ClassVar[type[AdoptOptions]] = AdoptOptions

    @abstractmethod
    def read(self, source: Path, options: Any) -> Adopted:
        """Read a file or a folder.

        Args:
            source: which.
            options: an instance of :attr:`options`.

        Raises:
            VaevqMedError: it is not what was said; one line of found and expected.
        """
