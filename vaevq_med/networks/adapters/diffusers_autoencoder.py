"""What the autoencoders of ``diffusers`` have in common: how they are opened, and their sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from vaevq_med.core.components import constructed
from vaevq_med.networks.adapters.base import ForeignTokenizer, needed
from vaevq_med.networks.quantizers.base import Quantizer


class DiffusersAutoencoder(ForeignTokenizer):
    """A class of ``diffusers`` with an encoder and a decoder, and what makes its latent discrete.

    Args:
        config: the arguments of the class, as its ``config.json`` has them.
        quantizer: of its latent.
        in_channels: image channels here, see :class:`ForeignTokenizer`.
        value_range: what black and white are to it.

    Attributes:
        class_name: of the network, in ``diffusers``.
        has_posterior: whether its encoder gives one.
        unused_modules: of the network, without which it does its work here.
        network: the network itself.

    Raises:
        VaevqMedError: the package is not installed, or arguments that do not fit.
    """

    needed_packages = ("diffusers",)
    class_name: ClassVar[str]
    has_posterior: ClassVar[bool]
    unused_modules: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        *,
        config: Mapping[str, Any],
        quantizer: Quantizer,
        in_channels: int | None = None,
        value_range: Sequence[float] = (-1.0, 1.0),
    ) -> None:
        network = constructed(getattr(needed("diffusers", "diffusers"), self.class_name), config, self.class_name)
        widths = list(network.config.block_out_channels)
        super().__init__(
            quantizer=quantizer,
            factors=[2 ** (len(widths) - 1)] * 2,
            own_channels=int(network.config.in_channels),
            in_channels=in_channels,
            value_range=value_range,
            variational=self.has_posterior,
            finest_channels=int(widths[0]),
        )
        for name in self.unused_modules:
            delattr(network, name)
        self.network = network
