"""The prior's streams, read by a second decoder that follows docs/codec_coders.md (d): the whole network a symbol."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers.range_by_the_page import RangeReader, frequencies_by_the_page
from numpy.typing import NDArray
from torch import Tensor, nn

from vaevq_med.codec.coders import prior
from vaevq_med.codec.coders.layout import Layout
from vaevq_med.codec.coders.prior import PriorCoder
from vaevq_med.codec.coders.walks import base
from vaevq_med.networks.generators import coarse_first, llama_blocks, llamagen
from vaevq_med.networks.generators.coarse_first import CoarseFirst
from vaevq_med.networks.generators.llamagen import LlamaGen

Indices = NDArray[np.int64]


def rotations_in_double(height: int, width: int, head_dim: int, *, num_codebooks: int, device: object) -> Tensor:
    """Cosines and sines of rows and columns, zero for the class token."""
    quarter = head_dim // 4
    frequencies = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()
    angles = (places.unsqueeze(2) * frequencies).flatten(1)
    turns = torch.stack([angles.cos(), angles.sin()], dim=2).repeat_interleave(num_codebooks, dim=0)
    return torch.cat([torch.zeros_like(turns[:1]), turns])


def rotate_in_double(x: Tensor, rotations: Tensor) -> Tensor:
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = rotations.unbind(-1)
    return torch.stack([first * cosine - second * sine, second * cosine + first * sine], dim=-1).flatten(-2)


class Reader:
    """The list of values near a boundary, and the range-coded symbols after it."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.count, self.told = data, 0, 0, {}
        place = 0
        for _ in range(self.number()):
            entry = self.number()
            place += entry >> 1
            self.told[place] = entry & 1
        self.coded = RangeReader(data[self.at :])

    def number(self) -> int:
        value = shift = 0
        while True:
            byte = self.data[self.at]
            self.at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def symbol(self, logits: list[float]) -> int:
        found = []
        for logit in logits:
            if logit == -math.inf:
                found.append(-(2**30))
            else:
                value = logit * 256 / math.log(2)
                nearest = round(value + 0.5)
                above = self.told.get(self.count)
                found.append(math.floor(value + 0.5) if above is None else nearest if above else nearest - 1)
            self.count += 1
        return self.coded.symbol(frequencies_by_the_page(found))

    def finish(self) -> None:
        assert all(place < self.count for place in self.told)


def read_llamagen(
    network: LlamaGen, reader: Reader, live: NDArray[np.bool_], label: int, background: tuple[int, ...]
) -> Indices:
    """Indices ``[n, h w, G]`` of a group of slices; live is ``[n, h w]``."""
    found = np.tile(np.array(background), (*live.shape, 1))
    labels = torch.full((len(live),), label)
    for position in range(int(np.flatnonzero(live.any(axis=0))[-1]) + 1):
        for book in range(network.num_codebooks):
            grids = torch.from_numpy(found).view(len(live), *network.grid_size, -1)
            logits = network(grids, labels).flatten(1, 2)  # [n, h w, G, K]
            for row in np.flatnonzero(live[:, position]):
                found[row, position, book] = reader.symbol(logits[row, position, book].tolist())
    return found


