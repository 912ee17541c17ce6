"""MAISI's autoencoder (arXiv 2409.11169), ``AutoencoderKlMaisi`` of MONAI, whose steps up interpolate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vaevq_med.networks.adapters.monai_kl import MonaiKL
from vaevq_med.networks.quantizers.base import Quantizer


class MonaiMaisi(MonaiKL):
    """An ``AutoencoderKlMaisi``, in one piece and in fp32: it is not split along an axis, and normalizes without fp16.

    Args:
        config: its arguments, as a MONAI configuration has them.
        quantizer: of its latent, a ``UniformQuantizer`` for one.
        in_channels: image channels here, see :class:`ForeignTokenizer`.
        value_range: what black and white are to it.

    Raises:
        VaevqMedError: arguments that do not fit.
    """

    def __init__(
        self,
        *,
        config: Mapping[str, Any],
        quantizer: Quantizer,
        in_channels: int | None = None,
        value_range: Sequence[float] = (0.0, 1.0),
    ) -> None:
        own = {"num_splits": 1, "norm_float16": False, "print_info": False, "save_mem": False}
        super().__init__(
            config={**config, **own}, quantizer=quantizer, in_channels=in_channels, value_range=value_range
        )

    @staticmethod
    def architecture() -> Any:
        """The class of the foreign network."""
        from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi

        return AutoencoderKlMaisi
