"""The autoregressive prior as an entropy coder: every index by a trained generator, slices in parallel.

A network in floating point gives slightly other numbers on another machine: another order of summation, another
library's exponential. So it runs in float64, and what codes is its logits rounded to a grid of ``2^-8`` bits. Two
machines can only differ where a logit lies so near to a boundary of that grid that their difference crosses it. The
encoder lists every value within ``DELTA`` of a boundary, and the side it took; the decoder takes that side there and
rounds for itself elsewhere. Hence both have the same integers, as long as their values differ by at most ``DELTA``,
``2^-22`` of the grid's step: 6.5e-10 in a logit. float64 rounds to 1.1e-16 of a value; between numbers
of threads, and between slices alone and together, ``tests/codec/test_coder_prior.py`` allows a difference of 1e-11.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray

from vaevq_med.codec.coders.base import IndexCoder
from vaevq_med.codec.coders.context_model import VALUE_BITS, frequencies_of
from vaevq_med.codec.coders.layout import Layout
from vaevq_med.codec.coders.neighbors import as_slices
from vaevq_med.codec.coders.range_coder import RangeDecoder, RangeEncoder
from vaevq_med.codec.coders.streams import check_indices, empty_indices, no_symbols
from vaevq_med.codec.coders.walks.base import Code, Slices, known_walks, walk_for
from vaevq_med.codec.errors import CodecError
from vaevq_med.networks.base import Tokenizer
from vaevq_med.networks.generators.base import Generator
from vaevq_med.networks.generators.token_generator import TokenGenerator
from vaevq_med.tokens.volumes import window_of
from vaevq_med.trained.network import StoredGenerator

DELTA = 2.0**-22
"""Steps of the grid that two machines' values may differ by."""

_PER_NAT = 2**VALUE_BITS / math.log(2)
_IMPOSSIBLE = -(2.0**30)
"""Steps of the grid that stand for a logit of -inf: the frequency is the least that there is."""


def background_indices(tokenizer: Tokenizer, *, image_size: int, in_channels: int) -> tuple[int, ...]:
    """The index of each codebook that most positions of an image without content have, the lowest of several."""
    parameter = next(tokenizer.parameters())
    size: tuple[int, ...] = (image_size, image_size)
    if tokenizer.takes_volumes:
        # One layer, and of a volume as much of it as memory is sure to hold.
        grid = tokenizer.grid_of((tokenizer.factors[0], *size))
        window = grid if tokenizer.slice_context else window_of(tokenizer, grid)
        size = tuple(length * factor for length, factor in zip(window, tokenizer.factors, strict=True))
    blank = torch.full((1, in_channels, *size), -1.0).to(parameter)
    with torch.inference_mode():
        indices = tokenizer.encode_indices(blank).flatten(0, -2).cpu()  # [positions, G]
    return tuple(int(torch.bincount(column).argmax()) for column in indices.T)


