"""A pair of TorchScript programs, encoder and decoder, as the Cosmos tokenizers (arXiv 2501.03575) are published.

A TorchScript archive is a program: what it does when it is loaded and called is its maker's. It is loaded only where
the user has said so, ``--trusted torchscript``, whoever wrote the checkpoint.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vaevq_med.core.components import ComponentError, trusted_packages
from vaevq_med.networks.adapters.base import ForeignTokenizer
from vaevq_med.networks.quantizers.base import Quantizer

TRUST = "torchscript"


def check_trusted() -> None:
    """Refuse a TorchScript program that the user did not ask for.

    Raises:
        ComponentError: saying how to.
    """
    if TRUST not in trusted_packages():
        raise ComponentError(
            "found a TorchScript program, expected one that the user trusts, as its code runs: --trusted "
            f"\"['{TRUST}']\" after a bundle, vaevq-med --trusted {TRUST} before a command"
        )


def load_program(source: Any, device: torch.device | str = "cpu") -> Any:
    """A program of a trusted archive, in fp32.

    Args:
        source: a path, or a file that is open.
        device: where it goes.
    """
    with warnings.catch_warnings():  # PyTorch calls TorchScript old; it is what such tokenizers are published in
        warnings.simplefilter("ignore")
        return torch.jit.load(source, map_location=device).float().eval()


class TorchScriptPair(ForeignTokenizer):
    """An encoder that gives indices, or a latent, and a decoder that takes them, in fp32.

    The archives themselves are the state, so that a checkpoint is whole.

    Args:
        quantizer: a ``LevelQuantizer`` of an encoder that gives indices, a ``UniformQuantizer`` of a continuous one.
        factors: image sizes over those of the latent grid, an axis each.
        own_channels: image channels of the pair.
        encoder_bytes: size of the encoder's archive.
        decoder_bytes: size of the decoder's.
        gives_indices: whether the encoder does, in place of a latent.
        in_channels: image channels here, see :class:`ForeignTokenizer`.
        value_range: what black and white are to it.

    Raises:
        VaevqMedError: the user has not trusted TorchScript.
    """

    needed_trust: ClassVar[Mapping[str, str]] = {
        TRUST: "its weights are programs of TorchScript, whose code runs where they are loaded"
    }
    encoder_archive: Tensor
    decoder_archive: Tensor

    def __init__(
        self,
        *,
        quantizer: Quantizer,
        factors: Sequence[int],
        own_channels: int,
        encoder_bytes: int,
        decoder_bytes: int,
        gives_indices: bool,
        in_channels: int | None = None,
        value_range: Sequence[float] = (-1.0, 1.0),
    ) -> None:
        check_trusted()
        super().__init__(
            quantizer=quantizer,
            factors=factors,
            own_channels=own_channels,
            in_channels=in_channels,
            value_range=value_range,
        )
        self.gives_indices = gives_indices
        self.gives_latent = not gives_indices
        self.register_buffer("encoder_archive", torch.zeros(encoder_bytes, dtype=torch.uint8))
        self.register_buffer("decoder_archive", torch.zeros(decoder_bytes, dtype=torch.uint8))
        self._loaded: dict[str, tuple[torch.device, Any]] = {}
        self.register_load_state_dict_post_hook(lambda module, keys: module._loaded.clear())

    def _program(self, name: str) -> Any:
        archive: Tensor = getattr(self, f"{name}_archive")
        if name not in self._loaded or self._loaded[name][0] != archive.device:
            content = io.BytesIO(archive.cpu().numpy().tobytes())
            self._loaded[name] = archive.device, load_program(content, archive.device)
        return self._loaded[name][1]

    def foreign_encode(self, images: Tensor) -> Tensor:
        """The latent ``[B, D, h, w]``: of indices, their codes."""
        found = self._program("encoder")(images)
        found = found[0] if isinstance(found, tuple | list) else found
        return self.quantizer.indices_to_codes(found.long().unsqueeze(-1)) if self.gives_indices else found.float()

    def foreign_decode(self, codes: Tensor) -> Tensor:
        """Images of a latent."""
        given = self.quantizer(codes).indices.squeeze(-1) if self.gives_indices else codes
        found = self._program("decoder")(given)
        return (found[0] if isinstance(found, tuple | list) else found).float()
