"""Perturbations of a segmentation network's coarsest features, for semi-supervised training (VQ-Seg, arXiv 2601.10124).

VQ-Seg replaces the index i of a position, with probability epsilon, by another one, j, drawn with a probability of
``exp(-d(e_i, e_j)) / Z_i``, and keeps it otherwise. With d the squared distance of codewords as they are, the draw is
all but uniform where they are short, and all but certain where they are long. So the temperature is given here in units
of the mean squared distance of a codeword to its nearest one, or the draw is uniform over the n nearest; neither
changes with the scale of the codebook.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.networks.segmenter import SegmenterFeatures, SliceSegmenter

_ROWS = 256
"""Codewords whose distances to all others are held at once."""
_LEAST = torch.finfo(torch.float32).tiny


def nearest_squared_distance(codebook: Tensor) -> Tensor:
    """Mean over the codewords of the squared distance to the nearest other one, a scalar.

    Args:
        codebook: ``[K, D]``, K at least 2.

    Example:
        >>> float(nearest_squared_distance(torch.tensor([[0.0], [1.0], [3.0]])))
        2.0
    """
    found = [_squared_distances(codebook, rows).amin(dim=1) for rows in torch.arange(len(codebook)).split(_ROWS)]
    return torch.cat(found).mean()


def replacement_probabilities(
    codebook: Tensor, rows: Tensor, *, temperature: float | None = None, nearest: int | None = None
) -> Tensor:
    """By which codeword some codewords are replaced: ``pi_ij``, of which each row sums to 1, and ``pi_ii`` is 0.

    Args:
        codebook: ``[K, D]``, K at least 2.
        rows: numbers of the codewords i, ``[n]``.
        temperature: ``softmax_j(-|e_i - e_j|^2 / (temperature m))`` with m of :func:`nearest_squared_distance`.
        nearest: uniform over so many nearest others. With neither, uniform over all others.

    Returns:
        ``[n, K]``.

    Example:
        >>> replacement_probabilities(torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([1]), nearest=1)
        tensor([[1., 0., 0.]])
    """
    distances = _squared_distances(codebook, rows)
    if nearest is not None:
        chosen = distances.topk(min(nearest, len(codebook) - 1), dim=1, largest=False).indices
        return torch.zeros_like(distances).scatter_(1, chosen, 1.0 / chosen.shape[1])
    if temperature is None:
        others = torch.ones_like(distances).scatter_(1, rows.to(distances.device)[:, None], 0.0)
        return others / (len(codebook) - 1)
    unit = (temperature * nearest_squared_distance(codebook)).clamp_min(_LEAST)
    return (-distances / unit).softmax(dim=1)


def perturb_indices(
    indices: Tensor,
    codebook: Tensor,
    epsilon: float,
    *,
    temperature: float | None = None,
    nearest: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Replace each index with probability epsilon by another one (VQ-Seg, arXiv 2601.10124, Eq. 4).

    Args:
        indices: int64, any shape, of one codebook.
        codebook: ``[K, D]``, K at least 2.
        epsilon: share that is replaced, in [0, 1]; 0 changes nothing, 1 keeps none.
        temperature: see :func:`replacement_probabilities`.
        nearest: likewise.
        generator: of the draws; the global one when absent.

    Returns:
        Of the same shape.
    """
    flat = indices.flatten()
    replaced = torch.rand(flat.shape, device=flat.device, generator=generator) < epsilon
    found, places = flat[replaced].unique(return_inverse=True)
    drawn = torch.empty_like(places)
    for part in torch.arange(len(found), device=flat.device).split(_ROWS):
        pi = replacement_probabilities(codebook, found[part], temperature=temperature, nearest=nearest)
        inside = (places >= part[0]) & (places <= part[-1])
        drawn[inside] = torch.multinomial(pi[places[inside] - part[0]], 1, generator=generator).squeeze(1)
    return flat.masked_scatter(replaced, drawn).view_as(indices)


