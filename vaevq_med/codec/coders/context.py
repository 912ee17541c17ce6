"""A context model: every index by its neighbors in the slice, the slices below and the contrast coded before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from vaevq_med.codec.coders.base import IndexCoder
from vaevq_med.codec.coders.context_model import ContextModel, frequencies_of, load_context_model, model_hash
from vaevq_med.codec.coders.layout import Layout
from vaevq_med.codec.coders.neighbors import Neighborhood
from vaevq_med.codec.coders.range_coder import RangeDecoder, RangeEncoder
from vaevq_med.codec.coders.streams import check_indices, empty_indices, no_symbols
from vaevq_med.codec.errors import CodecError

if TYPE_CHECKING:
    from vaevq_med.networks.base import Tokenizer

_AT_ONCE = 2**23
"""Frequencies that the encoder holds at once: 64 MiB for each of the few arrays."""


class ContextCoder(IndexCoder):
    """Frequencies by a trained :class:`ContextModel`.

    Args:
        model: trained on indices of the same tokenizer.
        model_hash: by which a file names the model, see :func:`vaevq_med.codec.coders.context_model.model_hash`.
    """

    name: ClassVar[str] = "context"
    needs_model: ClassVar[bool] = True

    @classmethod
    def load(
        cls,
        model: Path | None,
        tokenizer: Mapping[str, Any],
        *,
        network: Tokenizer | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Self:
        """Make the coder of a file that :meth:`ContextModel.save` wrote.

        Raises:
            CodecError: no file is named, it is no such model, or it was trained on another tokenizer's indices.
        """
        if model is None:
            wanted = f" ({settings['model']})" if settings else ""
            raise CodecError(f"coder context: found no model, expected the file of one{wanted}; name it with --model")
        found = load_context_model(model)
        found.check_tokenizer(tokenizer["hash"])
        return cls(found, model_hash(model))

    def __init__(self, model: ContextModel, model_hash: str = "") -> None:
        self.model = self.context_model = model
        self.model_hash = model_hash

    @property
    def settings(self) -> Mapping[str, Any]:
        """Which model it is."""
        return {"model": self.model_hash}

    def encode(self, indices: NDArray[np.int64], layout: Layout) -> bytes:
        """The bytes of the indices, range-coded plane after plane, in each plane codebook after codebook.

        Raises:
            CodecError: the indices do not fit the layout, or the layout not the model.
        """
        symbols = check_indices(indices, layout)[layout.live]  # [n, G]
        if self._nothing(layout):
            return b""
        hood = Neighborhood(layout)
        hood.fill(symbols)
        coder = RangeEncoder()
        # Everything is known, so that many planes go through the network at once; the symbols keep their order.
        for planes in _groups(hood.starts, max(1, _AT_ONCE // (layout.num_embeddings * layout.num_codebooks))):
            part = slice(int(planes[0]), int(planes[-1]))
            own = symbols[hood.source[part]]
            seen, further = hood.around(part)
            rows = [
                frequencies_of(self._logits(seen, own, further, layout.contrast, codebook))
                for codebook in range(layout.num_codebooks)
            ]
            if len(rows) == 1:
                coder.encode(own[:, 0], rows[0])
                continue
            for start, end in zip(planes[:-1] - part.start, planes[1:] - part.start, strict=True):
                for codebook, frequencies in enumerate(rows):
                    coder.encode(own[start:end, codebook], frequencies[start:end])
        return coder.finish()

    def decode(self, data: bytes, layout: Layout) -> NDArray[np.int64]:
        """The indices of bytes.

        Raises:
            CodecError: the bytes are not those of such a stream, or the layout does not fit the model.
        """
        indices = empty_indices(layout)
        if self._nothing(layout):
            if data:
                raise CodecError(f"context coder: found {len(data)} bytes, expected none where nothing is coded")
            return indices
        hood = Neighborhood(layout)
        coder = RangeDecoder(data)
        symbols = np.zeros((len(hood.where), layout.num_codebooks), np.int64)
        for start, end in zip(hood.starts[:-1], hood.starts[1:], strict=True):
            part = slice(int(start), int(end))
            own = symbols[part]
            seen, further = hood.around(part)
            for codebook in range(layout.num_codebooks):
                logits = self._logits(seen, own, further, layout.contrast, codebook)
                own[:, codebook] = coder.decode(frequencies_of(logits))
            hood.symbols[hood.where[part]] = own
        coder.finish()
        in_rows = np.empty_like(symbols)
        in_rows[hood.source] = symbols
        indices[layout.live] = in_rows
        return indices

    def _logits(
        self,
        seen: NDArray[np.int64],
        own: NDArray[np.int64],
        further: NDArray[np.int64],
        contrast: str,
        codebook: int,
    ) -> NDArray[np.int64]:
        hidden = self.model.hidden(seen, own, further, contrast=contrast, codebook=codebook)
        return self.model.logits(hidden, codebook)

    def _nothing(self, layout: Layout) -> bool:
        """Whether nothing is coded; the layout is checked too."""
        found = {"num_embeddings": layout.num_embeddings, "num_codebooks": layout.num_codebooks}
        for name, value in found.items():
            if value != getattr(self.model, name):
                raise CodecError(f"context model: found {name} {getattr(self.model, name)}, expected {value}")
        return no_symbols(layout)


def _groups(starts: NDArray[np.int64], most: int) -> Iterator[NDArray[np.int64]]:
    """Bounds of planes in groups that have at most so many positions together, or one plane."""
    first = 0
    while first < len(starts) - 1:
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + most, side="right")) - 1)
        yield starts[first : last + 1]
        first = last
