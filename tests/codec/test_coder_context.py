"""The context model: exact integers, and fewer bits where neighbors tell something."""

from dataclasses import replace
from decimal import Decimal, getcontext
from pathlib import Path

import numpy as np
import pytest
from helpers.index_stacks import random_model, smooth_stack

from vaevq_med.codec.coders.adaptive import AdaptiveCoder
from vaevq_med.codec.coders.context import ContextCoder
from vaevq_med.codec.coders.context_model import (
    ContextModel,
    frequencies_of,
    load_context_model,
    model_hash,
    power_table,
)
from vaevq_med.codec.coders.neighbors import CAUSAL, REFERENCE, Neighborhood
from vaevq_med.codec.coders.range_coder import TOTAL
from vaevq_med.codec.errors import CodecError
from vaevq_med.codec.index_model import IndexModelOptions, train_context_model
from vaevq_med.core.errors import VaevqMedError


@pytest.fixture(scope="module")
def trained() -> ContextModel:
    stacks = [smooth_stack(seed, reference=seed % 2 == 0) for seed in range(6)]
    options = IndexModelOptions(hidden=32, width=4, epochs=12, batch_size=128, learning_rate=1e-2)
    return train_context_model(stacks, tokenizer="sha256:1", codebook=None, options=options)


def by_the_page(model: ContextModel, seen: np.ndarray, own: np.ndarray, further: np.ndarray, c: int, g: int) -> list:
    """Frequencies of one position, by docs/codec_coders.md, in Python's integers."""
    books, size, _ = model.embedding.shape
    own = np.where(np.arange(books) < g, own, size - 1)
    symbols = np.concatenate([seen, own[None]]) if books > 1 else seen
    x = [int(v) for b in range(books) for s in symbols[:, b] for v in model.embedding[b, s]] + further.tolist()

    def layer(inputs: list[int], weights: np.ndarray, bias: np.ndarray) -> list[int]:
        columns = weights.astype(int).T.tolist()
        sums = (sum(a * b for a, b in zip(inputs, column, strict=True)) for column in columns)
        return [(total + int(b)) >> 10 for total, b in zip(sums, bias, strict=True)]

    h = [min(max(v, 0), 2**20) for v in layer(x, model.first, model.first_bias[c, g])]
    h = [min(max(v, 0), 2**20) for v in layer(h, model.second, model.second_bias)]
    logits = layer(h, model.last[g], model.last_bias[g])
    getcontext().prec = 50
    weights = []
    for value in logits:
        below = max(logits) - value
        power = (Decimal(2) ** (Decimal(30) - Decimal(below % 256) / 256)).to_integral_value()
        weights.append(int(power) >> min(below // 256, 31))
    free = TOTAL - len(weights)
    found = [1 + w * free // sum(weights) for w in weights]
    found[weights.index(max(weights))] += TOTAL - sum(found)
    return found


@pytest.mark.parametrize("codebooks", [1, 2])
def test_frequencies_are_those_of_the_page(codebooks: int) -> None:
    model = random_model(2, 9, codebooks)
    stack = smooth_stack(7, num_embeddings=9, num_codebooks=codebooks, shape=(3, 3, 3), reference=True)
    hood = Neighborhood(stack.layout)
    hood.fill(stack.indices[stack.layout.live])
    seen, further = hood.around(slice(None))
    own = stack.indices[stack.layout.live][hood.source]
    for g in range(codebooks):
        for contrast, row in (("t1n", 0), ("other", 1)):
            hidden = model.hidden(seen, own, further, contrast=contrast, codebook=g)
            found = frequencies_of(model.logits(hidden, g))
            assert len(np.unique(found, axis=0)) > 1
            for n in range(0, len(own), 3):
                assert found[n].tolist() == by_the_page(model, seen[n], own[n], further[n], row, g)


def test_powers_are_rounded_right() -> None:
    table = power_table()
    assert table[0] == 2**30
    assert table[128] == 759_250_125  # 2^29.5 = 759250124.99...
    assert (np.diff(table) < 0).all()


def test_neighbors_are_where_they_should_be() -> None:
    stack = smooth_stack(0, shape=(5, 4, 4), reference=True)
    layout = replace(stack.layout, slices=np.array([2, 3, 5, 6, 7]))
    hood = Neighborhood(layout)
    hood.fill(stack.indices[layout.live])
    seen, _ = hood.around(slice(None))
    places = np.argwhere(layout.live)[hood.source]
    k = layout.num_embeddings
    for (n, y, x), around in zip(places.tolist(), seen[:, :, 0], strict=True):
        for directions, values, known in (
            (CAUSAL, around[: len(CAUSAL)], stack.indices),
            (REFERENCE, around[len(CAUSAL) :], layout.reference),
        ):
            for (dn, dy, dx), value in zip(directions, values, strict=True):
                # Slices 3 and 5 have a gap between them.
                there = int(layout.slices[n]) + dn
                m = layout.slices.tolist().index(there) if there in layout.slices else -1
                beyond = m >= 0 and (n < 2) != (m < 2)
                inside = m >= 0 and not beyond and 0 <= y + dy < 4 and 0 <= x + dx < 4
                if not inside:
                    assert value == k + 1
                elif not layout.live[m, y + dy, x + dx]:
                    assert value == k
                else:
                    assert value == known[m, y + dy, x + dx, 0]


def test_a_context_costs_less_than_frequencies_and_a_reference_less_than_none(trained: ContextModel) -> None:
    coder = ContextCoder(trained)
    sizes = {}
    for reference in (False, True):
        stack = smooth_stack(11, shape=(16, 10, 10), reference=reference)
        data = coder.encode(stack.indices, stack.layout)
        assert (coder.decode(data, stack.layout) == stack.indices).all()
        sizes[reference] = len(data)
        adaptive = len(AdaptiveCoder().encode(stack.indices, stack.layout))
    assert sizes[False] < 0.9 * adaptive
    assert sizes[True] < 0.7 * sizes[False]


def test_a_model_is_read_as_it_was_written(trained: ContextModel, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    trained.save(path)
    read = load_context_model(path)
    assert (read.tokenizer, read.contrasts) == ("sha256:1", ("t1n",))
    stack = smooth_stack(2, reference=True)
    assert ContextCoder(read).encode(stack.indices, stack.layout) == ContextCoder(trained).encode(
        stack.indices, stack.layout
    )
    assert model_hash(path).startswith("sha256:")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CodecError, match="no readable context model"):
        load_context_model(path)
    path.write_bytes(content.replace(b'format\\": 1', b'format\\": 2'))
    with pytest.raises(CodecError, match="format 2, expected 1"):
        load_context_model(path)


def test_training_depends_on_its_seed_alone() -> None:
    def made(seed: int) -> ContextModel:
        return random_model(seed, 9)

    assert (made(1).last == made(1).last).all()
    assert (made(1).first != made(2).first).any()


def test_nothing_to_learn_from_and_bad_options_are_refused() -> None:
    stack = smooth_stack(0)
    dead = replace(stack, layout=replace(stack.layout, live=np.zeros_like(stack.layout.live)))
    for stacks in ([], [dead]):
        with pytest.raises(VaevqMedError, match="no live position"):
            train_context_model(stacks, tokenizer="", codebook=None, options=IndexModelOptions())
    with pytest.raises(VaevqMedError, match="--hidden: found 0, expected 1 to 4096"):
        train_context_model([stack], tokenizer="", codebook=None, options=IndexModelOptions(hidden=0))


def test_slices_out_of_order_are_refused() -> None:
    stack = smooth_stack(0)
    layout = replace(stack.layout, slices=stack.layout.slices[::-1].copy())
    with pytest.raises(CodecError, match="do not rise"):
        ContextCoder(random_model(0, 16)).encode(stack.indices, layout)
