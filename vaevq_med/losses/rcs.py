"""Representation coherence (RCS): pre- and post-quantization features, weighed by the encoder's confidence."""

from __future__ import annotations

from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.losses.base import LossTerm
from vaevq_med.networks.outputs import TokenizerOutput
from vaevq_med.networks.ranges import check_choice


def representation_coherence(
    codes: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    detach_std: bool = True,
    reduction: str = "sum_d",
    min_std: float = 0.0,
) -> Tensor:
    """``0.5 sum_d ((z_q - mean) / sg(std))^2``, averaged over positions (VAEVQ, arXiv 2511.06863, Eq. 7).

    Both the codes and the mean get its gradient. The paper states the sum over D and leaves the reduction over
    positions open.

    Args:
        codes: differentiable codes z_q, ``[B, D, *grid]``.
        mean: posterior mean, of the same shape.
        std: posterior standard deviation, of the same shape, positive.
        detach_std: stop the gradient at ``std``, as the paper does; the released code does not.
        reduction: ``"sum_d"`` over D (the paper), or ``"mean_d"`` (the released code), D times smaller.
        min_std: floor of the standard deviation inside this term; 0 for none.

    Returns:
        A scalar, at least 0.

    Example:
        >>> import torch
        >>> one = torch.ones(1, 2, 1, 1)
        >>> representation_coherence(one, 0 * one, 0.5 * one).item()
        4.0
    """
    std = std.float().clamp_min(min_std) if min_std > 0 else std.float()
    if detach_std:
        std = std.detach()
    squared = ((codes.float() - mean.float()) / std).square()
    per_token = squared.sum(dim=1) if reduction == "sum_d" else squared.mean(dim=1)
    return 0.5 * per_token.mean()


class RCSLoss(LossTerm):
    """:func:`representation_coherence` of an output, times ``scale``.

    Args:
        detach_std: stop the gradient at the standard deviation.
        reduction: ``"sum_d"`` or ``"mean_d"``.
        min_std: floor of the standard deviation inside this term.
        scale: constant factor, e.g. tokens over pixels for a term a pixel.
    """

    def __init__(
        self, *, detach_std: bool = True, reduction: str = "sum_d", min_std: float = 0.0, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.detach_std = detach_std
        self.reduction = check_choice("reduction", reduction, ("sum_d", "mean_d"))
        self.min_std = min_std
        self.scale = scale

    def forward(self, target: Tensor, output: TokenizerOutput) -> Tensor:
        """The term, a scalar.

        Raises:
            VaevqMedError: the tokenizer has no posterior.
        """
        if output.posterior is None:
            raise VaevqMedError(
                "RCSLoss needs a posterior; found a tokenizer with variational false. Set objective#weights#rcs to 0"
            )
        return self.scale * representation_coherence(
            output.quantizer.codes,
            output.posterior.mean,
            output.posterior.std,
            detach_std=self.detach_std,
            reduction=self.reduction,
            min_std=self.min_std,
        )
