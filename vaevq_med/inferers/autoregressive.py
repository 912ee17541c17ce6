"""Sampling a tokenizer's indices from :class:`LlamaGen` (arXiv 2406.06525), one after the other in raster order.

Keys and values of the places so far are kept in memory that is taken once. Classifier-free guidance (arXiv 2207.12598),
in LlamaGen's form on the logits, runs the labels and the null class as one batch of twice the size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vaevq_med.errors import VaevqMedError
from vaevq_med.networks.llamagen import LlamaGen
from vaevq_med.ranges import check_range

MIN_TEMPERATURE, MAX_GUIDANCE = 1e-3, 1e4
"""Beyond these the guided logits over the temperature may leave fp32, and every index drawn is then 0."""


def guided_logits(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, ``u + s (c - u)``; a scale of 1 is ``c`` and of 0 is ``u``.

    >>> guided_logits(torch.tensor([3.0]), torch.tensor([1.0]), 2.0)
    tensor([5.])
    """
    return unconditional + scale * (conditional - unconditional)


def check_guidance(scale: float) -> None:
    """Refuse a scale below 0, which leads away from the label, or above :data:`MAX_GUIDANCE`.

    Raises:
        VaevqMedError: it is such a scale.
    """
    if not 0 <= scale <= MAX_GUIDANCE:
        raise VaevqMedError(f"guidance_scale is {scale}; expected 0 to {MAX_GUIDANCE:g}")


