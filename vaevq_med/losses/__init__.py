"""Loss terms, one file each, and the objective that sums them."""

from vaevq_med.losses.adversarial import AdversarialTerm, adaptive_weight, discriminator_loss, generator_loss
from vaevq_med.losses.base import LossTerm
from vaevq_med.losses.dcr import DCRLoss, gaussian_wasserstein2_to_standard
from vaevq_med.losses.kl import KLLoss, kl_per_token, kl_to_standard_normal
from vaevq_med.losses.objective import TokenizerObjective
from vaevq_med.losses.quantizer import QuantizerLoss
from vaevq_med.losses.rcs import RCSLoss, representation_coherence
from vaevq_med.losses.reconstruction import ReconstructionLoss, calibrated_likelihood
from vaevq_med.networks.generators.denoising import DenoisingLoss
from vaevq_med.networks.generators.losses import GeneratorLoss, LatentLoss, TokenLoss

__all__ = [
    "AdversarialTerm",
    "DCRLoss",
    "DenoisingLoss",
    "GeneratorLoss",
    "KLLoss",
    "LatentLoss",
    "LossTerm",
    "QuantizerLoss",
    "RCSLoss",
    "ReconstructionLoss",
    "TokenLoss",
    "TokenizerObjective",
    "adaptive_weight",
    "calibrated_likelihood",
    "discriminator_loss",
    "gaussian_wasserstein2_to_standard",
    "generator_loss",
    "kl_per_token",
    "kl_to_standard_normal",
    "representation_coherence",
]
