"""Clusters of a codebook's codewords: how they are found, and the file that a new generator takes them from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError

MAKE = "vaevq-med cluster-codebook CHECKPOINT TOKENS OUTPUT.npz --num-clusters C"


def cluster_codewords(
    codebook: NDArray[np.float32], counts: NDArray[np.int64], num_clusters: int, seed: int = 0
) -> NDArray[np.int64]:
    """The cluster of each codeword, by k-means weighted by use; clusters are numbered by their first codeword.

    A codeword that is never used weighs as much as the thousandth part of one that is used once: it goes where it is
    near, and moves no center of others. Each cluster has a member.

    Args:
        codebook: ``[K, D]``.
        counts: how often each codeword is used, ``[K]``.
        num_clusters: C, at most K; codewords that are equal may need fewer.
        seed: of k-means' start.

    Returns:
        ``[K]``, of 0 to C - 1.

    Raises:
        VaevqMedError: there are fewer distinct codewords than clusters.
    """
    distinct = len(np.unique(codebook, axis=0))
    if not 1 <= num_clusters <= distinct:
        raise VaevqMedError(f"num_clusters is {num_clusters}; expected 1 to {distinct}, the distinct codewords")
    if num_clusters == len(codebook):
        return np.arange(len(codebook))
    from sklearn.cluster import KMeans

    model = KMeans(num_clusters, n_init=3, random_state=seed)
    model.fit(codebook.astype(np.float64), sample_weight=use_weights(counts))
    _, first, numbers = np.unique(model.labels_, return_index=True, return_inverse=True)
    return first.argsort().argsort()[numbers].astype(np.int64)


def use_weights(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """What codewords weigh that are used so often: a thousandth of one use where they never are."""
    return np.maximum(counts.astype(np.float64), 1e-3)


@dataclass(frozen=True)
class Clusters:
    """What a file of clusters holds.

    Attributes:
        cluster_of: int64 ``[G, K]``.
        tokenizer: content hash of the tokenizer whose codewords they are of; None where the file does not say.
    """

    cluster_of: Tensor
    tokenizer: str | None


def read_clusters(path: str | Path) -> Clusters:
    """Clusters of a file that ``vaevq-med cluster-codebook`` wrote; nothing in it can run.

    Raises:
        VaevqMedError: there is no such file, or there are no clusters in it, or they are no whole numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise VaevqMedError(f"{path}: found no clusters, expected a file made by: {MAKE}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = archive["cluster_of"]
            said = json.loads(str(archive["provenance"])) if "provenance" in archive.files else {}
            tokenizer = said.get("tokenizer")
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise VaevqMedError(
            f"{path}: found an unreadable file ({reason}), expected clusters made by: {MAKE}"
        ) from error
    whole = found.dtype.kind in "iu" or (found.dtype.kind == "f" and bool((found == np.trunc(found)).all()))
    if not whole or (found.dtype.kind == "f" and not np.isfinite(found).all()):
        numbers = found.dtype.kind == "f"
        what = "clusters that are no whole numbers" if numbers else f"clusters of the type {found.dtype}"
        raise VaevqMedError(f"{path}: found {what}, expected whole numbers, made by: {MAKE}")
    return Clusters(torch.from_numpy(found.astype(np.int64)), tokenizer)


def check_clusters(found: Tensor, shape: torch.Size, num_clusters: int, where: str) -> Tensor:
    """Clusters that fit, or a refusal.

    Args:
        found: ``[G, K]``.
        shape: G and K of the network.
        num_clusters: C.
        where: what they were read from, for the message.

    Raises:
        VaevqMedError: the shape is another, or they are not C clusters, or one has no member.
    """
    if found.shape != shape:
        raise VaevqMedError(f"{where}: found clusters of {list(found.shape)} codewords, expected {list(shape)}")
    low, high = int(found.min()), int(found.max())
    if low < 0 or high != num_clusters - 1:
        raise VaevqMedError(
            f"{where}: found clusters {low} to {high}, expected 0 to {num_clusters - 1}, as num_clusters is "
            f"{num_clusters}"
        )
    for book, row in enumerate(found):
        empty = (torch.bincount(row, minlength=num_clusters) == 0).nonzero().flatten().tolist()
        if empty:
            of = f" of the codebook {book}" if len(found) > 1 else ""
            raise VaevqMedError(
                f"{where}: found no codeword in the cluster {empty[0]}{of}, expected one or more in each"
            )
    return found
