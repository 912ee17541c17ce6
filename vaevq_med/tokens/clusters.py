"""The codewords of a tokenizer as clusters, weighted by how often the training images use them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.files import atomic_binary_writer, check_free
from vaevq_med.networks.generators.clusters import cluster_codewords
from vaevq_med.tokens.store import TokenStore, load_token_store
from vaevq_med.trained.network import StoredTokenizer


@dataclass(frozen=True)
class ClusterReport:
    """What was found.

    Attributes:
        num_embeddings: K.
        num_codebooks: G.
        largest: codewords of the largest cluster.
        used: share of the codewords that the training images use.
    """

    num_embeddings: int
    num_codebooks: int
    largest: int
    used: float


@dataclass(frozen=True)
class ClusterCodebook:
    """Cluster each codebook of a tokenizer into ``num_clusters``, for coarse to fine (arXiv 2503.16194).

    Attributes:
        checkpoint: of the tokenizer.
        tokens: token store of its indices, whose training split says how often each codeword is used.
        output: file to write, ``.npz``.
        num_clusters: C.
        seed: of k-means.
        overwrite: replace the output.
    """

    checkpoint: Path
    tokens: Path
    output: Path
    num_clusters: int
    seed: int = 0
    overwrite: bool = False

    def run(self) -> ClusterReport:
        """Write ``cluster_of`` ``[G, K]``.

        Raises:
            VaevqMedError: the tokenizer has no explicit codebook, the store is not of its indices, a number is out
                of its range, or something is at the output's place.
        """
        if self.output.suffix != ".npz":
            raise VaevqMedError(f"output {self.output}: found the suffix {self.output.suffix!r}, expected .npz")
        check_free(self.output, self.overwrite)
        check_seed(self.seed)
        store = load_token_store(self.tokens)
        if store.kind != "indices":
            raise VaevqMedError(f"{self.tokens}: found a store of {store.kind}, expected one of indices")
        quantizer = tokenizer_of(store, self.checkpoint).network().quantizer
        table = quantizer.codebook()
        if table is None:
            raise VaevqMedError(
                f"{self.checkpoint}: found {type(quantizer).__name__}, which has no explicit codebook, expected one "
                "whose codewords can be clustered"
            )
        books = quantizer.num_codebooks
        # One table that all codebooks share has one clustering; tables of segments are of no codebook.
        tables = table.detach().float().cpu().numpy()
        if tables.ndim == 3 and len(tables) != books:
            raise VaevqMedError(
                f"{self.checkpoint}: found {len(tables)} tables for {books} indices a position, expected one each"
            )
        counts = codewords_used(store.array("training"), books, quantizer.num_embeddings)
        if tables.ndim == 2:
            clusters = [cluster_codewords(tables, counts.sum(axis=0), self.num_clusters, self.seed)] * books
        else:
            clusters = [
                cluster_codewords(own, count, self.num_clusters, self.seed)
                for own, count in zip(tables, counts, strict=True)
            ]
        found = np.stack(clusters)
        provenance = {
            "tokenizer": store.tokenizer["content_hash"],
            "tokens": store.content_hash,
            "num_clusters": self.num_clusters,
            "seed": self.seed,
        }
        with atomic_binary_writer(self.output) as file:
            np.savez(file, cluster_of=found, provenance=np.array(json.dumps(provenance)))
        largest = max(int(np.bincount(row).max()) for row in found)
        return ClusterReport(found.shape[1], books, largest, float((counts > 0).mean()))


def check_seed(seed: int) -> None:
    """Refuse what k-means takes for no seed.

    Raises:
        VaevqMedError: saying which.
    """
    if not 0 <= seed < 2**32:
        raise VaevqMedError(f"--seed: found {seed}, expected 0 to {2**32 - 1}")


def tokenizer_of(store: TokenStore, checkpoint: Path) -> StoredTokenizer:
    """The weights of a checkpoint, averaged or not, that a store's tokens were made by.

    Raises:
        VaevqMedError: they are another tokenizer's.
    """
    described = store.tokenizer
    stored = StoredTokenizer.of_hash(checkpoint, described["content_hash"], described["readout"])
    if stored is None:
        raise VaevqMedError(f"{checkpoint}: found another tokenizer, expected that of the tokens {store.root}")
    return stored


def codewords_used(array: NDArray[Any], books: int, size: int) -> NDArray[np.int64]:
    """How often each codeword is used, ``[G, K]``.

    Args:
        array: of a store of indices, ``[..., G]``.
        books: G.
        size: K.
    """
    counts = np.zeros((books, size), dtype=np.int64)
    for item in array:
        for book in range(books):
            counts[book] += np.bincount(item[..., book].reshape(-1).astype(np.int64), minlength=size)
    return counts
