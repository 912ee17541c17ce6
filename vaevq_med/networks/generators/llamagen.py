"""LlamaGen (Sun et al., arXiv 2406.06525): a Llama-like transformer that predicts an image's indices in raster order.

The sequence is a class token, then the indices; what comes out at a place is a distribution over the index that
follows. Blocks are normalized first, by RMSNorm (arXiv 1910.07467), have no biases, and use SwiGLU (2002.05202) and
rotary positions (2104.09864): half of a head's channels turn with the row, the other half with the column. As in the
authors' code, the class token is not turned by an angle of zero but multiplied by zero: its query and key vanish, every
token gives it the logit 0, and it conditions the others through its value alone.

Tokenizers with several codebooks (G > 1) are not in the publication. Here the G indices of a position are G tokens of
one sequence of ``h w G``, predicted in turn, each from all before it: a table of embeddings and a head for each
codebook, and the rotation of the position's row and column for all G. The tables tell the codebooks apart.

Of slices of volumes it may see the slice below (``sees_below``), which is not in the publication either: to what is fed
where a position's token is to be predicted, the tokens of the slice below at that position, the next one in the row and
the one in the next row are added, each through a matrix of its own. A learned null token stands for what lies outside
of the grid, and for all of it where there is no slice below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.base import Tokenizer
from vaevq_med.networks.generators.autoregressive import autoregressive_draws
from vaevq_med.networks.generators.base import Draw
from vaevq_med.networks.generators.llama_blocks import KeyValueCache, StaticCache, axial_rotations
from vaevq_med.networks.generators.stepwise import StepwiseGenerator
from vaevq_med.networks.generators.token_generator import TOKEN_SETTINGS
from vaevq_med.networks.generators.trunk import check_trunk, make_blocks, pair, start, summed_cross_entropy
from vaevq_med.networks.ranges import check_range, check_sizes

PRESETS: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "S": {"depth": 12, "num_heads": 6, "width": 384},
        "B": {"depth": 12, "num_heads": 12, "width": 768},
        "L": {"depth": 24, "num_heads": 16, "width": 1024},
        "XL": {"depth": 36, "num_heads": 20, "width": 1280},
        "XXL": {"depth": 48, "num_heads": 24, "width": 1536},
        "3B": {"depth": 24, "num_heads": 32, "width": 3200},
    }
)
"""Published sizes, and S, which is ours: the depth of B at half its width, for a few thousand images."""

BELOW = ((0, 0), (0, 1), (1, 0))
"""Rows and columns further at which a token sees those of the slice below."""


class LlamaGen(StepwiseGenerator):
    """An autoregressive transformer over a tokenizer's indices, conditioned by a class.

    Weights start as N(0, 0.02^2), the heads as zero, so that an untrained network gives every index the same
    probability. The default dropouts are the published ones.

    Args:
        num_embeddings: K, codewords of each codebook.
        grid_size: latent positions ``(h, w)``, or one number for a square.
        width: channels of a token.
        depth: blocks.
        num_heads: attention heads; ``width / num_heads`` is a multiple of 4.
        num_classes: labels are 0 to ``num_classes - 1``; ``num_classes`` itself is the null class, which stands for no
            label, and the only one of a network without classes (0).
        num_codebooks: G, indices a position.
        token_dropout: share of the channels of embedded tokens dropped in training.
        attention_dropout: of the attention weights.
        residual_dropout: of each attention's output.
        ffn_dropout: of each perceptron's output.
        label_dropout: share of the labels that :meth:`loss` replaces by the null class in training, for guidance.
        sees_below: whether it is given the indices of the slice below; drawn from, it has none.

    Raises:
        VaevqMedError: a number is out of its range, or sizes do not fit together.

    Example:
        >>> network = LlamaGen(num_embeddings=8, grid_size=2, width=8, depth=1, num_heads=2, num_classes=3)
        >>> network(torch.zeros(1, 4, dtype=torch.int64), torch.tensor([2])).shape
        torch.Size([1, 4, 8])
    """

    presets: ClassVar[tuple[str, ...]] = ("preset",)
    settings = TOKEN_SETTINGS

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
        token_dropout: float = 0.1,
        attention_dropout: float = 0.0,
        residual_dropout: float = 0.1,
        ffn_dropout: float = 0.1,
        label_dropout: float = 0.1,
        sees_below: bool = False,
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
        check_trunk(width=width, depth=depth, num_heads=num_heads, num_classes=num_classes, shares=shares)
        self.num_embeddings = num_embeddings
        self.num_codebooks = num_codebooks
        self.num_classes = num_classes
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.label_dropout = label_dropout
        self.class_embedding = nn.Embedding(num_classes + 1, width)
        self.token_embedding = nn.Embedding(num_codebooks * num_embeddings, width)
        self.sees_below = sees_below
        if sees_below:
            self.below_embedding = nn.Embedding(num_codebooks * (num_embeddings + 1), width)
            self.below_mixing = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in BELOW)
        self.token_dropout = nn.Dropout(token_dropout)
        self.blocks = make_blocks(width=width, depth=depth, num_heads=num_heads, dropouts=dropouts)
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.heads = nn.ModuleList(nn.Linear(width, num_embeddings, bias=False) for _ in range(num_codebooks))
        start(self, zero=self.heads)

    @classmethod
    def preset(cls, name: str, **options: Any) -> Self:
        """A network of a size in :data:`PRESETS`; ``options`` are the constructor's other arguments.

        Width, depth and heads may stand among them as the preset has them, or as None.

        With K = 16,384, 1000 classes and one codebook the parameters are, in millions: S 34.2, B 110.9, L 342.9,
        XL 774.7, XXL 1411.0, 3B 3096.7.

        Raises:
            VaevqMedError: there is no such size, or another width, depth or number of heads beside it.
        """
        if name not in PRESETS:
            raise VaevqMedError(f"no LlamaGen preset {name!r}; expected one of {', '.join(PRESETS)}")
        for key, value in PRESETS[name].items():
            if options.get(key) not in (None, value):
                raise VaevqMedError(
                    f"LlamaGen preset {name!r}: found {key} {options[key]} beside the name, expected {value} or null"
                )
        return cls(**{**options, **PRESETS[name]})

    def sizes(self, tokens: Mapping[str, Any], where: str) -> dict[str, tuple[Any, Any]]:
        """See the base class. Where it sees the slice below, a volume's grid is taken layer by layer."""
        if self.sees_below and len(tokens["grid"]) == 3:
            tokens = {**tokens, "grid": list(tokens["grid"])[1:]}
        return super().sizes(tokens, where)

    def draws(
        self,
        tokenizer: Tokenizer,
        *,
        grid: tuple[int, ...],
        settings: Mapping[str, Any],
        trained_with: Callable[[str], Any],
    ) -> Draw:
        """Draws token by token, of a network that sees the slice below as where there is none.

        Raises:
            VaevqMedError: the tokens are a volume's, of which it predicts layers and draws nothing.
        """
        if len(grid) != 2:
            raise VaevqMedError(
                f"found a LlamaGen of the layers of a grid {'x'.join(map(str, grid))}, expected one of images: it "
                "serves the codec and draws no volume"
            )
        return autoregressive_draws(self, tokenizer, settings)

    def network_calls(self, *, grid: tuple[int, ...], settings: Mapping[str, Any]) -> int:
        """One an index: the first takes the label."""
        return self.sequence_length

    def rotations(self, device: torch.device) -> Tensor:
        """:func:`axial_rotations` of the sequence, ``[h w G, head_dim / 2, 2]``; fp32 whatever the weights' type."""
        table = axial_rotations(*self.grid_size, self.head_dim, num_codebooks=self.num_codebooks, device=device)
        return table[: self.sequence_length]

    def new_cache(self, batch_size: int) -> KeyValueCache:
        """See the base class."""
        return KeyValueCache(**self._cache_options(batch_size))

    def new_static_cache(self, batch_size: int) -> StaticCache:
        """See the base class."""
        return StaticCache(**self._cache_options(batch_size))

    def _cache_options(self, batch_size: int) -> dict[str, Any]:
        weight = self.token_embedding.weight
        return {
            "depth": len(self.blocks),
            "batch_size": batch_size,
            "num_heads": self.num_heads,
            "rotations": self.rotations(weight.device),
            "dtype": weight.dtype,
        }

    def forward(self, indices: Tensor, labels: Tensor | None = None, below: Tensor | None = None) -> Tensor:
        """Logits of every index, each from the label and the indices before it, and from the slice below.

        Args:
            indices: integers ``[B, n]`` with one codebook, ``[B, n, G]``, or the grid ``[B, h, w, G]``; ``n`` is at
                most ``h w``. The last one is predicted but not looked at.
            labels: integers ``[B]``, from 0 to ``num_classes``; the null class when absent.
            below: see :meth:`below_condition`.

        Returns:
            The indices' shape with K at its end.

        Raises:
            VaevqMedError: a shape does not fit, or an index or a label is out of range.
        """
        hidden = self.features(indices, labels, below)
        parts = [head(hidden[:, g :: self.num_codebooks]) for g, head in enumerate(self.heads)]
        logits = parts[0] if len(parts) == 1 else torch.stack(parts, dim=2)
        return logits.reshape(*indices.shape, self.num_embeddings)

    def below_condition(self, below: Tensor | None, batch_size: int) -> Tensor:
        """What is added to the inputs by the slice below, ``[B, h w G, width]``.

        Args:
            below: indices ``[B, h, w, G]`` of the slice below, -1 for none; None where no slice has one.
            batch_size: B.

        Raises:
            VaevqMedError: the network does not see it, its shape is another, or an index is out of range.
        """
        shape = (batch_size, *self.grid_size, self.num_codebooks)
        if not self.sees_below:
            raise VaevqMedError("found the indices of a slice below, expected none, as sees_below is false")
        device, none = self.below_embedding.weight.device, self.num_embeddings
        if below is None:
            below = torch.full(shape, -1, device=device)
        if below.shape != shape:
            raise VaevqMedError(f"the slice below has shape {tuple(below.shape)}; expected {list(shape)}")
        check_range("indices of the slice below", below + 1, none)
        rows = torch.where(below < 0, none, below).to(device)
        # A row and a column of the null token beyond the grid.
        rows = F.pad(rows, (0, 0, 0, 1, 0, 1), value=none)
        tables = torch.arange(self.num_codebooks, device=device) * (none + 1)
        seen = self.below_embedding(rows + tables).sum(dim=3)  # [B, h + 1, w + 1, width]
        height, width = self.grid_size
        mixed = [
            matrix(seen[:, row : row + height, column : column + width])
            for matrix, (row, column) in zip(self.below_mixing, BELOW, strict=True)
        ]
        return torch.stack(mixed).sum(dim=0).flatten(1, 2).repeat_interleave(self.num_codebooks, dim=1)

    def _alone(self, x: Tensor) -> Tensor:
        """The inputs ``[B, 1, width]`` of a place of a slice with none below it."""
        if not self.sees_below:
            return x
        null = self.below_embedding.weight.unflatten(0, (self.num_codebooks, -1))[:, -1].sum(dim=0)
        return x + torch.stack([matrix(null) for matrix in self.below_mixing]).sum(dim=0)

    def features(self, indices: Tensor, labels: Tensor | None = None, below: Tensor | None = None) -> Tensor:
        """What the heads are given, ``[B, n G, width]``; arguments and errors as for calling the network."""
        tokens = self._tokens(indices)
        labels = self.check_labels(labels, len(tokens))
        count = tokens.shape[1]
        codebook = torch.arange(count - 1, device=tokens.device) % self.num_codebooks
        embedded = self.token_embedding(tokens[:, :-1] + codebook * self.num_embeddings)
        x = torch.cat([self.class_embedding(labels).unsqueeze(1), embedded], dim=1)
        if self.sees_below or below is not None:
            x = x + self.below_condition(below, len(tokens))[:, :count]
        x = self.token_dropout(x)
        rotations = self.rotations(x.device)[:count]
        for block in self.blocks:
            x = block(x, rotations)
        return self.norm(x)

    def loss(
        self,
        indices: Tensor,
        labels: Tensor | None = None,
        *,
        below: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Mean cross-entropy of all indices with the true ones before them (teacher forcing), in nats a token.

        Logits are formed a bounded number at a time, and again in the backward pass. In training, a share
        ``label_dropout`` of the labels is replaced by the null class.

        Args:
            indices: as for calling the network.
            labels: likewise.
            below: likewise.
            generator: of the label dropout's draws; the global one when absent.

        Raises:
            VaevqMedError: as for calling the network.
        """
        labels = self.dropped(labels, generator)
        hidden = self.features(indices, labels, below)
        tokens = indices.flatten(1).long()
        total = torch.zeros((), device=hidden.device)
        for g, head in enumerate(self.heads):
            own = slice(g, None, self.num_codebooks)
            total = total + summed_cross_entropy(hidden[:, own].flatten(0, 1), head, tokens[:, own].flatten())
        return total / tokens.numel()

    def step(self, inputs: Tensor, cache: KeyValueCache) -> Tensor:
        """See the base class. There is no slice below."""
        place = cache.length
        if place == cache.capacity:
            raise VaevqMedError(f"the cache holds {place} places; expected fewer than the sequence's {cache.capacity}")
        if place == 0:
            x = self.class_embedding(inputs)
        else:
            x = self.token_embedding(inputs + (place - 1) % self.num_codebooks * self.num_embeddings)
        x = self._alone(x.unsqueeze(1))
        rotations = cache.rotations[place : place + 1]
        for layer, block in enumerate(self.blocks):
            x = block(x, rotations, cache, layer)
        cache.length += 1
        return self.heads[place % self.num_codebooks](self.norm(x[:, 0]))

    def static_step(self, inputs: Tensor, cache: StaticCache, *, codebook: int, end: int, first: bool) -> Tensor:
        """See the base class."""
        if first:
            x = self.class_embedding(inputs)
        else:
            x = self.token_embedding(inputs + (codebook - 1) % self.num_codebooks * self.num_embeddings)
        x = self._alone(x.unsqueeze(1))
        turns = cache.open(end)
        for layer, block in enumerate(self.blocks):
            x = block(x, turns, cache, layer)
        return self.heads[codebook](self.norm(x[:, 0]))

    def _tokens(self, indices: Tensor) -> Tensor:
        height, width = self.grid_size
        shape, codebooks = tuple(indices.shape), self.num_codebooks
        fits = {
            2: codebooks == 1 and 0 < shape[-1] <= height * width,
            3: shape[-1] == codebooks and 0 < shape[1] <= height * width,
            4: shape[1:] == (height, width, codebooks),
        }
        if not fits.get(len(shape), False):
            flat = f"[B, n{'' if codebooks == 1 else f', {codebooks}'}] with n from 1 to {height * width}"
            raise VaevqMedError(f"indices have shape {shape}; expected {flat}, or [B, {height}, {width}, {codebooks}]")
        check_range("indices", indices, self.num_embeddings - 1)
        return indices.flatten(1).long()