class PriorCoder(IndexCoder):
    """Frequencies by a trained generator, whose class is the contrast.

    What is coded when, by which logits, is the generator's walk (``walks/``). A slice is predicted from itself alone,
    or, by a network that sees it, from the slice below too, which has to be decoded by then: slices then go one by one.
    A grid of three axes is coded layer by layer. Positions that are not live are fed as background and not coded.

    Args:
        network: the generator, of a kind that has a walk.
        contrasts: names of its classes by number; another contrast is the null class.
        background: index of each codebook that stands for background, see :func:`background_indices`.
        generator_hash: by which a file names the generator.

    Raises:
        CodecError: there is no walk, or the background has another number of codebooks than the network.
    """

    name: ClassVar[str] = "prior"
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
        """Make the coder of a generator's checkpoint.

        Raises:
            CodecError: no checkpoint is named, it is of another kind of generator, or was trained on the tokens of
                another tokenizer.
            VaevqMedError: the checkpoint cannot be read.
        """
        if model is None:
            wanted = f" ({settings['generator']})" if settings else ""
            raise CodecError(
                f"coder prior: found no model, expected a generator's checkpoint{wanted}; name it with --model"
            )
        stored = StoredGenerator(model)
        trained_on = stored.tokens["tokenizer"]["content_hash"]
        if trained_on != tokenizer["hash"]:
            raise CodecError(f"{model}: found a generator of the tokenizer {trained_on}, expected {tokenizer['hash']}")
        network_of_model = stored.network()
        if walk_for(network_of_model) is None:
            raise CodecError(f"{model}: {_no_walk(network_of_model)}")
        generator = cast(TokenGenerator, network_of_model)
        if settings is not None:
            background = tuple(settings["background"])
        elif network is not None:
            sizes = {name: int(tokenizer[name]) for name in ("image_size", "in_channels")}
            background = background_indices(network, **sizes)
        else:
            background = (0,) * generator.num_codebooks
        return cls(generator, contrasts=stored.label_names, background=background, generator_hash=stored.content_hash)

    def __init__(
        self,
        network: TokenGenerator,
        *,
        contrasts: tuple[str, ...] = (),
        background: tuple[int, ...] = (0,),
        generator_hash: str = "",
    ) -> None:
        walk = walk_for(network)
        if walk is None:
            raise CodecError(_no_walk(network))
        if len(background) != network.num_codebooks or not all(0 <= k < network.num_embeddings for k in background):
            raise CodecError(
                f"background: found {list(background)}, expected {network.num_codebooks} from 0 to "
                f"{network.num_embeddings - 1}"
            )
        self.network = network
        self.walk = walk
        self.contrasts = contrasts
        self.background = background
        self.generator_hash = generator_hash

    @property
    def settings(self) -> Mapping[str, Any]:
        """Which generator it is, and what stands for background."""
        return {"generator": self.generator_hash, "background": list(self.background)}

    def encode(self, indices: NDArray[np.int64], layout: Layout) -> bytes:
        """The bytes of the indices: the list of values near a boundary, then the range-coded indices.

        Raises:
            CodecError: the indices do not fit the layout, or the layout not the network.
        """
        check_indices(indices, layout)
        if self._nothing(layout):
            return b""
        coder, near = RangeEncoder(), _Near()

        def write(logits: NDArray[np.float64], symbols: NDArray[np.int64]) -> NDArray[np.int64]:
            coder.encode(symbols, frequencies_of(near.note(_in_steps(logits))))
            return symbols

        live, _ = as_slices(layout)
        self._run(indices.reshape(*live.shape, -1), layout, write)
        return near.tell() + coder.finish()

    def decode(self, data: bytes, layout: Layout) -> NDArray[np.int64]:
        """The indices of bytes.

        Raises:
            CodecError: the bytes are not those of such a stream, or the layout does not fit the network.
        """
        indices = empty_indices(layout)
        if self._nothing(layout):
            if data:
                raise CodecError(f"prior coder: found {len(data)} bytes, expected none where nothing is coded")
            return indices
        near, rest = _Told.read(data)
        coder = RangeDecoder(rest)

        def read(logits: NDArray[np.float64], _: NDArray[np.int64]) -> NDArray[np.int64]:
            return coder.decode(frequencies_of(near.settle(_in_steps(logits))))

        live, _ = as_slices(layout)
        found = self._run(np.zeros((*live.shape, layout.num_codebooks), np.int64), layout, read)
        near.finish()
        coder.finish()
        return np.where(layout.live[..., None], found.reshape(indices.shape), 0)

    def _run(self, symbols: NDArray[np.int64], layout: Layout, code: Code) -> NDArray[np.int64]:
        """Walk through the slices; what a decoder has of the symbols ``[N, h, w, G]``, background where none is."""
        live, numbers = as_slices(layout)
        walk = self.walk(self.network, self._label(layout))
        filled = np.where(live[..., None], symbols, np.array(self.background))  # [N, h, w, G]
        for part in self._parts(live, walk.slices_at_once):
            tokens = filled[part].reshape(len(part), -1, layout.num_codebooks)  # [n, h w, G]
            below = self._below(filled, numbers, part) if walk.sees_below else None
            walk.run(Slices(tokens, live[part].reshape(len(part), -1), below), code)
            filled[part] = tokens.reshape(len(part), *live.shape[1:], -1)
        return filled

    def _label(self, layout: Layout) -> int:
        known = layout.contrast in self.contrasts
        return self.contrasts.index(layout.contrast) if known else self.network.num_classes

    def _parts(self, live: NDArray[np.bool_], at_once: int) -> list[NDArray[np.int64]]:
        """Places of the slices with something live, some at once."""
        numbers = np.flatnonzero(live.any(axis=(1, 2)))
        return [numbers[start : start + at_once] for start in range(0, len(numbers), at_once)]

    def _below(
        self, filled: NDArray[np.int64], numbers: NDArray[np.int64], part: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Indices ``[n, h, w, G]`` of the slices below some, -1 where there is none."""
        beside = np.r_[False, np.diff(numbers) == 1][part]
        return np.where(beside[:, None, None, None], filled[part - 1], -1)

    def _nothing(self, layout: Layout) -> bool:
        """Whether nothing is coded; the layout is checked too."""
        network = self.network
        sizes = {
            "num_embeddings": (network.num_embeddings, layout.num_embeddings),
            "num_codebooks": (network.num_codebooks, layout.num_codebooks),
            "grid": (list(network.grid_size), list(layout.live.shape[1:][-2:])),
        }
        for name, (has, expected) in sizes.items():
            if has != expected:
                raise CodecError(f"prior: found a generator with {name} {has}, expected {expected}")
        return no_symbols(layout)


def _no_walk(network: Generator) -> str:
    known = " or ".join(kind.__name__ for kind in known_walks())
    return f"found a {type(network).__name__}, expected a {known}"


def _in_steps(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logits in nats as steps of the grid."""
    return np.where(np.isneginf(logits), _IMPOSSIBLE, logits * _PER_NAT)


def _rounded(values: NDArray[np.float64]) -> NDArray[np.int64]:
    if values.size and not (np.abs(values).max() <= 2.0**31 and values.max(axis=1).min() > _IMPOSSIBLE):
        raise CodecError("prior: found a logit out of range, expected those of a trained generator")
    return np.floor(values + 0.5).astype(np.int64)


class _Near:
    """The encoder's list of values near a boundary."""

    def __init__(self) -> None:
        self.count = 0
        self.entries: list[int] = []

    def note(self, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """The values ``[m, K]`` rounded, with those near a boundary written down."""
        rounded = _rounded(values)
        shifted = values + 0.5
        boundary = np.rint(shifted)
        found = np.flatnonzero(np.abs(shifted - boundary) <= DELTA)
        if len(found):
            above = (rounded.ravel()[found] == boundary.ravel()[found]).astype(np.int64)
            self.entries += (2 * (self.count + found) + above).tolist()
        self.count += values.size
        return rounded

    def tell(self) -> bytes:
        """Their number, and the place of each among all values and its side, as differences."""
        parts = [_varint(len(self.entries))]
        before = 0
        for entry in self.entries:
            parts.append(_varint(2 * (entry // 2 - before) + entry % 2))
            before = entry // 2
        return b"".join(parts)


class _Told:
    """The decoder's side of the list.

    Args:
        places: numbers of the values, rising.
        above: whether each was rounded up from its boundary.
    """

    def __init__(self, places: NDArray[np.int64], above: NDArray[np.bool_]) -> None:
        self.places = places
        self.above = above
        self.count = 0
        self.next = 0

    @classmethod
    def read(cls, data: bytes) -> tuple[_Told, bytes]:
        """The list that a stream starts with, and what comes after it."""
        count, at = _read_varint(data, 0)
        places, above, place = [], [], 0
        for _ in range(count):
            entry, at = _read_varint(data, at)
            place += entry >> 1
            places.append(place)
            above.append(bool(entry & 1))
        if places and places[-1] >= 2**62:
            raise CodecError("prior coder: found a list that is out of range, expected an undamaged one")
        return cls(np.array(places, np.int64), np.array(above, bool)), data[at:]

    def settle(self, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """The values ``[m, K]`` rounded as the encoder had them."""
        rounded = _rounded(values)
        end = int(np.searchsorted(self.places, self.count + values.size))
        if end > self.next:
            chosen = self.places[self.next : end] - self.count
            boundary = np.rint(values.ravel()[chosen] + 0.5).astype(np.int64)
            rounded.ravel()[chosen] = np.where(self.above[self.next : end], boundary, boundary - 1)
        self.count, self.next = self.count + values.size, end
        return rounded

    def finish(self) -> None:
        """Look for what was not used.

        Raises:
            CodecError: the list goes on after the last value.
        """
        if self.next != len(self.places):
            raise CodecError("prior coder: found a list of more values than there are, expected an undamaged one")


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the highest bit says that more follow."""
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise CodecError("prior coder: found a list that does not end, expected an undamaged one")
        value |= (data[at] & 127) << shift
        shift += 7
        at += 1
        if data[at - 1] < 128:
            return value, at
