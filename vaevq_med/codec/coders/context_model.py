"""A small network in integers: from the symbols around a position to the frequencies of its index.

Every product and sum is of integers below 2^53 in float64, so that none is rounded and no order of summation, number of
threads or kind of machine makes a difference. With ``>>`` for a division by a power of two, rounded down:

``x   = [embedding of each neighbor; of the position's earlier codebooks; further inputs]``
``h_1 = clip(W_1 x + b_1[contrast, codebook] >> 10, 0, 2^20)``, ``h_2 = clip(W_2 h_1 + b_2 >> 10, 0, 2^20)``,
``l   = W_3[codebook] h_2 + b_3[codebook] >> 10``, a logarithm to base 2 in parts of 256.

The weight of index k is ``T[(m - l_k) mod 256] >> ((m - l_k) div 256)`` with m the greatest l, ``T[i]`` being
``2^(30 - i / 256)`` rounded, and :func:`to_frequencies` makes frequencies of it.
"""

from __future__ import annotations

import decimal
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaevq_med.codec.coders.neighbors import CAUSAL, OUTLOOK, PLACE_SCALE, REFERENCE
from vaevq_med.codec.coders.range_coder import to_frequencies
from vaevq_med.codec.errors import CodecError
from vaevq_med.core.files import atomic_write_bytes, file_sha256

FORMAT = 1
WEIGHT_BITS = 10
"""A weight of 1 is 2 to this power, and so much is taken off after every layer."""

VALUE_BITS = 8
"""A value of 1 (an embedding, a hidden unit) is 2 to this power."""

NUM_FURTHER = len(OUTLOOK) + 3
_TABLE_BITS = 30
_LIMIT = 2.0**20
_LARGEST = 2**15 - 1
_NAMES = ("embedding", "first", "first_bias", "second", "second_bias", "last", "last_bias")


@cache
def power_table() -> NDArray[np.int64]:
    """``2^(30 - i / 256)`` for i from 0 to 255, rounded; by decimal arithmetic, which is the same everywhere."""
    context = decimal.Context(prec=40)
    parts = 2**VALUE_BITS
    exact = (context.power(decimal.Decimal(2), _TABLE_BITS - decimal.Decimal(i) / parts) for i in range(parts))
    return np.array([int(value.to_integral_value()) for value in exact], np.int64)


def frequencies_of(logits: NDArray[np.int64]) -> NDArray[np.int64]:
    """Frequencies ``[n, K]`` of logarithms to base 2 in parts of 256, ``[n, K]``."""
    below = logits.max(axis=1, keepdims=True) - logits
    weights = power_table()[below & (2**VALUE_BITS - 1)]
    weights >>= np.minimum(below >> VALUE_BITS, _TABLE_BITS + 1)
    return to_frequencies(weights)


@dataclass(frozen=True)
class ContextModel:
    """The integers of a trained network, and what it belongs to.

    Attributes:
        tokenizer: content hash of the tokenizer whose indices it predicts; empty where that is not known.
        contrasts: names of those that it knows; another one is predicted as none of them.
        embedding: int16 ``[G, K + 2, E]``: of each index, of a position that is not live, of what is absent.
        first: int16 ``[inputs, H]``.
        first_bias: int64 ``[contrasts + 1, G, H]``; the last row is of other contrasts.
        second: int16 ``[H, H]``.
        second_bias: int64 ``[H]``.
        last: int16 ``[G, H, K]``.
        last_bias: int64 ``[G, K]``.

    Raises:
        CodecError: the arrays do not fit together.
    """

    tokenizer: str
    contrasts: tuple[str, ...]
    embedding: NDArray[np.int16]
    first: NDArray[np.int16]
    first_bias: NDArray[np.int64]
    second: NDArray[np.int16]
    second_bias: NDArray[np.int64]
    last: NDArray[np.int16]
    last_bias: NDArray[np.int64]

    def __post_init__(self) -> None:
        """Check the shapes, and hold the integers in float64 too."""
        ok = self.embedding.ndim == 3 and self.embedding.shape[1] > 3 and self.second.ndim == 2
        if ok:
            (books, size, width), hidden = self.embedding.shape, self.second.shape[0]
            inputs = num_inputs(books, width)
            shapes = {
                "first": (inputs, hidden),
                "first_bias": (len(self.contrasts) + 1, books, hidden),
                "second": (hidden, hidden),
                "second_bias": (hidden,),
                "last": (books, hidden, size - 2),
                "last_bias": (books, size - 2),
            }
            ok = all(getattr(self, name).shape == shape for name, shape in shapes.items())
            # Below 2^15 * 2^20 * 2^12 + 2^50 no sum reaches 2^53.
            ok = ok and max(inputs, hidden) <= 2**12
            ok = ok and all(abs(getattr(self, n).astype(np.float64)).max() < 2.0**50 for n in _NAMES if "bias" in n)
        if not ok:
            raise CodecError("context model: found arrays that do not fit together, expected those of one network")
        floats = {name: getattr(self, name).astype(np.float64) for name in _NAMES}
        object.__setattr__(self, "_floats", floats)

    @property
    def num_embeddings(self) -> int:
        """K."""
        return self.embedding.shape[1] - 2

    @property
    def num_codebooks(self) -> int:
        """G."""
        return self.embedding.shape[0]

    def check_tokenizer(self, content_hash: str) -> None:
        """Refuse another tokenizer than the one whose indices it was trained on.

        Raises:
            CodecError: naming both.
        """
        if self.tokenizer and self.tokenizer != content_hash:
            raise CodecError(
                f"context model: found one of the tokenizer {self.tokenizer[:19]}..., expected {content_hash[:19]}..."
            )

    def hidden(
        self,
        seen: NDArray[np.int64],
        own: NDArray[np.int64],
        further: NDArray[np.int64],
        *,
        contrast: str,
        codebook: int,
    ) -> NDArray[np.float64]:
        """Integers ``[n, H]`` that the last layer is given.

        Args:
            seen: symbols ``[n, neighbors, G]``.
            own: the position's own symbols ``[n, G]``, of which those of earlier codebooks are looked at.
            further: ``[n, further]``.
            contrast: what is shown.
            codebook: which one is predicted.
        """
        weights: Mapping[str, NDArray[np.float64]] = self._floats  # type: ignore[attr-defined]
        books = self.num_codebooks
        own = own.copy()
        own[:, codebook:] = self.num_embeddings + 1
        symbols = np.concatenate([seen, own[:, None]], axis=1) if books > 1 else seen
        embedded = [weights["embedding"][g][symbols[:, :, g]].reshape(len(symbols), -1) for g in range(books)]
        x = np.concatenate([*embedded, further.astype(np.float64)], axis=1)
        row = self.contrasts.index(contrast) if contrast in self.contrasts else len(self.contrasts)
        x = _shifted(x @ weights["first"] + weights["first_bias"][row, codebook])
        x = np.clip(x, 0.0, _LIMIT)
        x = _shifted(x @ weights["second"] + weights["second_bias"])
        return np.clip(x, 0.0, _LIMIT)

    def logits(self, hidden: NDArray[np.float64], codebook: int) -> NDArray[np.int64]:
        """Logarithms to base 2 in parts of 256, ``[n, K]``."""
        weights: Mapping[str, NDArray[np.float64]] = self._floats  # type: ignore[attr-defined]
        return _shifted(hidden @ weights["last"][codebook] + weights["last_bias"][codebook]).astype(np.int64)

    def save(self, path: Path) -> None:
        """Write it as safetensors."""
        from safetensors.numpy import save

        described = {"format": FORMAT, "tokenizer": self.tokenizer, "contrasts": list(self.contrasts)}
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in _NAMES}
        atomic_write_bytes(path, save(tensors, {"context_model": json.dumps(described)}))


