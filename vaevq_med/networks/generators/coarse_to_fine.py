"""Coarse to fine (CTF, arXiv 2503.16194): clusters of the codewords one after the other, then all members at once.

The K codewords are clustered (``vaevq-med cluster-codebook``), so that an index is a cluster and a member of it.
LlamaGen predicts the clusters in raster order; a second transformer, in which every token attends to all, gives the
codeword of each token from all clusters in one pass, among the members of its cluster alone. The likelihood is exact:
``-log p(clusters) - sum_i log p(index_i | all clusters)``. Given the clusters the indices are drawn independently of
each other, which is what the one pass costs.

Where every codeword is a cluster, this is LlamaGen; where there is one cluster, the indices are independent. With G
codebooks the same clusters serve all of them where they share a table, or each has its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.base import Tokenizer
from vaevq_med.networks.generators.autoregressive import generate_indices
from vaevq_med.networks.generators.base import Draw, Wanted
from vaevq_med.networks.generators.clusters import MAKE, check_clusters, read_clusters
from vaevq_med.networks.generators.drawing import RandomSource, TokenRule, draw_indices, evaluating
from vaevq_med.networks.generators.llama_blocks import axial_rotations
from vaevq_med.networks.generators.llamagen import LlamaGen
from vaevq_med.networks.generators.static_steps import StepStore
from vaevq_med.networks.generators.token_generator import TOKEN_SETTINGS, TokenGenerator
from vaevq_med.networks.generators.trunk import LOGITS_AT_ONCE, check_shares, make_blocks, start
from vaevq_med.networks.initial import weights_follow
from vaevq_med.networks.ranges import check_sizes


class CoarseToFine(TokenGenerator):
    """A LlamaGen over clusters, and a transformer over all of them that gives the members.

    Args:
        num_embeddings: K, codewords of each codebook.
        num_clusters: C, clusters of each codebook, at most K.
        grid_size: latent positions ``(h, w)``, or one number for a square.
        width: channels of a token, of both transformers.
        depth: blocks of the LlamaGen.
        fine_depth: blocks of the second transformer.
        num_heads: attention heads of both.
        num_classes: labels are below it, and it is the null class; 0 for none.
        num_codebooks: G, indices a position.
        clusters: file of the clusters, which ``vaevq-med cluster-codebook`` writes; it is read when a new run starts,
            and never where the weights come from a checkpoint. Where it says of which tokenizer they are, tokens of
            another one are refused.
        token_dropout: as for :class:`LlamaGen`, of both.
        attention_dropout: likewise.
        residual_dropout: likewise.
        ffn_dropout: likewise.
        label_dropout: share of the labels that give way to the null class in training, for guidance.

    Raises:
        VaevqMedError: a number is out of its range, the file is not readable, or its clusters are not of these sizes.
    """

    initial_files: ClassVar[tuple[str, ...]] = ("clusters",)
    settings = MappingProxyType({**TOKEN_SETTINGS})
    cluster_of: Tensor

    def __init__(
        self,
        *,
        num_embeddings: int,
        num_clusters: int,
        grid_size: int | tuple[int, int],
        width: int,
        depth: int,
        num_heads: int,
        fine_depth: int = 6,
        num_classes: int = 0,
        num_codebooks: int = 1,
        clusters: str | Path | None = None,
        token_dropout: float = 0.1,
        attention_dropout: float = 0.0,
        residual_dropout: float = 0.1,
        ffn_dropout: float = 0.1,
        label_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_sizes(num_embeddings=num_embeddings, num_clusters=num_clusters, fine_depth=fine_depth)
        if num_clusters > num_embeddings:
            raise VaevqMedError(f"num_clusters is {num_clusters}; expected 1 to the {num_embeddings} codewords")
        check_shares(label_dropout=label_dropout)
        dropouts = {
            "attention_dropout": attention_dropout,
            "residual_dropout": residual_dropout,
            "ffn_dropout": ffn_dropout,
        }
        self.coarse = LlamaGen(
            num_embeddings=num_clusters,
            grid_size=grid_size,
            width=width,
            depth=depth,
            num_heads=num_heads,
            num_classes=num_classes,
            num_codebooks=num_codebooks,
            token_dropout=token_dropout,
            attention_dropout=attention_dropout,
            residual_dropout=residual_dropout,
            ffn_dropout=ffn_dropout,
            label_dropout=0.0,  # labels are dropped here, for both transformers
        )
        self.grid_size = self.coarse.grid_size
        self.num_embeddings, self.num_codebooks, self.num_classes = num_embeddings, num_codebooks, num_classes
        self.num_clusters, self.label_dropout, self.head_dim = num_clusters, label_dropout, width // num_heads
        self.class_embedding = nn.Embedding(num_classes + 1, width)
        self.token_embedding = nn.Embedding(num_codebooks * num_clusters, width)
        self.token_dropout = nn.Dropout(token_dropout)
        self.blocks = make_blocks(width=width, depth=fine_depth, num_heads=num_heads, dropouts=dropouts, causal=False)
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.heads = nn.ModuleList(nn.Linear(width, num_embeddings, bias=False) for _ in range(num_codebooks))
        fine = nn.ModuleList([self.class_embedding, self.token_embedding, self.blocks, self.heads])
        start(fine, zero=self.heads)
        found = torch.full((num_codebooks, num_embeddings), -1)
        self._made_of: tuple[str, str] | None = None
        if clusters is not None and not weights_follow():
            read = read_clusters(clusters)
            found = check_clusters(read.cluster_of, found.shape, num_clusters, str(clusters))
            self._made_of = None if read.tokenizer is None else (read.tokenizer, str(clusters))
        self.register_buffer("cluster_of", found)

    def check_fit(self, tokens: Mapping[str, Any], where: str) -> None:
        """Refuse tokens of other sizes, or of another tokenizer than the one whose codewords were clustered."""
        super().check_fit(tokens, where)
        found = tokens["tokenizer"].get("content_hash")
        if self._made_of is not None and found is not None and found != self._made_of[0]:
            raise VaevqMedError(
                f"{self._made_of[1]}: found clusters of the tokenizer {self._made_of[0][:19]}, expected those of "
                f"{found[:19]}, which made the tokens {where}; make them with: {MAKE}"
            )

    def prepare(self, values: Callable[[], Tensor]) -> None:
        """Refuse a network without clusters, but where they come with its weights."""
        if not weights_follow():
            self.check_ready()

    def check_ready(self) -> None:
        """Refuse a network without clusters."""
        if bool((self.cluster_of < 0).any()):
            raise VaevqMedError(f"network_def#clusters: found none, expected a file of clusters; make it with: {MAKE}")

    def coarse_of(self, tokens: Tensor) -> Tensor:
        """The clusters ``[B, h w G]`` of tokens."""
        books = torch.arange(tokens.shape[1], device=tokens.device) % self.num_codebooks
        return self.cluster_of[books, tokens]

    def fine_features(self, coarse: Tensor, labels: Tensor) -> Tensor:
        """What the heads are given, ``[B, h w G, width]``, of clusters ``[B, h w G]`` and labels ``[B]``."""
        tables = torch.arange(coarse.shape[1], device=coarse.device) % self.num_codebooks * self.num_clusters
        x = torch.cat([self.class_embedding(labels).unsqueeze(1), self.token_embedding(coarse + tables)], dim=1)
        x = self.token_dropout(x)
        rotations = axial_rotations(
            *self.grid_size, self.head_dim, num_codebooks=self.num_codebooks, device=coarse.device
        )
        rotations[0, :, 0] = 1.0  # the class token is not turned
        for block in self.blocks:
            x = block(x, rotations)
        return self.norm(x[:, 1:])

    def parts(
        self, indices: Tensor, labels: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """``-log p`` of the clusters and of the members given all clusters, in nats a token.

        Args:
            indices: ``[B, h, w, G]``.
            labels: ``[B]``, from 0 to ``num_classes``; the null class when absent.
            generator: of the label dropout's draws; the global one when absent.

        Raises:
            VaevqMedError: a shape does not fit, or an index or a label is out of range.
        """
        tokens = self.whole_grids(indices)
        classes = self.check_labels(self.dropped(labels, generator), len(tokens))
        coarse = self.coarse_of(tokens)
        first = self.coarse.loss(coarse.view(indices.shape), classes)
        hidden = self.fine_features(coarse, classes)
        step, total = max(1, LOGITS_AT_ONCE // self.num_embeddings), torch.zeros((), device=hidden.device)
        for g in range(self.num_codebooks):
            own = slice(g, None, self.num_codebooks)
            rows = (hidden[:, own].flatten(0, 1), coarse[:, own].flatten(), tokens[:, own].flatten())
            for part in zip(*(row.split(step) for row in rows), strict=True):
                total = total + checkpoint(self._summed, g, *part, use_reentrant=False, preserve_rng_state=False)
        return first, total / tokens.numel()

    def _summed(self, codebook: int, hidden: Tensor, coarse: Tensor, tokens: Tensor) -> Tensor:
        logits = self.heads[codebook](hidden).float()
        logits = logits.masked_fill(self.cluster_of[codebook] != coarse[:, None], -math.inf)
        return F.cross_entropy(logits, tokens, reduction="sum")

    def loss(
        self, indices: Tensor, labels: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """``-log p`` of all indices in nats a token, exactly; arguments and errors as for :meth:`parts`."""
        first, second = self.parts(indices, labels, generator=generator)
        return first + second

    @torch.no_grad()
    def indices(
        self,
        wanted: Wanted,
        rule: TokenRule,
        generator: RandomSource,
        store: StepStore | None = None,
    ) -> Tensor:
        """Indices ``[B, h, w, G]``: clusters one after the other, then every index; those that are known stay."""
        batch = len(wanted.seeds)
        kept = self.kept(wanted.known, wanted.mask, batch)
        known = None if kept is None else self.coarse_of(kept[1]).view(batch, *self.grid_size, self.num_codebooks)
        mask = None if kept is None else kept[0].view(batch, *self.grid_size, self.num_codebooks)
        coarse = generate_indices(
            self.coarse,
            labels=wanted.labels,
            num_samples=batch,
            known=known,
            mask=mask,
            dtype=wanted.dtype,
            generator=generator,
            store=store,
            **vars(rule),
        ).flatten(1)
        classes = self.both_classes(wanted.labels, batch, guided=rule.guided)
        seen = torch.cat([coarse, coarse]) if rule.guided else coarse
        autocast = torch.autocast(coarse.device.type, dtype=wanted.dtype, enabled=wanted.dtype is not None)
        with evaluating(self), autocast:
            hidden = self.fine_features(seen, classes)
            logits = torch.stack(
                [head(hidden[:, g :: self.num_codebooks]) for g, head in enumerate(self.heads)], dim=2
            )  # [B, h w, G, K]
            books = torch.arange(self.num_codebooks, device=coarse.device)
            others = self.cluster_of[books] != coarse.view(batch, *logits.shape[1:3], 1)
        drawn = draw_indices(rule.possible(logits, others), generator).flatten(1)
        if kept is not None:
            drawn = torch.where(kept[0], kept[1], drawn)
        return drawn.view(batch, *self.grid_size, self.num_codebooks)

    def draws(
        self,
        tokenizer: Tokenizer,
        *,
        grid: tuple[int, ...],
        settings: Mapping[str, Any],
        trained_with: Callable[[str], Any],
    ) -> Draw:
        """Draws the clusters token by token, and the indices in one pass."""
        rule, device = TokenRule(**settings), self.token_embedding.weight.device
        store = StepStore() if device.type == "cuda" else None

        def draw(wanted: Wanted) -> Tensor:
            sources = [torch.Generator(device).manual_seed(seed) for seed in wanted.seeds]
            return tokenizer.decode_indices(self.indices(wanted, rule, sources, store))

        return draw

    def network_calls(self, *, grid: tuple[int, ...], settings: Mapping[str, Any]) -> int:
        """One a cluster label, of the network of labels, and one of the network of indices."""
        return self.sequence_length + 1
