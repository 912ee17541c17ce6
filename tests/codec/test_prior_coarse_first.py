"""The prior's walk by first indices: its bits are the network's own likelihood, and what is not said is not coded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from vaevq_med.codec.coders import prior
from vaevq_med.codec.coders.double_blocks import DoubleBlocks
from vaevq_med.codec.coders.layout import Layout
from vaevq_med.codec.coders.prior import PriorCoder
from vaevq_med.codec.coders.walks.base import Slices
from vaevq_med.codec.coders.walks.coarse_first import CoarseFirstWalk, _Steps
from vaevq_med.codec.errors import CodecError
from vaevq_med.networks.generators.coarse_first import CoarseFirst

K, GRID, BOOKS = 7, (4, 3), 3


def toy(seed: int = 0, num_embeddings: int = K) -> CoarseFirst:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = CoarseFirst(
            num_embeddings=num_embeddings,
            grid_size=GRID,
            width=16,
            depth=2,
            num_heads=2,
            num_classes=2,
            num_codebooks=BOOKS,
        ).eval()
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
    return network


def gated(seed: int, count: int, share: float = 0.5) -> NDArray[np.int64]:
    """Indices ``[N, h, w, G]`` of cells of which a share is open."""
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, K, (count, *GRID, BOOKS))
    indices[rng.random((count, *GRID)) >= share, 1:] = K - 1
    return indices


def layout_of(live: NDArray[np.bool_], contrast: str = "t2w") -> Layout:
    return Layout(live, np.arange(len(live)), K, BOOKS, contrast)


def coder_of(network: CoarseFirst, background: tuple[int, ...] = (2, K - 1, K - 1)) -> PriorCoder:
    return PriorCoder(network, contrasts=("t1n", "t2w"), background=background)


@pytest.mark.parametrize("label", [1, 2])
def test_the_logits_of_the_walk_have_the_networks_own_likelihood(label: int) -> None:
    network, indices = toy(), gated(0, 5)
    nats = []

    def code(logits: NDArray[np.float64], symbols: NDArray[np.int64]) -> NDArray[np.int64]:
        chances = torch.from_numpy(logits).log_softmax(dim=1).numpy()
        nats.append(-chances[np.arange(len(symbols)), symbols].sum())
        return symbols

    tokens = indices.reshape(5, -1, BOOKS)
    CoarseFirstWalk(network, label).run(Slices(tokens, np.ones(tokens.shape[:2], bool)), code)
    with torch.no_grad():
        expected = float(network.double().loss(torch.from_numpy(indices), torch.full((5,), label))) * indices.size
    # The network turns in fp32.
    assert sum(nats) == pytest.approx(expected, rel=1e-5)
    # h w calls for first indices, and then G - 1 for each open position of the slice that has the most.
    most = (indices[..., 1:] != K - 1).any(axis=-1).sum(axis=(1, 2)).max()
    assert len(nats) == GRID[0] * GRID[1] + (BOOKS - 1) * most


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("background", [(2, K - 1, K - 1), (0, 3, K - 1)])
def test_streams_decode_where_some_positions_are_not_live(share: float, background: tuple[int, ...]) -> None:
    live = np.random.default_rng(1).random((6, *GRID)) < 0.7
    live[2] = False
    indices = np.where(live[..., None], gated(3, 6, share), 0)
    coder, layout = coder_of(toy(), background), layout_of(live)
    data = coder.encode(indices, layout)
    assert (coder.decode(data, layout) == indices).all()
    assert (coder_of(toy(1), background).encode(indices, layout)) != data


def test_an_open_cell_may_have_any_indices_but_none_that_say_closed() -> None:
    """Of two fine codes either may be the last index, and both are it in a closed cell alone."""
    indices = gated(4, 2, 1.0)
    indices[0, ..., 1], indices[0, ..., 2] = K - 1, 0
    indices[1, ..., 1], indices[1, ..., 2] = 0, K - 1
    layout = layout_of(np.ones(indices.shape[:3], bool))
    coder = coder_of(toy())
    assert (coder.decode(coder.encode(indices, layout), layout) == indices).all()

    impossible = []

    def code(logits: NDArray[np.float64], symbols: NDArray[np.int64]) -> NDArray[np.int64]:
        impossible.append(np.isinf(logits[:, -1]).tolist())
        return symbols

    tokens = indices.reshape(2, -1, BOOKS)
    CoarseFirstWalk(toy(), 0).run(Slices(tokens, np.ones(tokens.shape[:2], bool)), code)
    positions = GRID[0] * GRID[1]
    assert impossible[:positions] == [[False, False]] * positions
    assert impossible[positions:] == [[False, False], [True, False]] * positions


def test_closed_cells_cost_one_symbol_each() -> None:
    """An even network over first indices alone: log2 of 2 K words a cell, and nothing for what is absent."""
    network = toy()
    nn.init.zeros_(network.first_head.weight)
    live = np.ones((60, *GRID), bool)
    data = coder_of(network).encode(gated(5, 60, 0.0), layout_of(live))
    assert 8 * len(data) / live.sum() == pytest.approx(np.log2(2 * K), abs=0.1)


def test_slices_in_groups_and_alone_have_the_same_symbols(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of a group is part of the stream's definition: cut otherwise, the bytes are others."""
    live = np.ones((5, *GRID), bool)
    indices, layout, coder = gated(6, 5), layout_of(live), coder_of(toy())
    together = coder.encode(indices, layout)
    monkeypatch.setattr("vaevq_med.codec.coders.walks.base._CACHE_BYTES", 1)
    alone = coder.encode(indices, layout)
    assert CoarseFirstWalk(toy(), 0).slices_at_once == 1
    assert alone != together
    # The same symbols at the same cost: but for the order of coding nothing differs.
    assert len(alone) == pytest.approx(len(together), abs=4)
    assert (coder.decode(alone, layout) == indices).all()


