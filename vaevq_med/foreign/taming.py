"""VQGAN as taming-transformers and latent-diffusion train it (arXiv 2012.09841): f4, f8, f16, any codebook."""

from __future__ import annotations

from pathlib import Path

from vaevq_med.foreign.base import Adopted, AdoptOptions, Kind
from vaevq_med.foreign.converted import adopted, convolutions
from vaevq_med.foreign.errors import ForeignError
from vaevq_med.foreign.vqgan import read_halves
from vaevq_med.foreign.weights import Tensors

SPARE = ("loss.", "model_ema.", "colorize", "quantize.used", "lpips", "inception_model", "metric")
"""Beginnings of names of what belongs to a training."""


class Taming(Kind):
    """``VQModel`` with a ``VectorQuantizer2``; a Lightning checkpoint, or its state dictionary alone."""

    name = "taming"
    title = "VQGAN of taming-transformers and latent-diffusion"
    source = "a checkpoint (.ckpt, .pt, .safetensors)"
    license = "code MIT; see the model's page for the weights"

    def read(self, source: Path, options: AdoptOptions) -> Adopted:
        """Read a checkpoint.

        Raises:
            ForeignError: it is another network's.
        """
        tensors = Tensors.read(source, f"{self.title} (encoder, decoder, quantize)")
        if "first_stage_model.encoder.conv_in.weight" in tensors:
            tensors = tensors.below("first_stage_model.")
        if "quantize.proj.weight" in tensors:
            raise ForeignError(
                f"{source}: found a Gumbel quantizer (quantize.proj), which draws its indices, expected the nearest "
                "codeword's (quantize.embedding)"
            )
        halves = read_halves(tensors)
        size, width = tensors.shape("quantize.embedding.weight", None, None)
        state = {**halves.state, **convolutions(tensors, halves)}
        state["quantizer.embedding"] = tensors.take("quantize.embedding.weight")
        tensors.check_all_taken(SPARE)
        quantizer = {
            "_target_": "vaevq_med.networks.quantizers.VectorQuantizer",
            "num_embeddings": size,
            "embedding_dim": width,
        }
        return adopted(source, options, halves, state, quantizer, embedding_dim=width, image_size=256)
