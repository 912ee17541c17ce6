"""Small stacks of indices that have neighbors worth looking at, and coders for them."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from vaevq_med.codec.coders.context_model import ContextModel
from vaevq_med.codec.coders.layout import Layout
from vaevq_med.codec.coders.prior import PriorCoder
from vaevq_med.codec.index_model import IndexModelOptions, train_context_model
from vaevq_med.codec.stacks import Stack
from vaevq_med.networks.generators.llamagen import LlamaGen


def smooth_stack(
    seed: int,
    *,
    num_embeddings: int = 16,
    shape: tuple[int, ...] = (10, 8, 8),
    num_codebooks: int = 1,
    reference: bool = False,
) -> Stack:
    """A random walk along every axis, so that neighbors are alike; a block of it is live."""
    rng = np.random.default_rng(seed)
    walk = rng.normal(size=(*shape, num_codebooks))
    for axis in range(len(shape)):
        walk = (walk + np.roll(walk, 1, axis) + np.roll(walk, -1, axis)) / 3
    ranks = walk.ravel().argsort().argsort().reshape(walk.shape)
    indices = ranks * num_embeddings // ranks.size
    live = np.zeros(shape, bool)
    live[tuple(slice(1, size) for size in shape)] = True
    layout = Layout(
        live=live,
        slices=np.arange(shape[0]) + 3,
        num_embeddings=num_embeddings,
        num_codebooks=num_codebooks,
        contrast="t1n",
        reference=np.where(live[..., None], (indices + 1) % num_embeddings, 0) if reference else None,
    )
    return Stack(str(seed), np.where(live[..., None], indices, 0), layout)


def random_model(seed: int, num_embeddings: int, num_codebooks: int = 1) -> ContextModel:
    """An untrained context model whose frequencies are far from even."""
    stack = smooth_stack(seed, num_embeddings=num_embeddings, shape=(2, 3, 3), num_codebooks=num_codebooks)
    options = IndexModelOptions(hidden=8, width=3, epochs=1, batch_size=8, learning_rate=0.3, seed=seed)
    return train_context_model([stack], tokenizer="sha256:0", codebook=None, options=options)


def random_prior(
    seed: int,
    num_embeddings: int,
    grid: tuple[int, int] = (4, 5),
    num_codebooks: int = 1,
    *,
    sees_below: bool = False,
) -> PriorCoder:
    """A coder of an untrained generator whose frequencies are far from even."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = LlamaGen(
            num_embeddings=num_embeddings,
            grid_size=grid,
            width=16,
            depth=2,
            num_heads=2,
            num_classes=2,
            num_codebooks=num_codebooks,
            sees_below=sees_below,
        ).eval()
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
    return PriorCoder(network, contrasts=("t1n", "t2w"), background=(1,) * num_codebooks)