def test_a_volume_is_walked_layer_by_layer() -> None:
    live = np.ones((4, *GRID), bool)
    indices, layout, coder = gated(7, 4), layout_of(live), coder_of(toy())
    volume = replace(layout, live=live[None], slices=layout.slices[:1])
    assert coder.encode(indices[None], volume) == coder.encode(indices, layout)
    assert (coder.decode(coder.encode(indices[None], volume), volume) == indices[None]).all()


def test_damaged_bytes_are_refused_or_give_other_indices() -> None:
    live = np.ones((3, *GRID), bool)
    indices, layout, coder = gated(8, 3), layout_of(live), coder_of(toy())
    data = coder.encode(indices, layout)
    flipped = [bytes([*data[:at], data[at] ^ 0x55, *data[at + 1 :]]) for at in range(0, len(data), 7)]
    for damaged in (*flipped, data[: len(data) // 2], data[:1], data + b"more"):
        try:
            found: Any = coder.decode(damaged, layout)
        except CodecError:
            continue
        assert found.shape == indices.shape
        assert 0 <= found.min() <= found.max() < K


def test_another_size_is_refused() -> None:
    live = np.ones((1, *GRID), bool)
    with pytest.raises(CodecError, match=r"num_embeddings 8, expected 7"):
        coder_of(toy(num_embeddings=8)).encode(gated(0, 1), layout_of(live))


def test_open_positions_after_the_last_live_one_are_not_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    live = np.zeros((2, *GRID), bool)
    live[0, 0, 1] = live[1, 0, 0] = True
    indices = np.where(live[..., None], gated(9, 2, 1.0), 0)
    network, steps = toy(), []
    step = DoubleBlocks.step
    monkeypatch.setattr(DoubleBlocks, "step", lambda self, *args: steps.append(1) or step(self, *args))  # type: ignore[func-returns-value]
    coder_of(network, (0, 0, 0)).encode(indices, layout_of(live))
    # All positions are open, of which the second is the last that is coded.
    assert len(steps) == GRID[0] * GRID[1] + 2 * (BOOKS - 1)


def test_other_batches_and_threads_stay_far_within_the_bound() -> None:
    network, tokens = toy(), torch.from_numpy(gated(10, 6)).flatten(1, 2)

    def logits_of(slices: torch.Tensor) -> list[NDArray[np.float64]]:
        found: list[list[NDArray[np.float64]]] = [[] for _ in slices]

        def code(logits: NDArray[np.float64], symbols: NDArray[np.int64]) -> NDArray[np.int64]:
            for row, values in enumerate(logits):
                found[row].append(np.where(np.isneginf(values), 0.0, values))
            return symbols

        CoarseFirstWalk(network, 0).run(Slices(slices.numpy().copy(), np.ones(slices.shape[:2], bool)), code)
        return [np.concatenate(values) for values in found]

    # As many open positions in each, so that every call has every slice.
    tokens[:, :6, 1], tokens[:, 6:, 1:] = 0, K - 1
    together = logits_of(tokens)
    for row in range(2):
        assert np.abs(together[row] - logits_of(tokens[row : row + 1])[0]).max() < 1e-11
    before = torch.get_num_threads()
    torch.set_num_threads(2 if before == 1 else 1)
    try:
        assert max(np.abs(a - b).max() for a, b in zip(together, logits_of(tokens), strict=True)) < 1e-11
    finally:
        torch.set_num_threads(before)


def test_streams_decode_though_every_logit_is_off_by_a_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a wide bound the list has entries, of alphabets of two sizes."""
    monkeypatch.setattr(prior, "DELTA", 0.05)
    live = np.ones((4, *GRID), bool)
    indices, layout, coder = gated(11, 4), layout_of(live), coder_of(toy())
    data = coder.encode(indices, layout)
    assert data[0] > 0
    exact, rng = _Steps.logits, np.random.default_rng(0)

    def off(self: _Steps, hidden: torch.Tensor, head: str) -> NDArray[np.float64]:
        found = exact(self, hidden, head)
        return found + rng.uniform(-1, 1, found.shape) * 0.049 * np.log(2) / 256

    monkeypatch.setattr(_Steps, "logits", off)
    assert (coder.decode(data, layout) == indices).all()


def test_an_unknown_contrast_is_the_null_class_and_the_background_counts() -> None:
    live = np.random.default_rng(2).random((6, *GRID)) < 0.6
    indices = np.where(live[..., None], gated(12, 6), 0)
    coder = coder_of(toy())
    unknown = coder.encode(indices, layout_of(live, "flair"))
    assert unknown != coder.encode(indices, layout_of(live, "t1n"))
    null = PriorCoder(toy(), contrasts=("t1n", "t2w", "flair"), background=coder.background)
    assert null.encode(indices, layout_of(live, "flair")) == unknown
    assert coder_of(toy(), (3, K - 1, K - 1)).encode(indices, layout_of(live, "flair")) != unknown


def test_logits_out_of_range_are_refused() -> None:
    network = toy()
    nn.init.constant_(network.first_head.weight, 1e12)
    with pytest.raises(CodecError, match="found a logit out of range"):
        coder_of(network).encode(gated(0, 1), layout_of(np.ones((1, *GRID), bool)))
