"""Discrete diffusion over a tokenizer's indices: one bidirectional transformer under three processes.

VQ-Diffusion (arXiv 2111.14822, improved in 2205.16007) masks and replaces, VQ-DDM (2112.01799) replaces by any
codeword, and absorbing diffusion (2107.03006, 2111.12701) masks; MaskGIT (2202.04200) is the last with a loss and an
order of drawing of its own. :mod:`vaevq_med.networks.generators.corruption` has the processes, and
:mod:`vaevq_med.networks.generators.unmasking` what is drawn by. Whatever is trained, validation gives the bound of the
process on ``-log p(x_0)``, so that one figure compares all of them with the likelihood of LlamaGen.

The blocks are LlamaGen's, and a token attends to all. The sequence is a class token and the tokens, G a position, each
with a table and a head of its own. The class token is not turned, where LlamaGen's vanishes from the attention. Where
tokens are replaced, the time and the class modulate the blocks; where they are only masked, the posterior does not
depend on the time.

The network gives ``f`` in ``p(x_0 | x_t) ~ exp(f) q(x_t | x_0)``: VQ-DDM's residual on the logits of ``x_t`` in a form
in which an untrained network gives every ``x_0`` the same probability and the bound is ``log K``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.options import is_int, is_number
from vaevq_med.networks.base import Tokenizer
from vaevq_med.networks.generators.base import Draw, Setting
from vaevq_med.networks.generators.corruption import Corruption
from vaevq_med.networks.generators.llama_blocks import axial_rotations
from vaevq_med.networks.generators.token_generator import TOKEN_SETTINGS
from vaevq_med.networks.generators.trunk import LOGITS_AT_ONCE, TimeEmbedding, check_trunk, make_blocks, pair, start
from vaevq_med.networks.generators.unmasking import AUTO, ORDERS, CorruptedTokenGenerator, revealing, unmasking_draws
from vaevq_med.networks.ranges import check_choice, check_sizes

OBJECTIVES = ("bound", "reweighted", "masked")

Cost = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""What rows cost, ``[R]``, of logits ``[R, K]``, ``x_0``, ``x_t`` and t."""


