"""Encoders, decoders, quantizers, discriminators, generators and frozen feature networks."""

from vaevq_med.core.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "CoarseFirst": "generators.coarse_first",
        "CoarseToFine": "generators.coarse_to_fine",
        "Decoder": "decoder",
        "DiagonalGaussian": "posterior",
        "Encoder": "encoder",
        "FlowTransformer": "generators.flow",
        "FlowUNet": "generators.flow",
        "KeyValueCache": "generators.llama_blocks",
        "LatentDiffusionUNet": "generators.latent_diffusion",
        "LlamaGen": "generators.llamagen",
        "ModulatedDecoder": "decoder",
        "PatchDiscriminator": "discriminator",
        "Projector": "projector",
        "Rectifier": "rectifier",
        "SliceSegmenter": "segmenter",
        "SlotDecoder": "slots",
        "SlotEncoder": "slots",
        "StaticCache": "generators.llama_blocks",
        "TokenDiffusion": "generators.token_diffusion",
        "TrainingForward": "tokenizer",
        "ViTDecoder": "vit",
        "ViTEncoder": "vit",
        "VisualTokenizer": "tokenizer",
        "released_estimator": "tokenizer",
        "vqgan_preset": "encoder",
    },
)
