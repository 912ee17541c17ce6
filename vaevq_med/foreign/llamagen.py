"""LlamaGen's VQ-8 and VQ-16 (arXiv 2406.06525): VQGAN's network, codewords of length 1 in 8 channels."""

from __future__ import annotations

from pathlib import Path

from vaevq_med.foreign.base import Adopted, AdoptOptions, Kind
from vaevq_med.foreign.converted import adopted, convolutions
from vaevq_med.foreign.taming import SPARE
from vaevq_med.foreign.vqgan import read_halves
from vaevq_med.foreign.weights import Tensors

_RULES = (
    (r"^(encoder|decoder)\.mid\.0\.", r"\1.mid.block_1."),
    (r"^(encoder|decoder)\.mid\.1\.", r"\1.mid.attn_1."),
    (r"^(encoder|decoder)\.mid\.2\.", r"\1.mid.block_2."),
    (r"^encoder\.conv_blocks\.", "encoder.down."),
    (r"^((?:encoder\.down|decoder\.conv_blocks)\.\d+)\.res\.", r"\1.block."),
)


class LlamaGenVQ(Kind):
    """``VQModel`` of LlamaGen, whose decoder counts its levels from the coarsest."""

    name = "llamagen"
    title = "VQ-8 and VQ-16 of LlamaGen"
    source = "a checkpoint (vq_ds8_c2i.pt, vq_ds16_c2i.pt and their like)"
    license = "MIT (code and published weights)"

    def read(self, source: Path, options: AdoptOptions) -> Adopted:
        """Read a checkpoint; averaged weights, where there are some, in place of the raw ones.

        Raises:
            ForeignError: it is another network's.
        """
        tensors = Tensors.read(source, f"{self.title} (encoder.conv_blocks, quantize)", ("ema", "model", "state_dict"))
        tensors.shape("encoder.conv_blocks.0.res.0.conv1.weight")
        last = max(tensors.numbers(r"decoder\.conv_blocks\.(\d+)\."), default=0)
        levels = [(rf"^decoder\.conv_blocks\.{n}\.", f"decoder.up.{last - n}.") for n in range(last + 1)]
        tensors = tensors.renamed((*_RULES, *levels))
        halves = read_halves(tensors)
        size, width = tensors.shape("quantize.embedding.weight", None, None)
        state = {**halves.state, **convolutions(tensors, halves)}
        state["quantizer.embedding"] = tensors.take("quantize.embedding.weight")
        tensors.check_all_taken((*SPARE, "quantize.codebook_used"))
        quantizer = {
            "_target_": "vaevq_med.networks.quantizers.cosine.CosineVQ",
            "num_embeddings": size,
            "embedding_dim": width,
        }
        return adopted(source, options, halves, state, quantizer, embedding_dim=width, image_size=256)
