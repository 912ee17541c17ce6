"""Inception score (arXiv 1606.03498) of class logits that any network gives."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError

_PUBLISHED_SPLITS = 10
_LEAST_OF_SPLIT = 1000
_SEED = 2020
"""That torch-fidelity shuffles with."""


def score_splits(count: int) -> int:
    """Parts that the score is averaged over: 10, as published, where each has 1,000 images; otherwise one."""
    return _PUBLISHED_SPLITS if count >= _PUBLISHED_SPLITS * _LEAST_OF_SPLIT else 1


def inception_score(logits: Tensor, *, splits: int = 10) -> tuple[float, float]:
    """``exp(E_x KL(p(y|x) || p(y)))``, mean and standard deviation over parts of the images.

    p(y|x) is the softmax of an image's logits, p(y) its mean over the part. The images are shuffled first, by the
    permutation that torch-fidelity uses. The score of a part is at most the number of its images.

    Args:
        logits: ``[N, classes]``.
        splits: number of parts.

    Raises:
        VaevqMedError: there are fewer images than parts.

    Examples:
        >>> certain = 100 * torch.eye(4)
        >>> round(inception_score(certain, splits=1)[0], 6)
        4.0
    """
    count = len(logits)
    if not 1 <= splits <= count:
        raise VaevqMedError(f"splits: found {splits} for {count} images, expected 1 to {count}")
    order = torch.from_numpy(np.random.RandomState(_SEED).permutation(count)).to(logits.device)
    scores = []
    for part in range(splits):
        chosen = order[part * count // splits : (part + 1) * count // splits]
        log_p = logits[chosen].double().log_softmax(dim=1)
        p = log_p.exp()
        log_marginal = p.mean(dim=0).log()
        divergence = torch.where(p > 0, p * (log_p - log_marginal), 0).sum(dim=1)
        scores.append(float(divergence.mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))