def filter_logits(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits with those that are not to be drawn at ``-inf``; first top-k, then top-p (arXiv 1904.09751) of the rest.

    Args:
        logits: ``[..., K]``, floating.
        top_k: keep the ``top_k`` largest, and what equals the least of them; 0, or K and more, keeps all.
        top_p: in (0, 1]: keep the fewest, from the likeliest on, whose probabilities sum to ``top_p`` or more; of
            equal ones those of lower index.

    Raises:
        VaevqMedError: ``top_k`` or ``top_p`` is out of its range.

    >>> filter_logits(torch.tensor([0.5, 0.3, 0.2]).log(), top_p=0.6).exp().round(decimals=2)
    tensor([0.5000, 0.3000, 0.0000])
    """
    if top_k < 0 or not 0 < top_p <= 1:
        raise VaevqMedError(f"found top_k {top_k} and top_p {top_p}; expected 0 or more, and above 0 to 1")
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        descending, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = descending.softmax(dim=-1)
        excess = probabilities.cumsum(dim=-1) - probabilities >= top_p
        logits = logits.masked_fill(torch.empty_like(excess).scatter_(-1, order, excess), -math.inf)
    return logits


def draw_indices(logits: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
    """One draw from ``softmax(logits)`` of each row of ``[..., K]``, without waiting for the device.

    The index of the least of K exponential variables whose rates are the probabilities.

    Args:
        logits: fp32; what is ``-inf`` is not drawn.
        generator: it draws on its own device, K numbers for each row in order; or one for each entry of the first
            dimension; the global one when absent.
    """
    if isinstance(generator, Sequence):
        rows = [torch.empty(logits.shape[1:], device=g.device).exponential_(generator=g) for g in generator]
        waits = torch.stack(rows).to(logits.device)
    else:
        device = logits.device if generator is None else generator.device
        waits = torch.empty(logits.shape, device=device).exponential_(generator=generator).to(logits.device)
    return (logits.softmax(dim=-1) / waits.clamp_min(torch.finfo(waits.dtype).tiny)).argmax(dim=-1)


@torch.no_grad()
def generate_indices(
    network: LlamaGen,
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
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Indices of new images.

    The logits are guided, divided by the temperature and filtered, in fp32; the network runs in evaluation mode.

    With ``known`` and ``mask`` some tokens are given, to fill the rest in around them (inpainting). Their values stay,
    and every token after them in raster order is drawn given them. A token before a known one knows nothing of it, as
    the network is causal: what comes before a gap is continued into it, what comes after is not anticipated, and seams
    may show there.

    All draws come from one generator, token by token for the whole batch, so that a sample depends on the batch's size
    and its place in it, but not on the labels or the known tokens of its companions. With a generator for each sample
    it depends on neither.

    Args:
        network: on the device where it is to run; its mode is left as it was.
        labels: integers ``[B]``, from 0 to ``num_classes``, which is the null class.
        num_samples: B, needed where there are no labels; all are then of the null class.
        guidance_scale: s in ``u + s (c - u)``; 1 is no guidance and takes half the work.
        temperature: from 0.001 to 1000; divides the logits.
        top_k: see :func:`filter_logits`; 0 keeps all, 1 takes the likeliest.
        top_p: see :func:`filter_logits`; 1 keeps all.
        known: integers ``[B, h, w, G]``; where the mask is false they may be anything.
        mask: booleans ``[B, h, w, G]`` or ``[B, h, w]``, true where ``known`` is kept.
        dtype: type of weights, keys and values while it runs, such as ``torch.bfloat16``, in a copy of the network; the
            network's own when absent.
        generator: of the draws, or one for each sample; the global one when absent.
        progress: called with the tokens done and all tokens of an image after each.

    Returns:
        int64 ``[B, h, w, G]``.

    Raises:
        VaevqMedError: an argument is out of its range or does not fit the others, or guidance has no labels.
    """
    check_guidance(guidance_scale)
    if labels is None and guidance_scale != 1:
        raise VaevqMedError(f"guidance_scale is {guidance_scale} without labels; expected labels, or 1")
    if not MIN_TEMPERATURE <= temperature <= 1 / MIN_TEMPERATURE:
        raise VaevqMedError(
            f"temperature is {temperature}; expected {MIN_TEMPERATURE:g} to {1 / MIN_TEMPERATURE:g} (top_k 1 takes the "
            "likeliest)"
        )
    batch = _batch_size(labels, num_samples)
    if isinstance(generator, Sequence) and len(generator) != batch:
        raise VaevqMedError(f"found {len(generator)} generators; expected one, or one for each of {batch} samples")
    classes = network.check_labels(labels, batch)
    kept = _kept(network, known, mask, batch)
    if guidance_scale != 1:
        classes = torch.cat([classes, torch.full_like(classes, network.null_class)])
    if dtype is not None and dtype != network.token_embedding.weight.dtype:
        network = copy.deepcopy(network).to(dtype)
    training = network.training
    network.eval()
    try:
        with torch.autocast(classes.device.type, enabled=False):
            cache = network.new_cache(len(classes))
            tokens = torch.empty(batch, cache.capacity, dtype=torch.int64, device=classes.device)
            inputs = classes
            for place in range(cache.capacity):
                logits = network.step(inputs, cache).float()
                if guidance_scale != 1:
                    conditional, unconditional = logits.chunk(2)
                    logits = guided_logits(conditional, unconditional, guidance_scale)
                drawn = draw_indices(filter_logits(logits / temperature, top_k=top_k, top_p=top_p), generator)
                if kept is not None:
                    drawn = torch.where(kept[0][:, place], kept[1][:, place], drawn)
                tokens[:, place] = drawn
                inputs = drawn.repeat(len(classes) // batch)
                if progress is not None:
                    progress(place + 1, cache.capacity)
    finally:
        network.train(training)
    return tokens.view(batch, *network.grid_size, network.num_codebooks)


def _batch_size(labels: Tensor | None, num_samples: int | None) -> int:
    if labels is None:
        if num_samples is None or num_samples < 1:
            raise VaevqMedError(f"num_samples is {num_samples} without labels; expected at least 1")
        return num_samples
    if labels.ndim != 1 or len(labels) == 0 or num_samples not in (None, len(labels)):
        raise VaevqMedError(
            f"labels have shape {tuple(labels.shape)} and num_samples is {num_samples}; expected [B] and B or None"
        )
    return len(labels)


def _kept(network: LlamaGen, known: Tensor | None, mask: Tensor | None, batch: int) -> tuple[Tensor, Tensor] | None:
    """Mask and values of the known tokens, ``[B, h w G]`` each on the network's device."""
    if known is None and mask is None:
        return None
    if known is None or mask is None:
        raise VaevqMedError(f"found {'mask without known' if known is None else 'known without mask'}; expected both")
    shape = (batch, *network.grid_size, network.num_codebooks)
    if mask.ndim == 3:
        mask = mask.unsqueeze(-1).expand(*mask.shape, network.num_codebooks)
    if known.shape != shape or mask.shape != shape or mask.dtype != torch.bool:
        raise VaevqMedError(
            f"known has shape {tuple(known.shape)} and the mask {tuple(mask.shape)} of {mask.dtype}; "
            f"expected {list(shape)} each, and torch.bool"
        )
    values = known.long().masked_fill(~mask.to(known.device), 0)
    check_range("known indices", values, network.num_embeddings - 1)
    device = network.token_embedding.weight.device
    return mask.to(device).flatten(1), values.to(device).flatten(1)
