"""The interface of every entropy coder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from vaevq_med.codec.coders.layout import Layout
from vaevq_med.codec.errors import CodecError

if TYPE_CHECKING:
    from vaevq_med.codec.coders.context_model import ContextModel
    from vaevq_med.networks.base import Tokenizer


class IndexCoder(ABC):
    """Indices to bytes and back, without loss; its probabilities are computed in integers, or exactly rounded.

    Attributes:
        name: of the coder, as a file says it.
        needs_model: whether it takes its probabilities from a file of its own, see :meth:`load`.
        context_model: by which it codes, where it has one that a choice of indices can go by.
    """

    name: ClassVar[str]
    needs_model: ClassVar[bool] = False
    context_model: ContextModel | None = None

    @classmethod
    def load(
        cls,
        model: Path | None,
        tokenizer: Mapping[str, Any],
        *,
        network: Tokenizer | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Self:
        """Make the coder for the indices of a tokenizer.

        Args:
            model: file of its own, where it needs one.
            tokenizer: what a compressed file says of the tokenizer; ``hash`` is its content hash.
            network: the tokenizer, where indices are to be encoded.
            settings: those of the coder that encoded, where they are to be decoded.

        Raises:
            CodecError: it needs a file and none is named, or the other way round.
        """
        if model is not None:
            raise CodecError(f"coder {cls.name}: found the model {model}, expected none, since this coder takes none")
        return cls()

    @property
    def settings(self) -> Mapping[str, Any]:
        """Plain values that a decoder needs to know besides the layout, e.g. the hash of a model; small."""
        return {}

    @abstractmethod
    def encode(self, indices: NDArray[np.int64], layout: Layout) -> bytes:
        """The bytes of the indices ``[N, *grid, G]`` at the live positions."""

    @abstractmethod
    def decode(self, data: bytes, layout: Layout) -> NDArray[np.int64]:
        """The indices ``[N, *grid, G]``, 0 where the layout is not live.

        Raises:
            CodecError: the bytes are not those of such a stream.
        """
