"""Loss terms, one file each, and the objective that sums them."""

from vaevq_med.core.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "AdversarialTerm": "adversarial",
        "AlignmentLoss": "alignment",
        "DCRLoss": "dcr",
        "DenoisingLoss": "vaevq_med.networks.generators.losses",
        "FlowLoss": "vaevq_med.networks.generators.losses",
        "GeneratorLoss": "vaevq_med.networks.generators.losses",
        "KLLoss": "kl",
        "LatentLoss": "vaevq_med.networks.generators.losses",
        "LossTerm": "base",
        "QuantizerLoss": "quantizer",
        "RCSLoss": "rcs",
        "ReconstructionLoss": "reconstruction",
        "LayerTokenLoss": "vaevq_med.networks.generators.losses",
        "TokenBound": "vaevq_med.networks.generators.losses",
        "TokenLoss": "vaevq_med.networks.generators.losses",
        "TokenizerObjective": "objective",
        "adaptive_weight": "adversarial",
        "calibrated_likelihood": "reconstruction",
        "discriminator_loss": "adversarial",
        "gaussian_wasserstein2": "wasserstein",
        "gaussian_wasserstein2_to_standard": "wasserstein",
        "generator_loss": "adversarial",
        "kl_per_token": "vaevq_med.networks.posterior",
        "kl_to_standard_normal": "kl",
        "marginal_cosine": "alignment",
        "marginal_distance_matrix": "alignment",
        "representation_coherence": "rcs",
    },
)
