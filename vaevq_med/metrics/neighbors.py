"""Exact nearest neighbors in bounded memory: the manifolds of precision and recall, and the closest real image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError

_ROWS = 1024
_COLUMNS = 4096
BLOCK_ELEMENTS = 2**24
"""Numbers of a block of vectors at most; of very long ones fewer go at once."""
_ROUNDING = 64 * torch.finfo(torch.float64).eps


def distance_blocks(first: Tensor, second: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Squared Euclidean distances of all pairs, a block at a time, in float64.

    ``|a|^2 + |b|^2 - 2 a.b``; what is below the rounding of that sum is 0, so that equal vectors are at distance 0. Of
    integers, such as levels of pixels, the distances are exact.

    Args:
        first: ``[N, F]`` of any type.
        second: ``[M, F]``.

    Yields:
        Rows of ``first``, rows of ``second``, and their distances, at most 1024 x 4096.
    """
    fit = max(1, BLOCK_ELEMENTS // max(1, first.shape[1]))
    rows, columns = min(_ROWS, fit), min(_COLUMNS, fit)
    for top in range(0, len(first), rows):
        a = first[top : top + rows].double()
        squares_a = a.square().sum(dim=1, keepdim=True)
        for left in range(0, len(second), columns):
            b = second[left : left + columns].double()
            sums = squares_a + b.square().sum(dim=1)
            distances = torch.addmm(sums, a, b.mT, alpha=-2)
            distances[distances <= _ROUNDING * sums] = 0
            yield slice(top, top + len(a)), slice(left, left + len(b)), distances


def manifold_radii(features: Tensor, *, k: int = 3) -> Tensor:
    """Squared distance of each vector to its k-th nearest other one, float64 ``[N]``.

    Args:
        features: ``[N, F]``.
        k: which neighbor, the vector itself not counted.

    Raises:
        VaevqMedError: N is not above k, or k below 1.
    """
    if k < 1:
        raise VaevqMedError(f"k: found {k}, expected 1 or more")
    if len(features) <= k:
        raise VaevqMedError(f"found {len(features)} images, expected more than k = {k} for precision and recall")
    best = torch.full((len(features), k), torch.inf, dtype=torch.float64, device=features.device)
    for rows, columns, distances in distance_blocks(features, features):
        own = torch.arange(rows.start, rows.stop, device=features.device)[:, None]
        other = torch.arange(columns.start, columns.stop, device=features.device)
        distances.masked_fill_(own == other, torch.inf)
        best[rows] = torch.cat([best[rows], distances], dim=1).topk(k, dim=1, largest=False).values
    return best.amax(dim=1)


def _covered(points: Tensor, centers: Tensor, radii: Tensor) -> float:
    """Share of the points that lie in a ball around one of the centers at least."""
    inside = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    for rows, columns, distances in distance_blocks(points, centers):
        inside[rows] |= (distances <= radii[columns]).any(dim=1)
    return float(inside.double().mean())


@dataclass(frozen=True)
class PrecisionRecall:
    """Improved precision and recall.

    Attributes:
        precision: share of the generated images that lie in the manifold of the real ones.
        recall: share of the real images that lie in the manifold of the generated ones.
    """

    precision: float
    recall: float


def precision_recall(sample: Tensor, reference: Tensor, *, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (arXiv 1904.06991, Eq. 1 and 2).

    A set's manifold is the union of balls around its vectors, each as wide as the distance to the vector's k-th nearest
    other one. Exact; no more than a block of distances is ever in memory. Both figures depend on the numbers of images.

    Args:
        sample: ``[N, F]`` features of generated images.
        reference: ``[M, F]`` of real images.
        k: which neighbor a ball reaches to.

    Raises:
        VaevqMedError: one of the sets has no more than k vectors.

    Examples:
        >>> line = torch.arange(8.0)[:, None]
        >>> precision_recall(line, line, k=1)
        PrecisionRecall(precision=1.0, recall=1.0)
        >>> precision_recall(line[:4], line, k=1)
        PrecisionRecall(precision=1.0, recall=0.625)
    """
    return PrecisionRecall(
        precision=_covered(sample, reference, manifold_radii(reference, k=k)),
        recall=_covered(reference, sample, manifold_radii(sample, k=k)),
    )


def unit_length(features: Tensor) -> Tensor:
    """Vectors ``[N, F]`` scaled to length 1 in float64; half their squared distance is the cosine distance."""
    return torch.nn.functional.normalize(features.double(), dim=1, eps=1e-12)


class NearestNeighbors:
    """The nearest of many vectors that come in portions, for each of some vectors.

    Args:
        queries: ``[N, F]`` of any type.

    Attributes:
        squared: squared Euclidean distance of each query to its nearest vector so far, float64 ``[N]``.
        indices: the nearest vector's number, int64 ``[N]``; -1 before the first portion. Of equally near ones in
            different portions, it is the earlier.

    Example:
        >>> search = NearestNeighbors(torch.tensor([[0.0], [5.0]]))
        >>> search.update(torch.tensor([[1.0], [9.0]]))
        >>> search.update(torch.tensor([[4.5]]))
        >>> search.indices.tolist(), search.squared.tolist()
        ([0, 2], [1.0, 0.25])
    """

    def __init__(self, queries: Tensor) -> None:
        self.queries = queries
        self.squared = torch.full((len(queries),), torch.inf, dtype=torch.float64, device=queries.device)
        self.indices = torch.full((len(queries),), -1, dtype=torch.int64, device=queries.device)
        self._seen = 0

    def update(self, references: Tensor) -> None:
        """Look among the next ``[M, F]`` vectors."""
        for rows, columns, distances in distance_blocks(self.queries, references):
            nearest, position = distances.min(dim=1)
            better = nearest < self.squared[rows]
            self.squared[rows] = torch.where(better, nearest, self.squared[rows])
            self.indices[rows] = torch.where(better, position + columns.start + self._seen, self.indices[rows])
        self._seen += len(references)
