"""A trained tokenizer with fewer codewords: another rate from the same checkpoint.

Codewords are clustered by how often the training images use them, and each cluster's mean becomes a codeword
(arXiv 2307.08265); or latents are clustered and their centers become the codebook, which is then fine-tuned (ReFiT,
arXiv 2112.01799). What comes out is an ordinary checkpoint of plain vector quantization.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaevq_med.core.clusters import StreamingClusters
from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.files import check_free
from vaevq_med.networks.generators.clusters import cluster_codewords, use_weights
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.quantizers.base import Quantizer
from vaevq_med.networks.quantizers.vq import VectorQuantizer
from vaevq_med.tokens.clusters import check_seed, codewords_used, tokenizer_of
from vaevq_med.tokens.store import TokenStore, load_token_store
from vaevq_med.trained.file import FORMAT, atomic_save
from vaevq_med.trained.network import StoredTokenizer

_TARGET = "vaevq_med.networks.quantizers.VectorQuantizer"
_LATENTS_A_CENTER = 64
_TRIALS = 256
_MOST_OTHERS = 0.02
"""Share of trial latents of which two quantizers may find another codeword, since distances round."""


@dataclass(frozen=True)
class ReductionReport:
    """What was done.

    Attributes:
        num_embeddings: K of before.
        reduced: K of now.
        source: ``codewords`` or ``latents``.
        distinct: codewords of now that no other equals.
        bits: a position's, log2 of K.
    """

    num_embeddings: int
    reduced: int
    source: str
    distinct: int
    bits: float


@dataclass(frozen=True)
class ReduceCodebook:
    """Write a tokenizer with fewer codewords.

    A store of indices clusters the codewords, each weighed by its use in the training split; one of latents clusters
    those. Encoder and decoder stay; with as many codewords as before, of indices, everything does.

    Attributes:
        checkpoint: of the tokenizer.
        tokens: token store of its indices or of its latents.
        output: checkpoint to write.
        num_embeddings: K of the new one, at most that of the old one.
        seed: of k-means.
        overwrite: replace the output.
    """

    checkpoint: Path
    tokens: Path
    output: Path
    num_embeddings: int
    seed: int = 0
    overwrite: bool = False

    def run(self) -> ReductionReport:
        """Do it.

        Raises:
            VaevqMedError: the tokenizer has no single codebook in which the nearest codeword is taken, the store is
                of another tokenizer, or a number is out of its range.
        """
        check_seed(self.seed)
        check_free(self.output, self.overwrite)
        store = load_token_store(self.tokens)
        stored = tokenizer_of(store, self.checkpoint)
        quantizer = stored.network().quantizer
        table = self._table(quantizer)
        if not 1 <= self.num_embeddings <= len(table):
            raise VaevqMedError(
                f"--num-embeddings: found {self.num_embeddings}, expected 1 to {len(table)}, the codewords of "
                f"{self.checkpoint}"
            )
        reduced = self._of_latents(store) if store.kind == "latents" else self._of_codewords(store, table)
        source = "latents" if store.kind == "latents" else "codewords"
        self._write(stored, store, quantizer, torch.from_numpy(reduced), source)
        return ReductionReport(
            num_embeddings=len(table),
            reduced=len(reduced),
            source=source,
            distinct=len(np.unique(reduced, axis=0)),
            bits=float(np.log2(len(reduced))),
        )

    def _table(self, quantizer: Quantizer) -> Tensor:
        """The codebook ``[K, D]``, where the nearest codeword of a latent is what the quantizer gives."""
        codebook, name = quantizer.codebook(), type(quantizer).__name__
        if codebook is None:
            raise VaevqMedError(f"{self.checkpoint}: found {name}, which has no explicit codebook, expected one")
        if quantizer.num_codebooks != 1 or codebook.ndim != 2:
            tables = len(codebook) if codebook.ndim == 3 else quantizer.num_codebooks
            raise VaevqMedError(f"{self.checkpoint}: found {name} with {tables} codebooks, expected one")
        table = codebook.detach().float()
        if not _takes_the_nearest(quantizer, table):
            raise VaevqMedError(
                f"{self.checkpoint}: found {name}, which does not decode the codeword nearest to a latent, expected a "
                "quantizer that does"
            )
        return table

    def _of_codewords(self, store: TokenStore, table: Tensor) -> NDArray[np.float32]:
        """Means of clusters of the codewords, weighed by use; as many as there are, they themselves."""
        codewords = table.numpy()
        if self.num_embeddings == len(codewords):
            return codewords
        (counts,) = codewords_used(store.array("training"), 1, len(codewords))
        cluster_of = cluster_codewords(codewords, counts, self.num_embeddings, self.seed)
        weights = use_weights(counts)
        totals = np.bincount(cluster_of, weights, self.num_embeddings)
        sums = np.stack([np.bincount(cluster_of, weights * channel, self.num_embeddings) for channel in codewords.T])
        means = (sums / totals).T.astype(np.float32)  # [K', D]
        alone = np.bincount(cluster_of, minlength=self.num_embeddings)[cluster_of] == 1
        means[cluster_of[alone]] = codewords[alone]  # to the bit
        return means

    def _of_latents(self, store: TokenStore) -> NDArray[np.float32]:
        """Centers of training latents, as many of each image; where fewer are distinct, some centers are the same."""
        array = store.array("training")  # [N, ..., D, *grid]
        random, axis = np.random.default_rng(self.seed), array.ndim - 2 - len(store.grid)
        share = -(-_LATENTS_A_CENTER * self.num_embeddings // len(array))
        parts = []
        for item in array:
            latents = np.moveaxis(np.asarray(item, dtype=np.float32), axis, -1)
            latents = latents.reshape(-1, latents.shape[-1])  # [n, D]
            parts.append(latents[random.permutation(len(latents))[:share]])
        every = np.concatenate(parts)
        clusters = StreamingClusters(self.num_embeddings, self.seed)
        # In any order: the first ones, which the centers are drawn from, would be those of a few images.
        clusters.add(every[random.permutation(len(every))])
        return clusters.centers()

    def _write(
        self, stored: StoredTokenizer, store: TokenStore, quantizer: Quantizer, table: Tensor, source: str
    ) -> None:
        definition: Mapping[str, Any] = stored.value("network_def")
        if not isinstance(definition.get("quantizer"), Mapping):
            raise VaevqMedError(f"{self.checkpoint}: found a network whose quantizer is its own, expected one given")
        size = {"num_embeddings": len(table)}
        new = {
            "_target_": _TARGET,
            **size,
            "embedding_dim": table.shape[1],
            "assignment": getattr(quantizer, "assignment", "euclidean"),
        }
        config = {**stored.config, **(size if "num_embeddings" in stored.config else {})}
        kept = {name: value for name, value in stored.tensors.items() if not name.startswith("quantizer.")}
        told = {
            "tokenizer": store.tokenizer["content_hash"],
            "tokens": store.content_hash,
            "num_embeddings": quantizer.num_embeddings,
            "source": source,
            "seed": self.seed,
        }
        state = {
            "format": FORMAT,
            "network": {**kept, "quantizer.embedding": table.clone()},
            "config": json.dumps({**config, "network_def": {**definition, "quantizer": new}}),
            "iteration": stored.iteration,
            "data": {**stored.data, "reduced": told},
            "feature_weights": dict(stored.feature_weights),
        }
        atomic_save(state, self.output)


@torch.inference_mode()
def _takes_the_nearest(quantizer: Quantizer, table: Tensor) -> bool:
    """Whether plain vector quantization by a quantizer's table finds what the quantizer finds.

    Tried on random latents with the mean and the deviation of the codewords, channel by channel.
    """
    assignment = getattr(quantizer, "assignment", "euclidean")
    plain = VectorQuantizer(num_embeddings=len(table), embedding_dim=table.shape[1], assignment=assignment)
    plain.embedding.copy_(table)
    drawn = torch.randn(table.shape[1], _TRIALS, generator=torch.Generator().manual_seed(0))
    spread, mean = table.std(dim=0, unbiased=False), table.mean(dim=0)
    latents = (mean[:, None] + spread[:, None] * drawn)[None]  # [1, D, n]
    posterior = DiagonalGaussian(latents, torch.zeros_like(latents))
    found, expected = (one.eval()(latents, posterior) for one in (quantizer, plain))
    others = (found.indices != expected.indices).float().mean()
    exact = torch.equal(found.quantized, quantizer.indices_to_codes(found.indices))
    return exact and float(others) <= _MOST_OTHERS