class TokenDiffusion(CorruptedTokenGenerator):
    """A transformer that predicts tokens from a corrupted image of them.

    Args:
        num_embeddings: K, codewords of each codebook.
        grid_size: latent positions ``(h, w)``, or one number for a square.
        width: channels of a token.
        depth: blocks.
        num_heads: attention heads; ``width / num_heads`` is a multiple of 4.
        num_classes: labels are below it, and it is the null class; 0 for none.
        num_codebooks: G, indices a position.
        process: ``absorbing``, ``mask_replace`` or ``uniform``.
        num_steps: T, times of the process.
        objective: what is minimized. ``bound``: the variational bound, with :attr:`auxiliary_weight`. ``reweighted``:
            the masked cross-entropies times ``1 - t / T`` in place of ``1 / t`` (arXiv 2111.12701). ``masked``: their
            mean over the masked tokens of the batch, of which there are ``cos(pi u / 2)`` of an image, u uniform
            (MaskGIT). The last two are for the process ``absorbing``.
        auxiliary_weight: of ``-log p(x_0 | x_t)``, times ``2 - t / T``, beside the bound; 5e-4 in VQ-Diffusion. The
            other objectives do not read it.
        label_smoothing: of ``masked``; 0.1 in MaskGIT. The other objectives do not read it.
        token_dropout: share of the channels of embedded tokens dropped in training.
        attention_dropout: of the attention weights.
        residual_dropout: of each attention's output.
        ffn_dropout: of each perceptron's output.
        label_dropout: share of the labels that give way to the null class in training, for guidance.

    Raises:
        VaevqMedError: a number is out of its range, or arguments do not fit together.

    Example:
        >>> network = TokenDiffusion(num_embeddings=8, grid_size=2, width=8, depth=1, num_heads=2)
        >>> round(network(torch.full((1, 4), 8)).exp()[0, 0, 0].item(), 4)  # all of them are masks
        0.125
    """

    likelihood = "bound"
    settings = MappingProxyType(
        {
            **TOKEN_SETTINGS,
            "num_steps": Setting(
                None,
                lambda value: value is None or is_int(value, 1, sys.maxsize),
                "a whole number from 1; null takes 12, and 100 for the order 'ancestral'",
            ),
            "order": Setting(AUTO, lambda value: value in (AUTO, *ORDERS), f"{', '.join((AUTO, *ORDERS))}"),
            "choice_temperature": Setting(4.5, lambda value: is_number(value, 0, 1e4), "a number from 0 to 10000"),
            "purity_weight": Setting(1.0, lambda value: is_number(value, 0, 1e4), "a number from 0 to 10000"),
        }
    )

    def __init__(
        self,
        *,
        num_embeddings: int,
        grid_size: int | tuple[int, int],
        width: int,
        depth: int,
        num_heads: int,
        num_classes: int = 0,
        num_codebooks: int = 1,
        process: str = "absorbing",
        num_steps: int = 256,
        objective: str = "bound",
        auxiliary_weight: float = 0.0,
        label_smoothing: float = 0.0,
        token_dropout: float = 0.1,
        attention_dropout: float = 0.0,
        residual_dropout: float = 0.1,
        ffn_dropout: float = 0.1,
        label_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.grid_size = pair(grid_size)
        check_sizes(num_embeddings=num_embeddings, num_codebooks=num_codebooks, grid_size=min(self.grid_size))
        dropouts = {
            "attention_dropout": attention_dropout,
            "residual_dropout": residual_dropout,
            "ffn_dropout": ffn_dropout,
        }
        shares = {"token_dropout": token_dropout, **dropouts, "label_dropout": label_dropout}
        shares["label_smoothing"] = label_smoothing
        check_trunk(width=width, depth=depth, num_heads=num_heads, num_classes=num_classes, shares=shares)
        check_choice("objective", objective, OBJECTIVES)
        self.corruption = Corruption(process, num_embeddings=num_embeddings, num_steps=num_steps)
        if objective != "bound" and self.corruption.replaces:
            raise VaevqMedError(
                f"objective is {objective!r} with the process {process!r}; expected 'bound', as {objective!r} is for "
                "'absorbing'"
            )
        if not 0 <= auxiliary_weight < math.inf:
            raise VaevqMedError(f"auxiliary_weight is {auxiliary_weight}; expected 0 or more")
        if auxiliary_weight and objective != "bound":
            raise _unread("auxiliary_weight", auxiliary_weight, objective, "bound")
        if label_smoothing and objective != "masked":
            raise _unread("label_smoothing", label_smoothing, objective, "masked")
        self.num_embeddings = num_embeddings
        self.num_codebooks = num_codebooks
        self.num_classes = num_classes
        self.objective = objective
        self.auxiliary_weight = auxiliary_weight
        self.label_smoothing = label_smoothing
        self.label_dropout = label_dropout
        self.head_dim = width // num_heads
        self.class_embedding = nn.Embedding(num_classes + 1, width)
        self.token_embedding = nn.Embedding(num_codebooks * (num_embeddings + 1), width)
        self.time_embedding = TimeEmbedding(width) if self.corruption.replaces else None
        self.token_dropout = nn.Dropout(token_dropout)
        self.blocks = make_blocks(
            width=width,
            depth=depth,
            num_heads=num_heads,
            dropouts=dropouts,
            causal=False,
            modulated=self.corruption.replaces,
        )
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.heads = nn.ModuleList(nn.Linear(width, num_embeddings, bias=False) for _ in range(num_codebooks))
        modulations = [cast(nn.Module, block.modulation) for block in self.blocks if self.corruption.replaces]
        start(self, zero=[*self.heads, *modulations])

    def draws(
        self,
        tokenizer: Tokenizer,
        *,
        grid: tuple[int, ...],
        settings: Mapping[str, Any],
        trained_with: Callable[[str], Any],
    ) -> Draw:
        """Draws many tokens at a time.

        Raises:
            VaevqMedError: the order is not one of the process, or there are more steps than times.
        """
        return unmasking_draws(self, tokenizer, settings)

    def network_calls(self, *, grid: tuple[int, ...], settings: Mapping[str, Any]) -> int:
        """One a step."""
        return revealing(self.corruption, settings).steps

    def features(self, tokens: Tensor, labels: Tensor | None, times: Tensor) -> Tensor:
        """What the heads are given, ``[B, h w G, width]``.

        Args:
            tokens: of which some are corrupted, ``[B, h w G]``; K is the mask.
            labels: ``[B]``, or None for the null class.
            times: ``[B]``, from 1 to T.
        """
        classes = self.class_embedding(self.check_labels(labels, len(tokens)))
        tables = torch.arange(tokens.shape[1], device=tokens.device) % self.num_codebooks * (self.num_embeddings + 1)
        x = torch.cat([classes.unsqueeze(1), self.token_embedding(tokens + tables)], dim=1)
        x = self.token_dropout(x)
        rotations = axial_rotations(
            *self.grid_size, self.head_dim, num_codebooks=self.num_codebooks, device=tokens.device
        )
        rotations[0, :, 0] = 1.0  # the class token is not turned
        condition = None
        if self.time_embedding is not None:
            condition = classes + self.time_embedding(times / self.corruption.num_steps)
        for block in self.blocks:
            x = block(x, rotations, condition=condition)
        return self.norm(x[:, 1:])

    def forward(self, tokens: Tensor, labels: Tensor | None = None, times: Tensor | None = None) -> Tensor:
        """``log p(x_0 | x_t)`` in fp32.

        Args:
            tokens: ``x_t``, ``[B, h w G]`` from 0 to K, the mask.
            labels: ``[B]``, from 0 to ``num_classes``; the null class when absent.
            times: ``[B]``, from 1 to T; T when absent, which is the same in the process ``absorbing``.

        Returns:
            ``[B, h w G, K]``.
        """
        if times is None:
            times = torch.full((len(tokens),), self.corruption.num_steps, device=tokens.device)
        hidden = self.features(tokens, labels, times)
        parts = [head(hidden[:, g :: self.num_codebooks]) for g, head in enumerate(self.heads)]
        logits = torch.stack(parts, dim=2).flatten(1, 2)
        rows = times[:, None].expand_as(tokens).flatten()
        found = _log_origin(self.corruption, logits.flatten(0, 1).float(), tokens.flatten(), rows)
        return found.view_as(logits)

    def loss(
        self, indices: Tensor, labels: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """What is minimized, see ``objective``, in nats a token; arguments and errors as for :meth:`bound`."""
        tokens, labels = self.whole_grids(indices), self.dropped(labels, generator)
        corruption = self.corruption
        if self.objective == "masked":
            hides = _hidden_at_random(tokens, generator)
            corrupted = torch.where(hides, corruption.mask, tokens)
            weights = hides / hides.sum()
            times = torch.full((len(tokens),), corruption.num_steps, device=tokens.device)

            def smoothed(logits: Tensor, origin: Tensor, rows: Tensor, moments: Tensor) -> Tensor:
                return F.cross_entropy(logits, origin, label_smoothing=self.label_smoothing, reduction="none")

            return self._summed(corrupted, tokens, labels, times, weights, smoothed)
        return self._denoising(tokens, labels, generator, self._cost)

    def bound(
        self, indices: Tensor, labels: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """An upper bound of ``-log p(x_0)`` in nats a token, of one draw of time and corruption an image.

        Its mean over the draws is the bound. The times are spread evenly over the batch.

        Args:
            indices: ``[B, h, w, G]``.
            labels: ``[B]``, from 0 to ``num_classes``; the null class when absent.
            generator: of the draws; the global one when absent.

        Raises:
            VaevqMedError: a shape does not fit, or an index or a label is out of range.
        """
        return self._denoising(self.whole_grids(indices), labels, generator, self._term)

    def _denoising(
        self, tokens: Tensor, labels: Tensor | None, generator: torch.Generator | None, cost: Cost
    ) -> Tensor:
        """The mean over the tokens of T times the cost at a random time."""
        total = self.corruption.num_steps
        times = (_spread(tokens, generator) * total).long().clamp_max(total - 1) + 1
        corrupted = self.corruption.corrupt(tokens, times, generator)
        weights = torch.full(tokens.shape, total / tokens.numel(), device=tokens.device)
        return self._summed(corrupted, tokens, labels, times, weights, cost)

    def _term(self, logits: Tensor, origin: Tensor, rows: Tensor, moments: Tensor) -> Tensor:
        """The bound's, of rows."""
        log_origin = _log_origin(self.corruption, logits, rows, moments)
        return self.corruption.divergence(log_origin, origin, rows, moments)

    def _cost(self, logits: Tensor, origin: Tensor, rows: Tensor, moments: Tensor) -> Tensor:
        """In training: the bound's term, weighted anew or with the auxiliary one."""
        total = self.corruption.num_steps
        cost = self._term(logits, origin, rows, moments)
        if self.objective == "reweighted":
            return cost * moments * (1 - moments / total) / total
        if self.auxiliary_weight:
            log_origin = _log_origin(self.corruption, logits, rows, moments)
            picked = log_origin.gather(1, origin[:, None])[:, 0]
            cost = cost - self.auxiliary_weight * (2 - moments / total) * picked
        return cost

    def _summed(
        self,
        corrupted: Tensor,
        tokens: Tensor,
        labels: Tensor | None,
        times: Tensor,
        weights: Tensor,
        cost: Cost,
    ) -> Tensor:
        """The weighted sum of the rows' costs; logits are formed a bounded number at a time, and again going back."""
        hidden = self.features(corrupted, labels, times)
        moments = times[:, None].expand_as(tokens)
        step = max(1, LOGITS_AT_ONCE // self.num_embeddings)
        total = torch.zeros((), device=hidden.device)
        for g, head in enumerate(self.heads):
            own = slice(g, None, self.num_codebooks)
            rows = [part[:, own].flatten(0, 1) for part in (hidden, tokens, corrupted, moments, weights)]
            for part in zip(*(row.split(step) for row in rows), strict=True):
                total = total + cast(
                    Tensor,
                    checkpoint(_weighted, cost, head, *part, use_reentrant=False, preserve_rng_state=False),
                )
        return total


def _unread(name: str, value: float, objective: str, reader: str) -> VaevqMedError:
    return VaevqMedError(
        f"{name} is {value} with the objective {objective!r}; expected 0, as {reader!r} alone reads it"
    )


def _weighted(
    cost: Cost,
    head: nn.Module,
    hidden: Tensor,
    origin: Tensor,
    rows: Tensor,
    moments: Tensor,
    weights: Tensor,
) -> Tensor:
    return (cost(head(hidden).float(), origin, rows, moments) * weights).sum()


def _log_origin(corruption: Corruption, logits: Tensor, rows: Tensor, moments: Tensor) -> Tensor:
    """``log p(x_0 | x_t)``, ``[R, K]``, of what the network adds to the evidence of ``x_t``."""
    return (logits + corruption.log_evidence(rows, moments, logits)).log_softmax(dim=1)


def _spread(tokens: Tensor, generator: torch.Generator | None) -> Tensor:
    """A number in [0, 1) for each image, ``[B]``: one in each B-th part of it, in random order."""
    device, count = tokens.device if generator is None else generator.device, len(tokens)
    part = torch.randperm(count, generator=generator, device=device)
    within = torch.rand(count, generator=generator, device=device, dtype=torch.float64)
    return ((part + within) / count).to(tokens.device)


def _hidden_at_random(tokens: Tensor, generator: torch.Generator | None) -> Tensor:
    """Which tokens are masked, ``[B, N]``: of each image a share ``cos(pi u / 2)``, but at least one."""
    counts = (tokens.shape[1] * (_spread(tokens, generator) * math.pi / 2).cos()).floor().clamp_min(1)
    device = tokens.device if generator is None else generator.device
    places = torch.rand(tokens.shape, generator=generator, device=device).argsort(dim=1).argsort(dim=1)
    return places.to(tokens.device) < counts[:, None]
