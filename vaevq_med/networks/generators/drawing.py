"""From logits to tokens: guidance, temperature, filters and the draw, none of which waits for the device.

Shapes and operations are the same whatever the values, so that a CUDA graph can hold them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.options import is_number

RandomSource = torch.Generator | Sequence[torch.Generator] | None
"""One generator, or one for each entry of the first dimension, or the global one."""

MIN_TEMPERATURE, MAX_GUIDANCE = 1e-3, 1e4
"""Beyond these the guided logits over the temperature may leave fp32, and every index drawn is then 0."""

GUIDANCE_SCALE = (lambda value: is_number(value, 0, MAX_GUIDANCE), f"a number from 0 to {MAX_GUIDANCE:g}")
"""Whether a scale may be chosen, and which may in words."""


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


def draw_indices(logits: Tensor, generator: RandomSource = None) -> Tensor:
    """One draw from ``softmax(logits)`` of each row of ``[..., K]``, without waiting for the device.

    The index of the least of K exponential variables whose rates are the probabilities.

    Args:
        logits: fp32; what is ``-inf`` is not drawn.
        generator: it draws on its own device, K numbers for each row in order; or one for each entry of the first
            dimension; the global one when absent.
    """
    return soonest(logits, fill_waits(torch.empty_like(logits, memory_format=torch.contiguous_format), generator))


def fill_waits(waits: Tensor, generator: RandomSource = None) -> Tensor:
    """Fill ``waits`` with exponential variables of rate 1, none of them 0, and return it; as :func:`draw_indices`."""
    if isinstance(generator, Sequence):
        for part, source in zip(waits, generator, strict=True):
            _fill(part, source)
    else:
        _fill(waits, generator)
    return waits.clamp_min_(torch.finfo(waits.dtype).tiny)


def _fill(waits: Tensor, generator: torch.Generator | None) -> None:
    source = waits.device if generator is None else generator.device
    # A GPU's generator made for no GPU in particular names none.
    if source.type == waits.device.type and source.index in (None, waits.device.index):
        waits.exponential_(generator=generator)
    else:
        waits.copy_(torch.empty(waits.shape, device=source).exponential_(generator=generator))


def soonest(logits: Tensor, waits: Tensor) -> Tensor:
    """The index of the least wait, where ``waits`` of rate 1 get the rates ``softmax(logits)``."""
    return (logits.softmax(dim=-1) / waits).argmax(dim=-1)


@dataclass(frozen=True)
class TokenRule:
    """How a token follows from logits; the arguments are those of ``generate_indices``.

    Raises:
        VaevqMedError: the scale or the temperature is out of its range.
    """

    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_guidance(self.guidance_scale)
        if not MIN_TEMPERATURE <= self.temperature <= 1 / MIN_TEMPERATURE:
            raise VaevqMedError(
                f"temperature is {self.temperature}; expected {MIN_TEMPERATURE:g} to {1 / MIN_TEMPERATURE:g} (top_k 1 "
                "takes the likeliest)"
            )

    @property
    def guided(self) -> bool:
        """Whether the logits are those of the labels and, behind them, of the null class."""
        return self.guidance_scale != 1

    def filtered(self, logits: Tensor) -> Tensor:
        """What is drawn from, ``[B, K]`` in fp32, of logits ``[B, K]``, or ``[2 B, K]`` with guidance."""
        logits = logits.float()
        if self.guided:
            conditional, unconditional = logits.chunk(2)
            logits = guided_logits(conditional, unconditional, self.guidance_scale)  # [B, K]
        return filter_logits(logits / self.temperature, top_k=self.top_k, top_p=self.top_p)

    def possible(self, logits: Tensor, impossible: Tensor) -> Tensor:
        """:meth:`filtered` without what is impossible, bool ``[B, ..., K]``: that is not drawn."""
        # Far below, and not at minus infinity, whose guidance would not be a number.
        both = torch.cat([impossible, impossible]) if self.guided else impossible
        return self.filtered(logits.float().masked_fill(both, -1e30)).masked_fill(impossible, -math.inf)


def batch_size(labels: Tensor | None, num_samples: int | None) -> int:
    """How many samples these ask for.

    Raises:
        VaevqMedError: neither says it, or they say different numbers.
    """
    if labels is None:
        if num_samples is None or num_samples < 1:
            raise VaevqMedError(f"num_samples is {num_samples} without labels; expected at least 1")
        return num_samples
    if labels.ndim != 1 or len(labels) == 0 or num_samples not in (None, len(labels)):
        raise VaevqMedError(
            f"labels have shape {tuple(labels.shape)} and num_samples is {num_samples}; expected [B] and B or None"
        )
    return len(labels)


def check_sources(generator: RandomSource, batch: int) -> None:
    """Refuse generators of another number than the samples.

    Raises:
        VaevqMedError: naming both.
    """
    if isinstance(generator, Sequence) and len(generator) != batch:
        raise VaevqMedError(f"found {len(generator)} generators; expected one, or one for each of {batch} samples")


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """In evaluation mode; afterwards in the one that it was in."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)
