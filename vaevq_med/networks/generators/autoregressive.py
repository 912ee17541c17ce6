"""Sampling a tokenizer's indices, one after the other in raster order, as LlamaGen does (arXiv 2406.06525).

Keys and values of the places so far are kept in memory that is taken once; on a GPU the step of a token is replayed as
a CUDA graph (see :mod:`vaevq_med.networks.generators.static_steps`). Classifier-free guidance (arXiv 2207.12598),
in LlamaGen's form on the logits, runs the labels and the null class as one batch of twice the size.

Where some tokens are given, to fill the rest in around them (inpainting), their values stay, and every token after them
in raster order is drawn given them. A token before a known one knows nothing of it, as the network is causal: what
comes before a gap is continued into it, what comes after is not anticipated, and seams may show there.

All draws come from one generator, token by token for the whole batch, so that a sample depends on the batch's size and
its place in it, but not on the labels or the known tokens of its companions. With a generator for each sample it
depends on neither. On a GPU the numbers of several tokens are drawn at once, so that they are others than on a CPU even
from one generator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.base import Tokenizer
from vaevq_med.networks.generators.base import Draw, Wanted
from vaevq_med.networks.generators.drawing import (
    RandomSource,
    TokenRule,
    batch_size,
    check_sources,
    draw_indices,
    evaluating,
)
from vaevq_med.networks.generators.static_steps import StepStore
from vaevq_med.networks.generators.stepwise import StepwiseGenerator
from vaevq_med.networks.generators.token_generator import Kept


@torch.no_grad()
def generate_indices(
    network: StepwiseGenerator,
    *,
    labels: Tensor | None = None,
    num_samples: int | None = None,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
    generator: RandomSource = None,
    progress: Callable[[int, int], None] | None = None,
    store: StepStore | None = None,
) -> Tensor:
    """Indices of new images.

    The logits are guided, divided by the temperature and filtered, in fp32; the network runs in evaluation mode.

    Args:
        network: on the device where it is to run; its mode is left as it was.
        labels: integers ``[B]``, from 0 to ``num_classes``, which is the null class.
        num_samples: B, needed where there are no labels; all are then of the null class.
        guidance_scale: s in ``u + s (c - u)``; 1 is no guidance and takes half the work.
        temperature: from 0.001 to 1000; divides the logits.
        top_k: see :func:`filter_logits`; 0 keeps all, 1 takes the likeliest.
        top_p: see :func:`filter_logits`; 1 keeps all.
        known: tokens that are given, integers ``[B, h, w, G]``; where the mask is false they may be anything.
        mask: booleans ``[B, h, w, G]`` or ``[B, h, w]``, true where ``known`` is kept.
        dtype: type of weights, keys and values while it runs, such as ``torch.bfloat16``, in a copy of the network; the
            network's own when absent.
        generator: of the draws, or one for each sample; the global one when absent.
        progress: called with the tokens done and all tokens of an image after each; on a GPU, once the token is on its
            way.
        store: what a GPU replays, kept for further calls; made anew for this one when absent. On a CPU it is better
            left out, as the steps that a graph allows are slower there.

    Returns:
        int64 ``[B, h, w, G]``.

    Raises:
        VaevqMedError: an argument is out of its range or does not fit the others, or guidance has no labels.
    """
    rule = TokenRule(guidance_scale, temperature, top_k, top_p)
    if labels is None and rule.guided:
        raise VaevqMedError(f"guidance_scale is {guidance_scale} without labels; expected labels, or 1")
    batch = batch_size(labels, num_samples)
    check_sources(generator, batch)
    classes, kept = network.both_classes(labels, batch, guided=rule.guided), network.kept(known, mask, batch)
    if store is None and classes.device.type == "cuda":
        store = StepStore()
    if store is None and dtype is not None and dtype != network.token_embedding.weight.dtype:
        network = copy.deepcopy(network).to(dtype)
    with evaluating(network), torch.autocast(classes.device.type, enabled=False):
        if store is None:
            tokens = _grown(network, classes, rule, kept, generator, progress)
        else:
            steps = store.steps(network, rule, batch=batch, dtype=dtype, inpaint=kept is not None)
            tokens = steps.run(classes, kept, generator, progress)
    return tokens.view(batch, *network.grid_size, network.num_codebooks)


def _grown(
    network: StepwiseGenerator,
    classes: Tensor,
    rule: TokenRule,
    kept: Kept | None,
    generator: RandomSource,
    progress: Callable[[int, int], None] | None,
) -> Tensor:
    """Tokens ``[B, h w G]``, each from the places so far alone."""
    cache = network.new_cache(len(classes))
    copies = 2 if rule.guided else 1
    tokens = torch.empty(len(classes) // copies, cache.capacity, dtype=torch.int64, device=classes.device)
    inputs = classes
    for place in range(cache.capacity):
        drawn = draw_indices(rule.filtered(network.step(inputs, cache)), generator)
        if kept is not None:
            drawn = torch.where(kept[0][:, place], kept[1][:, place], drawn)
        tokens[:, place] = drawn
        inputs = drawn.repeat(copies)
        if progress is not None:
            progress(place + 1, cache.capacity)
    return tokens


def autoregressive_draws(
    network: StepwiseGenerator, tokenizer: Tokenizer, settings: Mapping[str, Any], store: StepStore | None = None
) -> Draw:
    """What draws indices and decodes them; the graphs of a GPU serve every batch of the same size.

    Args:
        network: in evaluation mode.
        tokenizer: on the same device.
        settings: of :func:`generate_indices`.
        store: likewise; a new one on a GPU when absent.
    """
    device = network.token_embedding.weight.device
    if store is None and device.type == "cuda":
        store = StepStore()

    def draw(wanted: Wanted) -> Tensor:
        indices = generate_indices(
            network,
            labels=wanted.labels,
            num_samples=len(wanted.seeds),
            known=wanted.known,
            mask=wanted.mask,
            dtype=wanted.dtype,
            generator=[torch.Generator(device).manual_seed(seed) for seed in wanted.seeds],
            store=store,
            **settings,
        )
        return tokenizer.decode_indices(indices)

    return draw
