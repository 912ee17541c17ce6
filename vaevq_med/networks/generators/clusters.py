"""Clusters of a codebook's codewords: how they are found, and the file that a new generator takes them from."""

from __future__ import annotations

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

    weights = np.maximum(counts.astype(np.float64), 1e-3)
    model = KMeans(num_clusters, n_init=3, random_state=seed).fit(codebook.astype(np.float64), sample_weight=weights)
    _, first, numbers = np.unique(model.labels_, return_index=True, return_inverse=True)
    return first.argsort().argsort()[numbers].astype(np.int64)


def read_clusters(path: str | Path) -> Tensor:
    """Clusters ``[G, K]`` of a file that ``vaevq-med cluster-codebook`` wrote; nothing in it can run.

    Raises:
        VaevqMedError: there is no such file, or no clusters in it.
    """
    path = Path(path)
    if not path.is_file():
        raise VaevqMedError(f"{path}: found no clusters, expected a file made by: {MAKE}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return torch.from_numpy(archive["cluster_of"].astype(np.int64))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise VaevqMedError(
            f"{path}: found an unreadable file ({reason}), expected clusters made by: {MAKE}"
        ) from error


def check_clusters(found: Tensor, shape: torch.Size, num_clusters: int, where: str) -> Tensor:
    """Clusters that fit, or a refusal.

    Args:
        found: ``[G, K]``.
        shape: G and K of the network.
        num_clusters: C.
        where: what they were read from, for the message.

    Raises:
        VaevqMedError: the shape is another, or they are not C clusters.
    """
    if found.shape != shape:
        raise VaevqMedError(f"{where}: found clusters of {list(found.shape)} codewords, expected {list(shape)}")
    low, high = int(found.min()), int(found.max())
    if low < 0 or high != num_clusters - 1:
        raise VaevqMedError(
            f"{where}: found clusters {low} to {high}, expected 0 to {num_clusters - 1}, as num_clusters is "
            f"{num_clusters}"
        )
    return found
