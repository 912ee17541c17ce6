"""What a segmentation network minimizes: Dice and cross-entropy where regions are known, a teacher's word elsewhere.

The teacher is the moving average of the network's weights (mean teacher, arXiv 1703.01780). Its thresholded
probabilities are what the network has to give of a disturbed view of the same slices, where the teacher is sure
(FixMatch, arXiv 2001.07685; UniMatch, arXiv 2208.09910), perhaps with perturbed features, too, as in VQ-Seg
(arXiv 2601.10124).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.core.names import did_you_mean
from vaevq_med.networks.outputs import LossOutput
from vaevq_med.networks.perturbation import FeaturePerturbation
from vaevq_med.networks.segmenter import SegmenterFeatures, SliceSegmenter

TERMS = ("dice", "cross_entropy", "consistency", "codebook", "commitment")
"""What may have a weight; the last two are the quantizer's."""


class SegmentationLoss(nn.Module):
    """A weighted sum of terms of a batch, some of whose slices may have no known regions.

    ``dice`` is MONAI's soft Dice loss of each region over the whole batch, a mean over the regions, so that a slice
    without a region does no harm; ``cross_entropy`` the binary one of each region, a mean over pixels and regions, as
    regions contain one another; ``consistency`` the sum of both, with their weights, against the teacher's regions,
    over the pixels of which it is sure; ``codebook`` and ``commitment`` are the losses of the network's quantizer.

    Args:
        network: shares its parameters with what is trained.
        weights: of :data:`TERMS`; a term without one, or with 0, is left out.
        teacher: the averaged copy of the network; needed where ``consistency`` has a weight.
        perturbation: of the features of the disturbed view, or None.
        confidence: least probability of a teacher's decision that counts.
        noise: standard deviation of the noise of the disturbed view, of images in [0, 1].
        gain: its brightness is changed by a factor of ``1 - gain`` to ``1 + gain``, for each contrast.

    Raises:
        VaevqMedError: an unknown weight, a consistency without a teacher, or a number out of its range.
    """

    def __init__(
        self,
        *,
        network: SliceSegmenter,
        weights: Mapping[str, float],
        teacher: nn.Module | None = None,
        perturbation: FeaturePerturbation | None = None,
        confidence: float = 0.95,
        noise: float = 0.05,
        gain: float = 0.2,
    ) -> None:
        super().__init__()
        for name in weights:
            if name not in TERMS:
                hint = did_you_mean(name, TERMS, f"there are {', '.join(TERMS)}")
                raise VaevqMedError(f"weights: found {name!r}, expected a term of the loss; {hint}")
        if weights.get("consistency") and teacher is None:
            raise VaevqMedError("weights: found consistency without a teacher, expected one, the averaged network")
        if not 0.5 <= confidence < 1:
            raise VaevqMedError(f"confidence: found {confidence}, expected 0.5 to below 1")
        if noise < 0 or not 0 <= gain < 1:
            raise VaevqMedError(f"noise, gain: found {noise}, {gain}, expected 0 or more, and 0 to below 1")
        self.network = network
        self.weights = {name: float(weight) for name, weight in weights.items() if weight}
        self.perturbation = perturbation
        self.confidence = confidence
        self.noise = noise
        self.gain = gain
        self._teacher = (teacher,)  # in a tuple, so that it is no part of this module: nothing trains or moves it
        self._dice = DiceLoss(sigmoid=True, batch=True)
        self._dice_of_probabilities = DiceLoss(batch=True)

    def forward(self, images: Tensor, regions: Tensor, labeled: Tensor) -> LossOutput:
        """The terms of a batch.

        Args:
            images: stacks ``[B, C, d, H, W]`` in [-1, 1].
            regions: masks of the regions, float ``[B, R, d, H, W]``.
            labeled: bool ``[B]``: whose masks are known.

        Returns:
            The total, differentiable, and each term, detached.
        """
        terms: dict[str, Tensor] = {}
        known, unknown = labeled.nonzero().flatten(), (~labeled).nonzero().flatten()
        passes: list[SegmenterFeatures] = []
        if len(known):
            passes.append(self.network.encode(images[known]))
            logits = self.network.decode(passes[-1]).float()
            masks = self.network.targets(regions[known])
            terms["dice"] = self._dice(logits, masks)
            terms["cross_entropy"] = F.binary_cross_entropy_with_logits(logits, masks)
        if len(unknown) and "consistency" in self.weights:
            features, terms["consistency"] = self._consistency(images[unknown])
            passes.append(features)
        for name in ("codebook", "commitment"):
            found = [one.quantizer.losses[name] for one in passes if one.quantizer and name in one.quantizer.losses]
            if found:
                terms[name] = torch.stack(found).mean()
        weighted = [self.weights[name] * value for name, value in terms.items() if name in self.weights]
        # Nothing of this part of a batch counts: still, every parameter has a gradient, of 0.
        total = torch.stack(weighted).sum() if weighted else 0 * self.network(images).float().sum()
        return LossOutput(total, {name: value.detach() for name, value in terms.items()})

    def _consistency(self, images: Tensor) -> tuple[SegmenterFeatures, Tensor]:
        """The features of the disturbed view, and how far its regions are from those of the teacher."""
        (teacher,) = self._teacher
        assert teacher is not None
        with torch.no_grad():
            probability = teacher(images).float().sigmoid()
            sure = (torch.maximum(probability, 1 - probability) >= self.confidence).float()
            wanted = (probability > 0.5).float()
        features = self.network.encode(self._disturbed(images))
        if self.perturbation is not None:
            features = self.perturbation(features, self.network)
        logits = self.network.decode(features).float()
        pixels = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        return features, (
            self.weights.get("dice", 0.0) * self._dice_of_probabilities(logits.sigmoid() * sure, wanted * sure)
            + self.weights.get("cross_entropy", 0.0) * (pixels * sure).mean()
        )

    def _disturbed(self, images: Tensor) -> Tensor:
        """Another brightness of each contrast, and noise on what is not background."""
        unit = (images + 1) / 2
        gain = 1 + self.gain * (2 * torch.rand(*unit.shape[:2], 1, 1, 1, device=unit.device) - 1)
        noise = self.noise * torch.randn_like(unit) * (unit > 0)
        return (unit * gain + noise).clamp(0, 1) * 2 - 1
