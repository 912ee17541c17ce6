"""A tokenizer of another package as one of this one: its channels, its range of values, its encoder and its decoder.

Between them stands a quantizer of this package, with the foreign codebook or, for a continuous latent, with its int8
grid, so that codes, indices and bits mean what they mean everywhere.
"""

from __future__ import annotations

import importlib
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.base import Tokenizer
from vaevq_med.networks.blocks import check_channels
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.quantizers.base import Quantizer


class ForeignTokenizer(Tokenizer):
    """What every adapter does: one says how the foreign network encodes and decodes.

    Of images with one channel a network with several gets the channel repeated, and of what it decodes the channels'
    mean is taken.

    Args:
        quantizer: of the foreign latent; its ``embedding_dim`` is the latent's channels.
        factors: image sizes over those of the latent grid, an axis each.
        own_channels: image channels of the foreign network.
        in_channels: image channels here: those of the network, or 1; None takes the network's.
        value_range: what black and white are to the foreign network.
        variational: whether the foreign encoder gives a posterior.
        finest_channels: channels of its finest feature map.

    Attributes:
        in_channels: image channels C.
        needed_packages: whose classes it builds.
        needed_trust: what the user has to trust for it to be loaded, and why.

    Raises:
        VaevqMedError: channels or a range that cannot be.
    """

    needed_packages: ClassVar[tuple[str, ...]] = ()
    needed_trust: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        *,
        quantizer: Quantizer,
        factors: Sequence[int],
        own_channels: int,
        in_channels: int | None = None,
        value_range: Sequence[float] = (-1.0, 1.0),
        variational: bool = False,
        finest_channels: int = 128,
    ) -> None:
        super().__init__()
        if in_channels not in (None, 1, own_channels):
            raise VaevqMedError(
                f"in_channels is {in_channels}; expected {own_channels}, as the foreign network has, or 1, repeated"
            )
        if len(value_range) != 2 or not -math.inf < value_range[0] < value_range[1] < math.inf:
            raise VaevqMedError(f"value_range is {list(value_range)}; expected a smaller and a larger number, finite")
        self.quantizer = quantizer
        self.embedding_dim = quantizer.embedding_dim
        self.own_channels = own_channels
        self.in_channels = in_channels or own_channels
        self.low, self.high = map(float, value_range)
        self.variational = variational
        self.takes_volumes = len(factors) == 3
        self._factors = tuple(map(int, factors))
        self._finest_channels = finest_channels

    @property
    def factors(self) -> tuple[int, ...]:
        """Image sizes over those of the latent grid, an axis each."""
        return self._factors

    @property
    def finest_channels(self) -> int:
        """Channels of the finest feature map."""
        return self._finest_channels

    @abstractmethod
    def foreign_encode(self, images: Tensor) -> DiagonalGaussian | Tensor:
        """The posterior or the latent of images as the foreign network takes them."""

    @abstractmethod
    def foreign_decode(self, codes: Tensor) -> Tensor:
        """Images, in the foreign range, of a latent ``[B, D, *grid]``."""

    def encode(self, images: Tensor) -> DiagonalGaussian | Tensor:
        """The posterior of ``[B, C, H, W]`` in [-1, 1], or, without one, the latent ``[B, D, *grid]``.

        Raises:
            VaevqMedError: the images have other channels or axes, or a size that the factors do not divide.
        """
        check_channels(images, self.in_channels, "the image")
        self.grid_of(images.shape[2:])
        images = (images + 1) * ((self.high - self.low) / 2) + self.low
        return self.foreign_encode(images.expand(-1, self.own_channels, *images.shape[2:]))

    def decode(self, codes: Tensor) -> Tensor:
        """Images ``[B, C, H, W]``, nominally in [-1, 1], of codes or of a continuous latent."""
        images = (self.foreign_decode(codes) - self.low) * (2 / (self.high - self.low)) - 1
        check_channels(images, self.own_channels, "the foreign network's output")
        return images if self.in_channels == self.own_channels else images.mean(dim=1, keepdim=True)


def needed(package: str, extra: str = "") -> Any:
    """A package that an adapter needs.

    Args:
        package: as it is imported, and where it is on an index.
        extra: of this package that brings it.

    Raises:
        VaevqMedError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        root = package.partition(".")[0]
        told = f"pip install vaevq_med[{extra}]" if extra else f"pip install {root}"
        found = "it is not installed" if getattr(error, "name", None) == root else f"it cannot be imported ({error})"
        raise VaevqMedError(f"package {root}: {found}, expected it for this tokenizer; {told}") from None
