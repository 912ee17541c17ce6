"""Reconstruction terms: squared, absolute, squared under a calibrated Gaussian likelihood, and those of masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vaevq_med.losses.base import PATH_REDUCTIONS, PATHS, LossTerm, combine, paths
from vaevq_med.networks.outputs import TokenizerOutput
from vaevq_med.networks.processes import mean_without_gradient
from vaevq_med.networks.ranges import check_choice

_PIXEL = 1.0
"""Added to both halves of the fraction of Dice."""
KINDS = ("l2", "l1", "calibrated", "bce", "dice")


def calibrated_likelihood(error: Tensor) -> Tensor:
    """Negative log-likelihood a pixel under the optimal variance, ``0.5 log MSE`` (sigma-VAE, arXiv 2006.13202).

    Across processes the variance is that of the global batch: the gradient is ``d MSE / (2 MSE_global)``, whose mean
    over the processes is that of one process with the whole batch.

    Args:
        error: this process's mean squared error, a scalar.
    """
    overall = mean_without_gradient(error).clamp_min(1e-12)
    slope = 0.5 * error / overall
    return slope - slope.detach() + 0.5 * overall.log()


def _soft_dice_loss(shares: Tensor, masks: Tensor) -> Tensor:
    """1 less the Dice of shares in [0, 1] and masks, ``[B, C, *size]``, each channel over the micro-batch; the mean."""
    axes = [0, *range(2, masks.ndim)]
    common, both = (shares * masks).sum(axes), (shares + masks).sum(axes)  # [C]
    # One pixel that is right everywhere: without it nothing pushes down what is found in a channel of empty masks.
    return 1 - ((2 * common + _PIXEL) / (both + _PIXEL)).mean()


class ReconstructionLoss(LossTerm):
    """Error of the reconstruction, a mean over every pixel and channel (or a sum over those of an image).

    Args:
        kind: ``"l2"`` squared error (VAEVQ's paper), ``"l1"`` absolute error (VQGAN, the released code), or
            ``"calibrated"``, see :func:`calibrated_likelihood`: with it, KL and RCS divided by the pixel count enter
            with weight 1. Of label maps, whose channels are masks at -1 and 1, the decoder's output may be read as
            logits instead: ``"bce"``, binary cross-entropy, or ``"dice"``, 1 less the soft Dice of a channel over the
            micro-batch (arXiv 1606.04797) with one pixel added to both halves of its fraction, mean over the channels.
        reduction: ``"mean"`` over every element; ``"sum"`` over an image's elements, mean over the batch.
        path_reduction: ``"sum"`` (the paper) or ``"mean"`` (the released code) of the quantized and the continuous
            path.
        paths: ``"both"``, or the ``"continuous"`` path alone (a plain VAE; Gaussian Quant).

    Raises:
        VaevqMedError: for another kind, reduction or path.
    """

    def __init__(
        self, *, kind: str = "l2", reduction: str = "mean", path_reduction: str = "sum", paths: str = "both"
    ) -> None:
        super().__init__()
        self.kind = check_choice("kind", kind, KINDS)
        self.reduction = check_choice("reduction", reduction, ("mean", "sum"))
        self.path_reduction = check_choice("path_reduction", path_reduction, PATH_REDUCTIONS)
        self.paths = check_choice("paths", paths, PATHS)

    def forward(self, target: Tensor, output: TokenizerOutput) -> Tensor:
        """The error of ``[B, C, H, W]``, a scalar."""
        target = target.float()
        factor = target[0].numel() if self.reduction == "sum" else 1
        errors = [self._error(path.float(), target) for path in paths(output, self.paths)]
        return factor * combine(errors, self.path_reduction)

    def _error(self, path: Tensor, target: Tensor) -> Tensor:
        if self.kind == "bce":
            return F.binary_cross_entropy_with_logits(path, (target + 1) / 2)
        if self.kind == "dice":
            return _soft_dice_loss(path.sigmoid(), (target + 1) / 2)
        difference = path - target
        if self.kind == "l1":
            return difference.abs().mean()
        error = torch.mean(difference.square())
        return calibrated_likelihood(error) if self.kind == "calibrated" else error
