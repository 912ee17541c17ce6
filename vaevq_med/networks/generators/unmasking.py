"""Sampling many tokens at a time, from a network that predicts them from those that are there.

Four orders:

- ``ancestral``: the steps back of the process itself, strided where there are fewer than its times.
- ``confidence`` (MaskGIT, arXiv 2202.04200): all masked tokens are drawn at each step, and those are kept of which the
  network was surest; ``log p`` of the token plus Gumbel noise, which shrinks, decides. The cosine of the steps says how
  many are left.
- ``halton`` (arXiv 2503.17076): positions in the order of a low-discrepancy sequence, by the arc cosine, without noise.
- ``purity`` (improved VQ-Diffusion, arXiv 2205.16007): equal numbers a step; positions are drawn by their largest
  probability, and the probabilities of sure positions are sharpened.

The last three reveal masks, and so are for the process ``absorbing``. Guidance acts on log-probabilities,
``u + s (c - u)``, as in 2205.16007. Known tokens are masks that were revealed, so that the context of a gap is seen on
all of its sides; where a process replaces tokens, they are corrupted to each step's time, as what surrounds them is
(arXiv 2201.09865), and come back unchanged at its end.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.base import Tokenizer
from vaevq_med.networks.generators.base import Draw, Wanted
from vaevq_med.networks.generators.corruption import Corruption
from vaevq_med.networks.generators.drawing import (
    RandomSource,
    TokenRule,
    batch_size,
    check_sources,
    draw_indices,
    evaluating,
    fill_waits,
)
from vaevq_med.networks.generators.token_generator import Kept, TokenGenerator
from vaevq_med.networks.ranges import check_choice, check_sizes

AUTO = "auto"
ORDERS = ("ancestral", "confidence", "halton", "purity")
_ANCESTRAL_STEPS, _FEW_STEPS = 100, 12
_OF_REVEAL = ("order", "num_steps", "choice_temperature", "purity_weight")


class CorruptedTokenGenerator(TokenGenerator):
    """A generator called with corrupted tokens ``[B, h w G]``, labels ``[B]`` and times ``[B]``.

    It gives ``log p(x_0 | x_t)`` in fp32, ``[B, h w G, K]``.

    Attributes:
        corruption: the process.
    """

    corruption: Corruption


@dataclass(frozen=True)
class Reveal:
    """In which order and how many tokens are revealed, for a process.

    Args:
        corruption: the process.
        order: one of :data:`ORDERS`, or ``auto``: ``confidence`` where tokens are only masked, else ``ancestral``.
        num_steps: S; None for 12, of ``ancestral`` 100 or the times of the process where these are fewer.
        choice_temperature: of the noise of ``confidence``, 4.5 in MaskGIT.
        purity_weight: r in ``p^(1 + r purity)``, the largest purity of an image being 1; of ``purity``.

    Raises:
        VaevqMedError: the order is not one of the process, or there are more steps than times.
    """

    corruption: Corruption
    order: str = AUTO
    num_steps: int | None = None
    choice_temperature: float = 4.5
    purity_weight: float = 1.0

    def __post_init__(self) -> None:
        check_choice("order", self.order, (AUTO, *ORDERS))
        if self.order == AUTO:
            object.__setattr__(self, "order", "ancestral" if self.corruption.replaces else "confidence")
        if self.order != "ancestral" and self.corruption.replaces:
            raise VaevqMedError(
                f"order is {self.order!r} with the process {self.corruption.process!r}; expected 'ancestral', as the "
                "others reveal masks that stay revealed"
            )
        most = self.corruption.num_steps
        if self.num_steps is None:
            object.__setattr__(
                self, "num_steps", min(_ANCESTRAL_STEPS, most) if self.order == "ancestral" else _FEW_STEPS
            )
        check_sizes(num_steps=self.steps)
        if self.order == "ancestral" and self.steps > most:
            raise VaevqMedError(f"num_steps is {self.num_steps}; expected 1 to {most}, the times of the process")

    @property
    def steps(self) -> int:
        """S."""
        assert self.num_steps is not None
        return self.num_steps

    @property
    def times(self) -> list[int]:
        """The times of ``ancestral``, from T to 0, S + 1 in all."""
        return [self.corruption.num_steps * (self.steps - step) // self.steps for step in range(self.steps + 1)]

    def left(self, step: int, unknown: Tensor, before: Tensor) -> Tensor:
        """How many tokens of each image are still masks after a step of S.

        At least one is revealed, and one is left but for the last step.

        Args:
            step: from 1.
            unknown: how many were masks at first, ``[B]``.
            before: how many there are.

        >>> reveal = Reveal(Corruption("absorbing", num_embeddings=2, num_steps=8), num_steps=8)
        >>> count = torch.tensor([256])
        >>> reveal.left(1, count, count)
        tensor([251])
        """
        if step == self.steps:
            return torch.zeros_like(unknown)
        done = step / self.steps
        share = {
            "confidence": math.cos(math.pi / 2 * done),
            "halton": math.acos(done) / (math.pi / 2),
            "purity": 1 - done,
        }[self.order]
        wanted = (unknown.double() * share).floor().long()
        return torch.minimum(torch.minimum(wanted, before - 1).clamp_min(1), before)


def halton_order(height: int, width: int) -> Tensor:
    """At which place each position of a grid comes in the Halton sequence of bases 2 and 3, ``[h w]``.

    The points of the sequence fall into cells of the grid; a cell's place is that of its first point.

    >>> halton_order(2, 2)
    tensor([2, 1, 0, 3])
    """
    places: dict[int, int] = {}
    number = 0
    while len(places) < height * width:
        number += 1
        cell = int(_radical_inverse(number, 2) * height) * width + int(_radical_inverse(number, 3) * width)
        places.setdefault(cell, len(places))
    return torch.tensor([places[cell] for cell in range(height * width)])


def _radical_inverse(number: int, base: int) -> float:
    """The digits of a number behind the point, the last one first."""
    numerator, denominator = 0, 1
    while number:
        number, digit = divmod(number, base)
        numerator, denominator = numerator * base + digit, denominator * base
    return numerator / denominator


@torch.no_grad()
def generate_tokens(
    network: CorruptedTokenGenerator,
    *,
    reveal: Reveal,
    rule: TokenRule,
    labels: Tensor | None = None,
    num_samples: int | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
    generator: RandomSource = None,
) -> Tensor:
    """Indices of new images.

    Args:
        network: on the device where it is to run; its mode is left as it was.
        reveal: in which order tokens are drawn.
        rule: guidance, temperature and filters of the log-probabilities of a token.
        labels: integers ``[B]``, from 0 to ``num_classes``, which is the null class.
        num_samples: B, needed where there are no labels; all are then of the null class.
        known: tokens that are given, integers ``[B, h, w, G]``; where the mask is false they may be anything.
        mask: booleans ``[B, h, w, G]`` or ``[B, h, w]``, true where ``known`` is kept.
        dtype: type that the network is autocast to, such as ``torch.bfloat16``.
        generator: of the draws, or one for each sample; the global one when absent.

    Returns:
        int64 ``[B, h, w, G]``.

    Raises:
        VaevqMedError: an argument is out of its range or does not fit the others, or guidance has no labels.
    """
    if labels is None and rule.guided:
        raise VaevqMedError(f"guidance_scale is {rule.guidance_scale} without labels; expected labels, or 1")
    batch = batch_size(labels, num_samples)
    check_sources(generator, batch)
    classes, kept = network.both_classes(labels, batch, guided=rule.guided), network.kept(known, mask, batch)

    def predicted(tokens: Tensor, time: int) -> Tensor:
        inputs = torch.cat([tokens, tokens]) if rule.guided else tokens
        times = torch.full((len(inputs),), time, device=tokens.device)
        return rule.filtered(network(inputs, classes, times)).log_softmax(dim=-1)

    # Outermost, so that autocast keeps the weights that it casts until the last step.
    with evaluating(network), torch.autocast(classes.device.type, dtype=dtype, enabled=dtype is not None):
        draw = _ancestral if reveal.order == "ancestral" else _revealed
        shape = (batch, network.sequence_length)
        if kept is None:
            nothing = torch.zeros(shape, dtype=torch.int64, device=classes.device)
            kept = nothing.bool(), nothing
        tokens = draw(network, reveal, predicted, kept, generator)
    return tokens.view(batch, *network.grid_size, network.num_codebooks)


def _ancestral(
    network: CorruptedTokenGenerator,
    reveal: Reveal,
    predicted: Callable[[Tensor, int], Tensor],
    kept: Kept,
    generator: RandomSource,
) -> Tensor:
    """Tokens ``[B, N]`` by the steps back of the process."""
    corruption, (mask, values) = network.corruption, kept
    like = torch.zeros((), device=values.device)

    def corrupted_known(time: int) -> Tensor:
        # Where tokens are only masked, those that are known may be seen from the first step on.
        time = time if corruption.replaces else 0
        moments = torch.full((values.numel(),), time, device=values.device)
        return corruption.log_marginal(values.flatten(), moments, like).view(*values.shape, -1)

    times = reveal.times
    origin = torch.zeros_like(values).flatten()
    end = corruption.log_marginal(origin, torch.full_like(origin, times[0]), like).view(*values.shape, -1)
    tokens = draw_indices(torch.where(mask[..., None], corrupted_known(times[0]), end), generator)
    for time, earlier in itertools.pairwise(times):
        log_origin = predicted(tokens, time)
        moments = torch.full((values.numel(),), time, device=values.device)
        words, still = corruption.log_back(
            log_origin.flatten(0, 1), tokens.flatten(), moments, torch.full_like(moments, earlier)
        )
        back = torch.cat([words, still[:, None]], dim=1).view(*values.shape, -1)
        tokens = draw_indices(torch.where(mask[..., None], corrupted_known(earlier), back), generator)
    return tokens


def _revealed(
    network: CorruptedTokenGenerator,
    reveal: Reveal,
    predicted: Callable[[Tensor, int], Tensor],
    kept: Kept,
    generator: RandomSource,
) -> Tensor:
    """Tokens ``[B, N]``, of which each step reveals some for good."""
    corruption, (mask, values) = network.corruption, kept
    tokens = torch.where(mask, values, corruption.mask)
    unknown = left = (~mask).sum(dim=1)
    places = halton_order(*network.grid_size).to(values.device)
    books = torch.arange(network.num_codebooks, device=values.device)
    ranks = (places[:, None] * network.num_codebooks + books).flatten().double()
    for step in range(1, reveal.steps + 1):
        log_origin = predicted(tokens, corruption.num_steps)
        is_mask = tokens == corruption.mask
        purity = log_origin.amax(dim=-1)
        if reveal.order == "purity":
            largest = purity.masked_fill(~is_mask, -math.inf).amax(dim=1, keepdim=True)
            sharp = 1 + reveal.purity_weight * (purity - largest).exp().clamp_max(1.0)
            log_origin = (sharp[..., None] * log_origin).log_softmax(dim=-1)
        drawn = draw_indices(log_origin, generator)
        if reveal.order == "halton":
            score = -ranks.expand_as(tokens)
        else:
            gumbel = -fill_waits(torch.empty_like(purity), generator).log()
            if reveal.order == "confidence":
                picked = log_origin.gather(-1, drawn[..., None])[..., 0]
                score = picked + reveal.choice_temperature * (1 - step / reveal.steps) * gumbel
            else:
                score = purity + gumbel
        left = reveal.left(step, unknown, left)
        ascending = score.masked_fill(~is_mask, math.inf).argsort(dim=1, stable=True).argsort(dim=1, stable=True)
        tokens = torch.where(is_mask & (ascending >= left[:, None]), drawn, tokens)
    return tokens


def revealing(corruption: Corruption, settings: Mapping[str, Any]) -> Reveal:
    """The order and the steps that the settings of a generator ask for.

    Args:
        corruption: that the network undoes.
        settings: those of :class:`Reveal` among others, by name.

    Raises:
        VaevqMedError: see :class:`Reveal`.
    """
    return Reveal(corruption, **{name: settings[name] for name in _OF_REVEAL})


def unmasking_draws(network: CorruptedTokenGenerator, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> Draw:
    """What draws indices and decodes them.

    Args:
        network: in evaluation mode.
        tokenizer: on the same device.
        settings: of :class:`Reveal` and :class:`TokenRule`, by name.

    Raises:
        VaevqMedError: see :class:`Reveal`.
    """
    reveal = revealing(network.corruption, settings)
    rule = TokenRule(**{name: value for name, value in settings.items() if name not in _OF_REVEAL})
    device = network.token_embedding.weight.device

    def draw(wanted: Wanted) -> Tensor:
        indices = generate_tokens(
            network,
            reveal=reveal,
            rule=rule,
            labels=wanted.labels,
            num_samples=len(wanted.seeds),
            known=wanted.known,
            mask=wanted.mask,
            dtype=wanted.dtype,
            generator=[torch.Generator(device).manual_seed(seed) for seed in wanted.seeds],
        )
        return tokenizer.decode_indices(indices)

    return draw