def num_inputs(num_codebooks: int, width: int) -> int:
    """Inputs of the network with embeddings of that width."""
    slots = len(CAUSAL) + len(REFERENCE) + (num_codebooks > 1)
    return slots * num_codebooks * width + NUM_FURTHER


def _shifted(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.floor(x * 2.0**-WEIGHT_BITS)


def load_context_model(path: Path) -> ContextModel:
    """Read a model that :meth:`ContextModel.save` wrote.

    Raises:
        CodecError: the file is missing or not such a model, or of a newer format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            described: Any = json.loads((file.metadata() or {}).get("context_model", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, ValueError) as error:
        raise CodecError(f"{path}: found no readable context model ({error}), expected a safetensors file") from None
    if not isinstance(described, dict) or set(tensors) != set(_NAMES):
        raise CodecError(f"{path}: found a file without a context model, expected one that index-model wrote")
    if described.get("format") != FORMAT:
        raise CodecError(f"{path}: found a context model of format {described.get('format')}, expected {FORMAT}")
    kinds = {name: np.int64 if "bias" in name else np.int16 for name in _NAMES}
    for name, tensor in tensors.items():
        if tensor.dtype != kinds[name]:
            raise CodecError(f"{path}: found {name} of {tensor.dtype}, expected {np.dtype(kinds[name])}")
    return ContextModel(described["tokenizer"], tuple(described["contrasts"]), **tensors)


def model_hash(path: Path) -> str:
    """The hash by which a compressed file names a model, ``sha256:`` and the file's."""
    return f"sha256:{file_sha256(path)}"


def from_floats(
    tokenizer: str,
    contrasts: tuple[str, ...],
    weights: Mapping[str, NDArray[np.floating[Any]]],
) -> ContextModel:
    """The integers nearest to a network's weights, of the names and shapes of :class:`ContextModel`.

    The last layer gives natural logarithms, which become those to base 2. Weights of the further inputs are given for
    inputs from -1 to 1.
    """
    base = 1 / np.log(2.0)
    scales = {
        "embedding": 2.0**VALUE_BITS,
        "first": 2.0**WEIGHT_BITS,
        "first_bias": 2.0 ** (WEIGHT_BITS + VALUE_BITS),
        "second": 2.0**WEIGHT_BITS,
        "second_bias": 2.0 ** (WEIGHT_BITS + VALUE_BITS),
        "last": base * 2.0**WEIGHT_BITS,
        "last_bias": base * 2.0 ** (WEIGHT_BITS + VALUE_BITS),
    }
    assert PLACE_SCALE == 2**VALUE_BITS
    integers: dict[str, Any] = {}
    for name, scale in scales.items():
        rounded = np.rint(weights[name].astype(np.float64) * scale)
        wide = "bias" in name
        integers[name] = rounded.astype(np.int64) if wide else np.clip(rounded, -_LARGEST, _LARGEST).astype(np.int16)
    return ContextModel(tokenizer, contrasts, **integers)
