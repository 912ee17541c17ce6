"""Indices of two levels under a gate: what a coder's bytes cost a cell, beside the gate's own count of bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.index_stacks import random_prior
from numpy.typing import NDArray
from scipy.stats import entropy

from vaevq_med.codec.coders.adaptive import AdaptiveCoder
from vaevq_med.codec.coders.base import IndexCoder
from vaevq_med.codec.coders.context import ContextCoder
from vaevq_med.codec.coders.layout import Layout
from vaevq_med.codec.index_model import IndexModelOptions, train_context_model
from vaevq_med.codec.stacks import Stack
from vaevq_med.networks.quantizers import VectorQuantizer
from vaevq_med.networks.quantizers.gates import VarianceGate
from vaevq_med.networks.quantizers.two_level_residual import ResidualTwoLevel

K, N = 16, 4
"""Codewords, and fine codes of an open cell; K itself is the index of one that is absent."""


def gated(seed: int, share: float, shape: tuple[int, int, int] = (24, 24, 24)) -> Stack:
    """Codes of which each is as likely as another, in cells that are open at random: no coder can do better."""
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, K, (*shape, 1 + N))
    indices[rng.random(shape) >= share, 1:] = K
    return Stack(str(seed), indices, Layout(np.ones(shape, bool), np.arange(shape[0]), K + 1, 1 + N, "t1n"))


def open_share(indices: NDArray[np.int64]) -> float:
    return float((indices[..., 1] != K).mean())


def mean_bits(indices: NDArray[np.int64]) -> float:
    """What an evaluation's record says of these indices."""
    codebooks = [VectorQuantizer(num_embeddings=K, embedding_dim=2) for _ in range(2)]
    quantizer = ResidualTwoLevel(top=codebooks[0], bottom=codebooks[1], cell_size=N, gate=VarianceGate())
    counts = [torch.bincount(torch.from_numpy(one.ravel()), minlength=K + 1) for one in np.moveaxis(indices, -1, 0)]
    return quantizer.rate(torch.stack(counts))["mean_bits"]


def bits_a_cell(coder: IndexCoder, stack: Stack) -> float:
    data = coder.encode(stack.indices, stack.layout)
    assert (coder.decode(data, stack.layout) == stack.indices).all()
    return 8 * len(data) / stack.layout.live.sum()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 1.0])
def test_adaptive_frequencies_pay_for_the_gate_once_a_fine_code(share: float) -> None:
    stack = gated(0, share)
    found, told = open_share(stack.indices), mean_bits(stack.indices)
    expected = (1 + N * found) * math.log2(K) + N * entropy([found, 1 - found], base=2)
    bits = bits_a_cell(AdaptiveCoder(), stack)
    assert told - 0.01 < bits < 1.03 * expected
    assert expected == pytest.approx(told + (N - 1) * entropy([found, 1 - found], base=2))
    if share < 1:
        assert bits < 0.6 * (1 + N) * math.log2(K + 1)


def test_closed_cells_cost_their_top_code_alone() -> None:
    """Of 13,824 closed cells the 55,296 absent codes take 200 bytes at most, 0.03 bits each."""
    stack = gated(1, 0.0)
    top = Layout(stack.layout.live, stack.layout.slices, K + 1, 1, "t1n")
    coder = AdaptiveCoder()
    with_absent = len(coder.encode(stack.indices, stack.layout))
    assert with_absent - len(coder.encode(stack.indices[..., :1], top)) < 200


@pytest.mark.slow
def test_a_context_model_pays_for_the_gate_once_a_cell() -> None:
    options = IndexModelOptions(hidden=32, width=4, epochs=6, batch_size=64, learning_rate=3e-2)
    seen = [gated(seed, 0.25, (6, 10, 10)) for seed in (1, 2)]
    model = train_context_model(seen, tokenizer="sha256:0", codebook=None, options=options)
    stack = gated(0, 0.25, (12, 16, 16))
    told = mean_bits(stack.indices)
    bits = bits_a_cell(ContextCoder(model), stack)
    assert told - 0.01 < bits < 1.06 * told
    assert bits < bits_a_cell(AdaptiveCoder(), stack) - 1.5


def test_a_prior_takes_what_is_absent_for_one_more_codeword() -> None:
    stack = gated(0, 0.25, (3, 4, 5))
    coder = random_prior(0, K + 1, (4, 5), 1 + N)
    assert (coder.decode(coder.encode(stack.indices, stack.layout), stack.layout) == stack.indices).all()
