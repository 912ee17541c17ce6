"""Encoders, decoders, quantizers, discriminators and frozen feature networks."""

from vaevq_med.networks.decoder import Decoder
from vaevq_med.networks.discriminator import PatchDiscriminator
from vaevq_med.networks.encoder import Encoder, vqgan_preset
from vaevq_med.networks.generators.latent_diffusion import LatentDiffusionUNet
from vaevq_med.networks.generators.llama_blocks import KeyValueCache, StaticCache
from vaevq_med.networks.generators.llamagen import LlamaGen
from vaevq_med.networks.modulated_decoder import ModulatedDecoder
from vaevq_med.networks.posterior import DiagonalGaussian
from vaevq_med.networks.tokenizer import TrainingForward, VisualTokenizer, released_estimator

__all__ = [
    "Decoder",
    "DiagonalGaussian",
    "Encoder",
    "KeyValueCache",
    "LatentDiffusionUNet",
    "LlamaGen",
    "ModulatedDecoder",
    "PatchDiscriminator",
    "StaticCache",
    "TrainingForward",
    "VisualTokenizer",
    "released_estimator",
    "vqgan_preset",
]
