"""The GAN's losses and VQGAN's adaptive weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaevq_med.core.errors import VaevqMedError
from vaevq_med.losses.base import paths
from vaevq_med.networks.outputs import TokenizerOutput
from vaevq_med.networks.processes import mean_without_gradient
from vaevq_med.networks.ranges import check_choice

LOSSES = ("hinge", "non_saturating")
GAN_PATHS = ("quantized", "continuous", "both", "mean_logits")


def discriminator_loss(real: Tensor, fake: Tensor, kind: str = "hinge") -> Tensor:
    """Half the sum of the losses on real and on reconstructed images, from logits of any shape.

    ``hinge``: ``0.5 (E relu(1 - D(x)) + E relu(1 + D(x')))``; ``non_saturating``: softplus in relu's place, without
    the margin.
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: Tensor, kind: str = "hinge", per_image: bool = False) -> Tensor:
    """``hinge``: ``-E D(x')``; ``non_saturating``: ``E softplus(-D(x'))``.

    Args:
        fake: logits ``[B, 1, h, w]``.
        kind: which loss.
        per_image: take the mean logit of each image first.
    """
    if per_image:
        fake = fake.flatten(1).mean(dim=1)
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def adaptive_weight(of_likelihood: Tensor, of_term: Tensor, *, epsilon: float = 1e-4, maximum: float = 1e4) -> Tensor:
    """VQGAN's weight (arXiv 2012.09841, Eq. 7): gradient norm of one loss over that of the other, at one layer.

    ``|dL_rec| / (|dL| + 1e-4)``, at most ``maximum``. Across processes the gradients are averaged first, so that
    every process has the weight of the whole batch.

    Args:
        of_likelihood: gradient of the reconstruction and the perceptual loss by the weight of a convolution: for the
            GAN the decoder's last, for a loss of the latent the last one before it.
        of_term: that of the term whose weight it is.
        epsilon: added to the denominator.
        maximum: upper bound.

    >>> adaptive_weight(torch.tensor([3.0, 4.0]), torch.tensor([0.0]), maximum=7.0)
    tensor(7.)
    """
    above, below = (mean_without_gradient(gradient.float()).norm() for gradient in (of_likelihood, of_term))
    return (above / (below + epsilon)).clamp(0, maximum)


class AdversarialTerm(nn.Module):
    """Which GAN, how strong and from when.

    Args:
        discriminator_loss: ``"hinge"`` or ``"non_saturating"``.
        generator_loss: ``"hinge"`` or ``"non_saturating"``.
        weight: of the generator's loss.
        adaptive: multiply the weight by :func:`adaptive_weight`.
        start_step: iterations without the GAN.
        paths: reconstructions the discriminator judges: the ``"quantized"`` one, the ``"continuous"`` one, ``"both"``
            as one batch, or ``"mean_logits"``, the mean of both paths' logits (the released code).
        per_image: in the generator's loss, take the mean logit of each image first (the released code).

    Raises:
        VaevqMedError: for another loss or path, or a negative step.
    """

    def __init__(
        self,
        *,
        discriminator_loss: str = "hinge",
        generator_loss: str = "hinge",
        weight: float = 0.8,
        adaptive: bool = True,
        start_step: int = 0,
        paths: str = "quantized",
        per_image: bool = False,
    ) -> None:
        super().__init__()
        self.discriminator_kind = check_choice("discriminator_loss", discriminator_loss, LOSSES)
        self.generator_kind = check_choice("generator_loss", generator_loss, LOSSES)
        self.paths = check_choice("paths", paths, GAN_PATHS)
        if start_step < 0:
            raise VaevqMedError(f"start_step is {start_step}; expected 0 or more")
        self.weight = weight
        self.adaptive = adaptive
        self.start_step = start_step
        self.per_image = per_image

    def _fake_logits(self, output: TokenizerOutput, discriminator: nn.Module, detach: bool) -> Tensor:
        if self.paths == "quantized":
            images = [output.reconstruction]
        else:
            images = paths(output, "continuous" if self.paths == "continuous" else "both")
        images = [image.detach() if detach else image for image in images]
        if self.paths == "mean_logits":
            return torch.stack([discriminator(image).float() for image in images]).mean(dim=0)
        return discriminator(torch.cat(images)).float()

    def generator(self, output: TokenizerOutput, discriminator: nn.Module) -> Tensor:
        """The generator's loss, unweighted, a scalar."""
        logits = self._fake_logits(output, discriminator, detach=False)
        return generator_loss(logits, self.generator_kind, self.per_image)

    def discriminator(self, target: Tensor, output: TokenizerOutput, discriminator: nn.Module) -> dict[str, Tensor]:
        """The discriminator's loss and the mean logits, scalars; reconstructions are detached."""
        real = discriminator(target).float()
        fake = self._fake_logits(output, discriminator, detach=True)
        return {
            "loss": discriminator_loss(real, fake, self.discriminator_kind),
            "real_logit": real.mean(),
            "fake_logit": fake.mean(),
        }