def _squared_distances(codebook: Tensor, rows: Tensor) -> Tensor:
    """From some codewords to all, ``[n, K]``, infinite to themselves."""
    codebook = codebook.detach().float()
    rows = rows.to(codebook.device)
    found = torch.cdist(codebook[rows], codebook, compute_mode="donot_use_mm_for_euclid_dist").square()
    return found.scatter_(1, rows[:, None], torch.inf)


class FeaturePerturbation(nn.Module, ABC):
    """A change of the features of a disturbed view, from which the network still has to find the teacher's regions."""

    @abstractmethod
    def forward(self, features: SegmenterFeatures, network: SliceSegmenter) -> SegmenterFeatures:
        """The features, changed.

        Args:
            features: of ``network``.
            network: whose decoder they go to.
        """


class FeatureDropout(FeaturePerturbation):
    """Set whole channels of the coarsest features to 0 (UniMatch, arXiv 2208.09910, Sec. 3.2).

    Args:
        share: of the channels; what is left is scaled up, as dropout does.

    Raises:
        VaevqMedError: the share is not in [0, 1).
    """

    def __init__(self, *, share: float = 0.5) -> None:
        super().__init__()
        if not 0 <= share < 1:
            raise VaevqMedError(f"share: found {share}, expected 0 to below 1")
        self.share = share

    def forward(self, features: SegmenterFeatures, network: SliceSegmenter) -> SegmenterFeatures:
        """The features without some channels, others in each item of the batch."""
        coarse = features.coarse
        kept = F.dropout(coarse.new_ones(coarse.shape[:2]), self.share)
        return replace(features, coarse=coarse * kept.view(*coarse.shape[:2], *[1] * (coarse.ndim - 2)))


class QuantizedPerturbation(FeaturePerturbation):
    """Replace codewords by others, as :func:`perturb_indices` does (VQ-Seg's QPM, arXiv 2601.10124).

    The gradient reaches the encoder straight through, as without it.

    Args:
        epsilon: share of the positions.
        temperature: see :func:`replacement_probabilities`.
        nearest: likewise; with neither, all other codewords are as likely.

    Raises:
        VaevqMedError: a number out of its range, or both; while running, a network without one explicit codebook.
    """

    def __init__(self, *, epsilon: float = 0.7, temperature: float | None = None, nearest: int | None = None) -> None:
        super().__init__()
        if not 0 <= epsilon <= 1:
            raise VaevqMedError(f"epsilon: found {epsilon}, expected 0 to 1")
        if temperature is not None and nearest is not None:
            raise VaevqMedError(f"temperature, nearest: found {temperature} and {nearest}, expected one at most")
        if temperature is not None and not temperature > 0:
            raise VaevqMedError(f"temperature: found {temperature}, expected more than 0")
        if nearest is not None and nearest < 1:
            raise VaevqMedError(f"nearest: found {nearest}, expected 1 or more")
        self.epsilon = epsilon
        self.temperature = temperature
        self.nearest = nearest

    def forward(self, features: SegmenterFeatures, network: SliceSegmenter) -> SegmenterFeatures:
        """The features with some codewords replaced."""
        quantizer, found = network.quantizer, features.quantizer
        if quantizer is None or found is None:
            raise VaevqMedError("the network has no quantizer; expected one (network_def#quantizer) whose codes change")
        if found.codebook is None or found.codebook.ndim != 2 or quantizer.num_codebooks != 1:
            raise VaevqMedError(f"the quantizer is {type(quantizer).__name__}; expected one of one explicit codebook")
        if len(found.codebook) < 2:
            raise VaevqMedError("the codebook has one codeword; expected at least 2, of which one replaces another")
        indices = perturb_indices(
            found.indices, found.codebook, self.epsilon, temperature=self.temperature, nearest=self.nearest
        )
        with torch.no_grad():
            change = quantizer.indices_to_codes(indices) - quantizer.indices_to_codes(found.indices)
        return replace(features, coarse=features.coarse + change)
