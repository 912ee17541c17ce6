"""Distribution consistency (DCR): the codebook's Wasserstein distance to the prior, or to the batch's latents."""

from __future__ import annotations

import torch
from torch import Tensor

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.losses.base import LossTerm
from vaevq_med.losses.known_gradient import with_gradient
from vaevq_med.losses.wasserstein import gaussian_wasserstein2_to_standard, wasserstein2_to_features
from vaevq_med.networks.outputs import TokenizerOutput
from vaevq_med.networks.quantizers.base import look_up, rows
from vaevq_med.networks.ranges import check_choice


class DCRLoss(LossTerm):
    """The squared 2-Wasserstein distance of the codebook's Gaussian to that of its target.

    With ``target: "prior"`` it is :func:`gaussian_wasserstein2_to_standard` (VAEVQ, arXiv 2511.06863, Eq. 11). With
    ``target: "features"`` it is :func:`gaussian_wasserstein2` of the batch's latents and the codebook (Wasserstein-VQ,
    arXiv 2506.15078), of which Eq. 11 is the case of latents that follow the prior. The latents are the posterior's
    means, or the latent itself where there is no posterior; their moments are those of all processes' images at hand,
    which are a part of the batch where it is gone through in parts.

    Codebooks of averages take no gradient. ``through: "assignments"`` passes the one of Eq. 11 on to the encoder. The
    term's value W is Eq. 11. Its gradient by the mean mu_n of token n of N, which is assigned to codeword k(n), is

    ``K / N  dW/de_k(n)``, as of ``sum_n K / N <sg dW/de_k(n), mu_n>``,

    and that by the codebook is zero. A step of rate r on the means then moves each of them, and so the plain average
    of each codeword's, exactly as a step of rate ``r K / N`` on the codebook would. The factor is one over the mean
    count of a codeword. It makes a mean over tokens of what Eq. 11 has as a mean over codewords, so that the term does
    not depend on how a batch is cut into parts, and keeps its size against the other terms at any batch size and K.

    The prior is N(0, I) also beside ``KLLoss(prior="empirical")``: nothing is whitened.

    Args:
        target: ``"prior"``, N(0, I), or ``"features"``, the batch's latents.
        through: what the gradient goes to: the ``"codebook"``, or by the ``"assignments"`` the tokens.
        detach_features: with ``target: "features"``, move the codebook alone.

    Raises:
        VaevqMedError: for another choice, or two that contradict each other.
    """

    def __init__(self, *, target: str = "prior", through: str = "codebook", detach_features: bool = False) -> None:
        super().__init__()
        self.target = check_choice("target", target, ("prior", "features"))
        self.through = check_choice("through", through, ("codebook", "assignments"))
        self.detach_features = detach_features
        if target == "features" and through == "assignments":
            raise VaevqMedError(
                "target is 'features' with through 'assignments'; expected through 'codebook', as the latents take the "
                "gradient themselves"
            )
        if detach_features and target == "prior":
            raise VaevqMedError("detach_features is True with target 'prior'; expected target 'features', or False")

    def forward(self, target: Tensor, output: TokenizerOutput) -> Tensor:
        """The term, a scalar.

        Raises:
            VaevqMedError: the quantizer has no explicit codebook, or not one as the options need it; nothing takes a
                gradient, in training; or there are fewer than two tokens.
        """
        codebook = output.quantizer.codebook
        if codebook is None:
            raise VaevqMedError(
                "DCRLoss needs an explicit codebook; this quantizer has none. Remove 'dcr' from objective.weights"
            )
        if self.through == "assignments":
            return self._through_assignments(codebook, output)
        if torch.is_grad_enabled() and not codebook.requires_grad and (self.target == "prior" or self.detach_features):
            other = "detach_features to false" if self.detach_features else "through to 'assignments'"
            raise VaevqMedError(
                "DCRLoss needs a codebook that takes a gradient; this quantizer's is fixed or made of averages. "
                f"Set objective#weights#dcr to 0, or objective#terms#dcr#{other}"
            )
        if self.target == "prior":
            return gaussian_wasserstein2_to_standard(codebook)
        return wasserstein2_to_features(self._features(codebook, output), codebook)

    def _features(self, codebook: Tensor, output: TokenizerOutput) -> Tensor:
        """The latents ``[N, D]``, or ``[G, N, D / G]`` beside G codebooks of channels of their own."""
        latents = _latents(output)
        features = rows(latents.detach() if self.detach_features else latents)
        if codebook.ndim == 3:
            groups, _, channels = codebook.shape
            if groups * channels != features.shape[1]:
                raise VaevqMedError(
                    f"DCRLoss's target is 'features' with a codebook of shape {tuple(codebook.shape)}; expected [K, D] "
                    f"or [G, K, D / G] for D = {features.shape[1]}"
                )
            features = features.unflatten(1, (groups, channels)).transpose(0, 1)
        return features

    def _through_assignments(self, codebook: Tensor, output: TokenizerOutput) -> Tensor:
        """Eq. 11 with its gradient handed to the latents of the tokens."""
        indices = output.quantizer.indices
        if codebook.ndim != 2 or indices.shape[-1] != 1:
            raise VaevqMedError(
                f"DCRLoss's through is 'assignments' with {indices.shape[-1]} indices a position and a codebook of "
                f"shape {tuple(codebook.shape)}; expected one index, and [K, D]"
            )
        latents = _latents(output)
        if not latents.requires_grad or not torch.is_grad_enabled():
            return gaussian_wasserstein2_to_standard(codebook.detach())
        codewords = codebook.detach().requires_grad_()
        value = gaussian_wasserstein2_to_standard(codewords)
        (gradient,) = torch.autograd.grad(value, codewords)
        to_tokens = look_up(indices, gradient) * (len(codebook) / indices.numel())  # [B, D, *grid]
        return with_gradient(value.detach(), [latents], [to_tokens.to(latents.dtype)])


def _latents(output: TokenizerOutput) -> Tensor:
    """What the encoder says ``[B, D, *grid]``, without the noise."""
    return output.latent if output.posterior is None else output.posterior.mean
