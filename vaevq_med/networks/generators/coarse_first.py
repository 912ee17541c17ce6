"""Structure before detail: the first index of every position, then the others, of those positions alone that have any.

Two-level quantizers give a cell one code that says what it is like and n more that say the rest, and a gate leaves the
n out (``quantizers/two_level.py``). Hierarchical VQ-VAE inpainting (DSI, arXiv 2103.10022) draws all of the structure
before any of the texture, and DQ-VAE's transformer (arXiv 2305.11718) all coarse codes before the fine ones of a
sequence that is as long as the image needs. Here one transformer does both: after the class token come h w first
indices in raster order, each with one bit, whether the position is open, and then the other G - 1 indices of each open
position. An image with r of its positions open has ``h w (1 + (G - 1) r)`` tokens in place of ``h w G``.

What a quantizer with a gate calls absent is the last index. So a position is closed whose other indices are all the
last, whatever the quantizer: that loses nothing, and without a gate hardly any position is. An open one with nothing
but last indices is ruled out, so that the likelihood is that of the indices, exactly.

A token does not say where the next one belongs, as it does in raster order. What is fed at a place is therefore the
last token, turned by where it stands, and a learned vector of the place that is to be predicted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.base import Tokenizer
from vaevq_med.networks.generators.base import Draw, Wanted
from vaevq_med.networks.generators.drawing import RandomSource, TokenRule, draw_indices, evaluating
from vaevq_med.networks.generators.llama_blocks import KeyValueCache, axial_rotations
from vaevq_med.networks.generators.token_generator import TOKEN_SETTINGS, Kept, TokenGenerator
from vaevq_med.networks.generators.trunk import check_trunk, make_blocks, pair, start, summed_cross_entropy
from vaevq_med.networks.ranges import check_sizes

# What cross-entropy leaves out.
_NONE = -100


class CoarseFirst(TokenGenerator):
    """An autoregressive transformer over first indices, and over the others of the positions that are open.

    Args:
        num_embeddings: K, indices of each codebook, the last of which says "absent" under a gate.
        grid_size: latent positions ``(h, w)``, or one number for a square.
        width: channels of a token.
        depth: blocks.
        num_heads: attention heads; ``width / num_heads`` is a multiple of 4.
        num_classes: labels are below it, and it is the null class; 0 for none.
        num_codebooks: G, indices a position, 2 or more.
        token_dropout: as for :class:`LlamaGen`.
        attention_dropout: likewise.
        residual_dropout: likewise.
        ffn_dropout: likewise.
        label_dropout: likewise.

    Attributes:
        mean_open: share of the training images' positions that are open, measured before training.

    Raises:
        VaevqMedError: a number is out of its range, or sizes do not fit together.

    Example:
        >>> network = CoarseFirst(num_embeddings=8, grid_size=2, width=8, depth=1, num_heads=2, num_codebooks=5)
        >>> closed = torch.tensor([3, 7, 7, 7, 7]).expand(1, 2, 2, 5)
        >>> round(4 * 5 * network.loss(closed).item(), 3)  # 4 tokens of 2 x 8 words, nothing learned
        11.09
    """

    settings = TOKEN_SETTINGS
    mean_open: Tensor

    def __init__(
        self,
        *,
        num_embeddings: int,
        grid_size: int | tuple[int, int],
        width: int,
        depth: int,
        num_heads: int,
        num_classes: int = 0,
        num_codebooks: int = 2,
        token_dropout: float = 0.1,
        attention_dropout: float = 0.0,
        residual_dropout: float = 0.1,
        ffn_dropout: float = 0.1,
        label_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.grid_size = pair(grid_size)
        check_sizes(num_embeddings=num_embeddings, num_codebooks=num_codebooks, grid_size=min(self.grid_size))
        if num_codebooks < 2:
            raise VaevqMedError(
                f"num_codebooks is {num_codebooks}; expected 2 or more, of which the first is drawn first, or LlamaGen"
            )
        dropouts = {
            "attention_dropout": attention_dropout,
            "residual_dropout": residual_dropout,
            "ffn_dropout": ffn_dropout,
        }
        shares = {"token_dropout": token_dropout, **dropouts, "label_dropout": label_dropout}
        check_trunk(width=width, depth=depth, num_heads=num_heads, num_classes=num_classes, shares=shares)
        self.num_embeddings, self.num_codebooks, self.num_classes = num_embeddings, num_codebooks, num_classes
        self.num_heads, self.head_dim, self.label_dropout = num_heads, width // num_heads, label_dropout
        self.num_positions = self.grid_size[0] * self.grid_size[1]
        self.class_embedding = nn.Embedding(num_classes + 1, width)
        # Words of first indices, closed ones before open ones, and then a table for each of the other codebooks.
        self.token_embedding = nn.Embedding((1 + num_codebooks) * num_embeddings, width)
        self.place_embedding = nn.Embedding(self.sequence_length, width)
        self.token_dropout = nn.Dropout(token_dropout)
        self.blocks = make_blocks(width=width, depth=depth, num_heads=num_heads, dropouts=dropouts)
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.first_head = nn.Linear(width, 2 * num_embeddings, bias=False)
        self.other_heads = nn.ModuleList(nn.Linear(width, num_embeddings, bias=False) for _ in range(num_codebooks - 1))
        self.register_buffer("mean_open", torch.tensor(1.0))
        start(self, zero=[self.first_head, self.other_heads])

    @property
    def last(self) -> int:
        """The index that stands for a code that is absent."""
        return self.num_embeddings - 1

    def prepare(self, values: Callable[[], Tensor]) -> None:
        """Measure which share of the positions is open."""
        self.mean_open.fill_(self.opened(self.whole_grids(values())).double().mean())

    def network_calls(self, *, grid: tuple[int, ...], settings: Mapping[str, Any]) -> int:
        """One a token, of an image with the mean share of open positions; a batch takes those of its longest."""
        others = self.num_positions * (self.num_codebooks - 1)
        return self.num_positions + round(others * float(self.mean_open))

    def opened(self, tokens: Tensor) -> Tensor:
        """Which positions of tokens ``[B, h w G]`` are open, bool ``[B, h w]``."""
        return (tokens.unflatten(1, (-1, self.num_codebooks))[..., 1:] != self.last).any(dim=-1)

    def loss(
        self, indices: Tensor, labels: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """``-log p`` of all indices in nats a token, exactly, each from those before it (teacher forcing).

        The mean is over all ``h w G`` indices, also those that closed positions leave out, so that it compares with
        LlamaGen's over the same indices.

        Args:
            indices: ``[B, h, w, G]``.
            labels: ``[B]``, from 0 to ``num_classes``; the null class when absent.
            generator: of the label dropout's draws; the global one when absent.

        Raises:
            VaevqMedError: a shape does not fit, or an index or a label is out of range.
        """
        tokens = self.whole_grids(indices).to(self.token_embedding.weight.device)
        classes = self.check_labels(self.dropped(labels, generator), len(tokens))
        opened = self.opened(tokens)
        positions, there = open_positions(opened)
        grouped = tokens.unflatten(1, (-1, self.num_codebooks))  # [B, h w, G]
        words = grouped[..., 0] + self.num_embeddings * opened  # [B, h w]
        others = grouped[..., 1:].gather(1, positions.unsqueeze(-1).expand(-1, -1, self.num_codebooks - 1))
        hidden = self._hidden(words, others, positions, classes)
        others = others.flatten(0, 1)  # [B C, G - 1]
        wanted = others.masked_fill(~there.flatten().unsqueeze(1), _NONE)
        total = summed_cross_entropy(hidden[:, : self.num_positions].flatten(0, 1), self.first_head, words.flatten())
        for number, head in enumerate(self.other_heads):
            rows = hidden[:, self.num_positions + number :: self.num_codebooks - 1].flatten(0, 1)  # [B C, width]
            impossible = self._impossible(others, number)
            total = total + summed_cross_entropy(rows, head, wanted[:, number], impossible=impossible)
        return total / tokens.numel()

    def _impossible(self, others: Tensor, number: int, known: Tensor | None = None) -> Tensor:
        """Where an index of open positions cannot be the last, bool ``[N]``: all others are, as far as they are told.

        Args:
            others: indices ``[N, G - 1]``.
            number: of the index, from 0; those before it are told.
            known: bool ``[N, G - 1]``, those after it that are told, too; none when absent.
        """
        are_last = others == self.last
        later = slice(number + 1, None)
        are_last[:, later] &= False if known is None else known[:, later]
        are_last[:, number] = True
        return are_last.all(dim=1)

    def _rotations(self, device: torch.device) -> Tensor:
        """Those of the class token and of every token of the grid, ``[1 + h w G, head_dim / 2, 2]``."""
        return axial_rotations(*self.grid_size, self.head_dim, num_codebooks=self.num_codebooks, device=device)

    def _hidden(self, words: Tensor, others: Tensor, positions: Tensor, classes: Tensor) -> Tensor:
        """What the heads are given, ``[B, h w + C (G - 1), width]``.

        Args:
            words: of first indices, ``[B, h w]``.
            others: ``[B, C, G - 1]``, of C positions in turn.
            positions: which, ``[B, C]``.
            classes: ``[B]``.
        """
        batch, codebooks, device = len(words), self.num_codebooks, words.device
        tables = self.num_embeddings * torch.arange(2, codebooks + 1, device=device)
        rows = torch.cat([words, (others + tables).flatten(1)], dim=1)
        firsts = codebooks * torch.arange(self.num_positions, device=device).expand(batch, -1)
        rest = codebooks * positions.unsqueeze(-1) + torch.arange(1, codebooks, device=device)
        places = torch.cat([firsts, rest.flatten(1)], dim=1)  # numbers of tokens of the grid
        x = torch.cat([self.class_embedding(classes).unsqueeze(1), self.token_embedding(rows[:, :-1])], dim=1)
        x = self.token_dropout(x + self.place_embedding(places))
        turned_by = torch.cat([torch.zeros_like(places[:, :1]), 1 + places[:, :-1]], dim=1)
        rotations = self._rotations(device)[turned_by].unsqueeze(1)  # [B, 1, T, head_dim / 2, 2]
        for block in self.blocks:
            x = block(x, rotations)
        return self.norm(x)

    @torch.no_grad()
    def indices(self, wanted: Wanted, rule: TokenRule, generator: RandomSource) -> Tensor:
        """Indices ``[B, h, w, G]``, of which those that are known stay.

        A position of which an index other than the last is known is open. The generator draws for each image as many
        tokens as the longest of the batch has, of which a shorter one leaves the last ones out.
        """
        batch = len(wanted.seeds)
        kept = self.kept(wanted.known, wanted.mask, batch)
        classes = self.both_classes(wanted.labels, batch, guided=rule.guided)
        weight = self.token_embedding.weight
        other_type = wanted.dtype is not None and wanted.dtype != weight.dtype
        network = copy.deepcopy(self).to(wanted.dtype) if other_type else self
        with evaluating(network), torch.autocast(weight.device.type, enabled=False):
            tokens = _Drawing(network, classes, rule, generator).run(kept)
        return tokens.view(batch, *self.grid_size, self.num_codebooks)

    def draws(
        self,
        tokenizer: Tokenizer,
        *,
        grid: tuple[int, ...],
        settings: Mapping[str, Any],
        trained_with: Callable[[str], Any],
    ) -> Draw:
        """Draws first indices, and then the others of open positions."""
        rule, device = TokenRule(**settings), self.token_embedding.weight.device

        def draw(wanted: Wanted) -> Tensor:
            sources = [torch.Generator(device).manual_seed(seed) for seed in wanted.seeds]
            return tokenizer.decode_indices(self.indices(wanted, rule, sources))

        return draw


def open_positions(opened: Tensor) -> tuple[Tensor, Tensor]:
    """The positions ``[B, C]`` that are open, bool ``[B, h w]``, in order, and which of the C are there.

    C is the most that an image of the batch has; what is not there are further positions. The host waits for that
    number, once a batch: it is the length of what follows.

    >>> open_positions(torch.tensor([[False, True, False], [True, False, True]]))[0].tolist()
    [[1, 0], [0, 2]]
    """
    count = int(opened.sum(dim=1).max())
    order = (~opened).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
    return order, opened.gather(1, order)


class _Drawing:
    """Drawing of one batch, token by token, with keys and values kept.

    Args:
        network: in evaluation mode.
        classes: ``[B]``, or ``[2 B]`` with guidance.
        rule: how to draw.
        generator: of the draws.
    """

    def __init__(self, network: CoarseFirst, classes: Tensor, rule: TokenRule, generator: RandomSource) -> None:
        self.network, self.rule, self.generator = network, rule, generator
        self.copies = 2 if rule.guided else 1
        self.batch = len(classes) // self.copies
        self._rotations = network._rotations(classes.device)
        self._cache = KeyValueCache(
            depth=len(network.blocks),
            batch_size=len(classes),
            num_heads=network.num_heads,
            rotations=self._rotations[: network.sequence_length],
            dtype=network.token_embedding.weight.dtype,
        )
        self._last = network.class_embedding(classes)  # [copies B, width]
        self._turned_by = torch.zeros_like(classes)

    def run(self, kept: Kept | None) -> Tensor:
        """Tokens ``[B, h w G]``."""
        network, books, last = self.network, self.network.num_codebooks, self.network.last
        shape = (self.batch, network.num_positions, books)
        tokens = torch.full(shape, last, device=self._turned_by.device)
        opened = torch.zeros_like(tokens[..., 0], dtype=torch.bool)
        given = None if kept is None else (kept[0].view(shape), kept[1].view(shape))
        if given is not None:
            tokens = torch.where(given[0], given[1], tokens)
        for position in range(network.num_positions):
            impossible = None if given is None else self._contradicts(given[0][:, position], given[1][:, position])
            place = torch.full_like(opened[:, 0], books * position, dtype=torch.int64)
            word = self._draw(network.first_head, place, impossible)
            self._follow(word, place)
            tokens[:, position, 0] = word % network.num_embeddings
            opened[:, position] = word >= network.num_embeddings
        positions, there = open_positions(opened)
        rows = torch.arange(self.batch, device=tokens.device)
        for position, present in zip(positions.T, there.T, strict=True):
            for number, head in enumerate(network.other_heads):
                others = tokens[rows, position, 1:]  # [B, G - 1]
                impossible = torch.zeros(self.batch, network.num_embeddings, dtype=torch.bool, device=tokens.device)
                known = None if given is None else given[0][rows, position, 1:]
                impossible[:, -1] = network._impossible(others, number, known)
                place = books * position + 1 + number
                drawn = self._draw(head, place, impossible)
                if known is not None:
                    drawn = torch.where(known[:, number], others[:, number], drawn)
                self._follow(drawn + network.num_embeddings * (2 + number), place)
                tokens[rows, position, 1 + number] = torch.where(present, drawn, last)
        return tokens.flatten(1)

    def _contradicts(self, mask: Tensor, values: Tensor) -> Tensor:
        """Words ``[B, 2 K]`` that are not those of a position's known indices ``[B, G]``, as far as these are known."""
        count = self.network.num_embeddings
        words = torch.arange(2 * count, device=mask.device)
        wrong = mask[:, :1] & (words % count != values[:, :1])
        are_last = values[:, 1:] == self.network.last
        is_open = (mask[:, 1:] & ~are_last).any(dim=1, keepdim=True)
        is_closed = (mask[:, 1:] & are_last).all(dim=1, keepdim=True)
        return wrong | (is_open & (words < count)) | (is_closed & (words >= count))

    def _draw(self, head: nn.Module, place: Tensor, impossible: Tensor | None) -> Tensor:
        """The next token ``[B]``, which belongs to a place ``[B]`` of the grid."""
        network = self.network
        x = (self._last + network.place_embedding(place.repeat(self.copies))).unsqueeze(1)
        rotations = self._rotations[self._turned_by][:, None, None]  # [copies B, 1, 1, head_dim / 2, 2]
        for layer, block in enumerate(network.blocks):
            x = block(x, rotations, self._cache, layer)
        self._cache.length += 1
        logits = head(network.norm(x[:, 0]))
        filtered = self.rule.filtered(logits) if impossible is None else self.rule.possible(logits, impossible)
        return draw_indices(filtered, self.generator)

    def _follow(self, row: Tensor, place: Tensor) -> None:
        """Go on from tokens, rows ``[B]`` of the table, at places ``[B]`` of the grid."""
        self._last = self.network.token_embedding(row.repeat(self.copies))
        self._turned_by = 1 + place.repeat(self.copies)