def read_coarse_first(
    network: CoarseFirst, reader: Reader, live: NDArray[np.bool_], label: int, background: tuple[int, ...]
) -> Indices:
    """Likewise, a slice at a time."""
    count, books, positions = network.num_embeddings, network.num_codebooks, live.shape[1]
    found, labels = np.tile(np.array(background), (*live.shape, 1)), torch.tensor([label])
    is_open = any(index != count - 1 for index in background[1:])
    words = np.full(live.shape, background[0] + count * is_open)

    def hidden(row: int, opened: list[int]) -> Tensor:
        others = torch.from_numpy(found[row, opened][:, 1:])[None]
        whole = torch.from_numpy(words[row : row + 1])
        return network._hidden(whole, others, torch.tensor([opened], dtype=torch.int64), labels)[0]

    for position in range(positions):
        for row in np.flatnonzero(live[:, position]):
            word = reader.symbol((network.first_head.weight @ hidden(row, [])[position]).tolist())
            words[row, position] = word
            found[row, position] = [word % count, *[count - 1] * (books - 1)]
    opened = [np.flatnonzero(row >= count).tolist() for row in words]
    for number in range(max(map(len, opened))):
        for book in range(1, books):
            for row, those in enumerate(opened):
                if number >= len(those) or not live[row, those[number]]:
                    continue
                position = those[number]
                at = positions + number * (books - 1) + book - 1
                head: Any = network.other_heads[book - 1]
                logits = (head.weight @ hidden(row, those[: number + 1])[at]).tolist()
                if book == books - 1 and all(index == count - 1 for index in found[row, position, 1:book]):
                    logits[-1] = -math.inf
                found[row, position, book] = reader.symbol(logits)
    return found


READERS: dict[str, tuple[type[LlamaGen] | type[CoarseFirst], Any]] = {
    "raster": (LlamaGen, read_llamagen),
    "coarse first": (CoarseFirst, read_coarse_first),
}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", list(READERS))
def test_a_decoder_by_the_page_reads_the_streams(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Holes, closed and open backgrounds, contrasts that are not known, groups of one, of two and of all."""
    rng = np.random.default_rng(seed)
    kind, read = READERS[name]
    count, books, classes = (int(rng.choice(of)) for of in ([2, 3, 5, 9], [2, 3], [0, 2]))
    height, width = (int(n) for n in rng.integers(2, 4, 2))
    torch.manual_seed(seed)
    sizes = {"num_embeddings": count, "grid_size": (height, width), "num_classes": classes, "num_codebooks": books}
    network = kind(width=16, depth=2, num_heads=2, **sizes).eval()  # type: ignore[arg-type]
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)

    live = rng.random((4, height, width)) < rng.choice([0.3, 0.7])
    live[0, 0, 0] = True
    indices = rng.integers(0, count, (4, height, width, books))
    indices[rng.random(live.shape) < 0.5, 1:] = count - 1
    indices = np.where(live[..., None], indices, 0)
    others = tuple(rng.integers(0, count, books - 1).tolist()) if seed % 2 else (count - 1,) * (books - 1)
    background = (int(rng.integers(count)), *others)
    names = ("t1n", "t2w")[:classes]
    contrast = ("t2w", "flair")[seed // 2 % 2]
    at_once = (1, 2, 4)[seed % 3]
    monkeypatch.setattr(base, "_CACHE_BYTES", at_once * 16 * 2 * (height * width * books + 1) * 16)
    # A wide bound, so that the list has entries.
    monkeypatch.setattr(prior, "DELTA", 0.05 if seed % 4 == 3 else prior.DELTA)

    coder = PriorCoder(network, contrasts=names, background=background)
    layout = Layout(live, np.arange(4), count, books, contrast)
    data = coder.encode(indices, layout)
    assert (coder.decode(data, layout) == indices).all()

    for module in (coarse_first, llamagen):
        monkeypatch.setattr(module, "axial_rotations", rotations_in_double)
    monkeypatch.setattr(llama_blocks, "rotate", rotate_in_double)
    exact = copy.deepcopy(network).double()
    reader, found = Reader(data), np.zeros_like(indices).reshape(4, -1, books)
    assert bool(reader.told) or seed % 4 != 3
    coded = np.flatnonzero(live.any(axis=(1, 2)))
    label = names.index(contrast) if contrast in names else classes
    with torch.no_grad():
        for start in range(0, len(coded), at_once):
            rows = coded[start : start + at_once]
            found[rows] = read(exact, reader, live[rows].reshape(len(rows), -1), label, background)
    reader.finish()
    assert (np.where(live[..., None], found.reshape(indices.shape), 0) == indices).all()
